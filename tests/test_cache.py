"""The cache is built shard by shard, by one kd or several, here or on Ray, and goes on where it was stopped."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kd_here
from PIL import Image
from test_sources import of_images, small_mnist

from kdcli.config import Data
from kdcli.data import cache, images, sources
from kdcli.data.dataset import open_dataset

SLOWLY = """
import sys, time
from pathlib import Path
from torch.utils.data._utils import worker
from kdcli import cli
from kdcli.data import cache, images
cache.SHARD, read, worker.MP_STATUS_CHECK_INTERVAL = 10, cache.open_image, 0.1

def slow(file, least=0):
    time.sleep(0.03)
    with open("{name}.log", "a") as log:
        log.write(f"{{file}}\\n")
    return read(file, least)

cache.open_image = slow
Path("{name}.ready").touch()
while not Path("go").exists():
    time.sleep(0.01)
sys.exit(cli.main())
"""
EXPERIMENT = """\
name: photos
threads: 1
data: {folder: ../photos, size: 6}
teacher: &net {model: {hidden: [4]}, train: {epochs: 1, lr: 0.1}}
student: *net
distill: {T: 2, lambda1: 0.9}
"""


@pytest.fixture(autouse=True)
def _anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources._read.cache_clear()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """210 noisy images of two classes, of which 42 become the test images, and 30 beside them, in PNG files."""
    root, rng = tmp_path_factory.mktemp("images") / "photos", np.random.default_rng(0)
    for i in range(210):
        file = root / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 32, 3), np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The decoded files of a build in one go, in one shard."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("whole")))
        return built(photos)


def built(photos: Path, *words: str) -> dict[str, bytes]:
    done = kd_here(photos.parent, "cache", "photos", "--json", *words)
    assert done.code == 0, done.err
    (folder,) = done.json["folders"]
    assert not Path(f"{folder}.part").exists()
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.suffix == ".npy"}


def marks(tmp_path: Path, name: str = "x_train") -> list[int]:
    """Which shards of a build that is not finished are done."""
    files = [*(tmp_path / "cache" / "kd").glob(f"*.part/{name}.done")]
    return np.flatnonzero(np.load(files[0])).tolist() if files else []


def until(true: Any) -> None:
    for _ in range(1_000):
        if true():
            return
        time.sleep(0.03)
    pytest.fail("took half a minute")


def test_who_waits_for_a_kd_that_is_killed_goes_on_where_it_was(
    photos: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Two real processes at once, of which the one that decodes is ended by SIGKILL: what it had done stays."""
    begun = dict[str, subprocess.Popen[bytes]]()
    for name in "ab":
        words = [sys.executable, "-c", SLOWLY.format(name=name), "cache", str(photos)]
        begun[name] = subprocess.Popen(words, cwd=tmp_path, stderr=(tmp_path / f"{name}.err").open("w"))
    until(lambda: len([*tmp_path.glob("*.ready")]) == 2)
    (tmp_path / "go").touch()

    def waiting() -> list[str]:
        return [name for name in "ab" if "waiting for it" in (tmp_path / f"{name}.err").read_text()]

    until(lambda: waiting() and len(marks(tmp_path)) > 1)
    (other,), before = waiting(), marks(tmp_path)
    killed = {"a": "b", "b": "a"}[other]
    begun[killed].kill()
    assert begun[killed].wait() == -signal.SIGKILL
    assert begun[other].wait() == 0
    assert len(before) < 17  # of 168 training images
    (folder,) = (tmp_path / "cache" / "kd").glob("*/")
    train = [str(photos / name) for name in json.loads((folder / "files.json").read_text())["train"]]
    done = {file for k in before for file in train[10 * k : 10 * k + 10]}
    first, second = ((tmp_path / f"{name}.log").read_text().split() for name in (killed, other))
    assert done <= {*first}
    assert done.isdisjoint(second)
    assert len(second) == len({*second}) < 210
    assert {name: (folder / name).read_bytes() for name in whole} == whole


@contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Builds end once so many shards are marked, at the instant before the next one is."""
    shards, fsync = itertools.count(), os.fsync

    def stop(file: Any) -> None:
        if next(shards) == after:
            raise KeyboardInterrupt
        fsync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        yield


@pytest.fixture
def stopped(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A build that ended at the instant before its sixth shard was marked; then, which files are decoded again."""
    again = list[str]()
    monkeypatch.setattr(cache, "SHARD", 20)
    with stopping(monkeypatch, 5):
        assert kd_here(photos.parent, "cache", "photos").code == 130
    assert marks(tmp_path) == [0, 1, 2, 3, 4]
    here = images.in_processes

    def counted(work: Any, items: Any, parts: Any) -> Any:
        again.extend(str(items[i]) for part in parts for i in part)
        return here(work, items, parts)

    monkeypatch.setattr(cache, "in_processes", counted)
    return again


def test_an_interrupted_build_goes_on(photos: Path, whole: dict[str, bytes], stopped: list[str]) -> None:
    assert built(photos) == whole
    assert len(stopped) == 210 - 5 * 20


def test_labels_of_torchvision_outlive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known only once an image is decoded: 20 training images in shards of 3, stopped before the fifth mark."""
    small_mnist(tmp_path / "FashionMNIST" / "raw")
    data = Data(name="torchvision:FashionMNIST")
    monkeypatch.setattr(cache, "SHARD", 3)
    with stopping(monkeypatch, 4), pytest.raises(KeyboardInterrupt):
        open_dataset(data, tmp_path)
    assert marks(tmp_path) == [0, 1, 2, 3]
    found = open_dataset(data, tmp_path)
    assert found.train.labels.tolist() == [i % 10 for i in range(20)]
    np.testing.assert_array_equal(found.train.store[:, 0], of_images((28, 28), 20, 10, seed=20)[0])


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "unmarked"])
def test_what_is_not_whole_is_not_trusted(
    damage: str, photos: Path, whole: dict[str, bytes], stopped: list[str], tmp_path: Path
) -> None:
    (part,) = (tmp_path / "cache" / "kd").glob("*.part")
    file = part / "x_train.npy"
    if damage == "unmarked":
        (part / "x_train.done").write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-1])
    assert built(photos) == whole
    assert len(stopped) == 210


def test_a_changed_file_makes_another_cache(photos: Path, whole: dict[str, bytes], stopped: list[str]) -> None:
    os.utime(photos / "cat" / "0.png")
    assert built(photos) == whole
    assert len(stopped) == 210


def test_too_little_room_is_told_before_anything_is_decoded(
    photos: Path, whole: dict[str, bytes], stopped: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """210 images of 3 x 30 x 32 bytes; what an interrupted build has written counts, and stays."""
    for left, code in ((5_000, 2), (400_000, 0)):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _, left=left: shutil._ntuple_diskusage(0, 0, left))
            done = kd_here(photos.parent, "cache", "photos")
        assert done.code == code
        if code:
            place = tmp_path / "cache" / "kd"
            what = f"{place}: 210 images of {photos} take 604.8 kB, and the disk has 5.0 kB left"
            where = f"decoded images go to {place}; XDG_CACHE_HOME names another folder"
            assert done.err == f"photos: data.folder: {what}: {where}\n"
            assert marks(tmp_path) == [0, 1, 2, 3, 4]
    assert len(stopped) == 110


def test_a_disk_that_fills_up_is_told_and_what_is_done_stays(
    photos: Path, stopped: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x_train.npy")

    with monkeypatch.context() as patched:
        patched.setattr(cache, "to_bytes", full)
        done = kd_here(photos.parent, "cache", "photos")
    assert done.code == 2
    assert "x_train.npy: No space left on device: decoded images go to " in done.err
    assert marks(tmp_path) == [0, 1, 2, 3, 4]


def test_an_experiment_starts_without_decoding_what_was_decoded_ahead(photos: Path, tmp_path: Path) -> None:
    """From another folder than the one where it was, and with images that nobody labelled."""
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "photos.yaml").write_text(EXPERIMENT)
    planned = kd_here(photos.parent, "cache", "photos", "--size", "6", "--dry-run", "--json")
    assert planned.json == {"command": "cache", "dry_run": True, "images": 210, "bytes": 210 * 3 * 36}
    assert not (tmp_path / "cache").exists()
    said = f"{photos}: decoding 210 images, once: 22.7 kB in {tmp_path}/cache/kd, where "
    assert kd_here(photos.parent, "cache", "photos", "--size", "6").err.startswith(said)
    assert "decoding" not in kd_here(elsewhere, "train-teacher", "photos.yaml", "--dry-run").err
    unlabelled = shutil.copytree(photos / "cat", elsewhere / "more")
    more = ("cache", "photos.yaml", "--set", f"data.unlabelled={unlabelled}")
    assert kd_here(elsewhere, *more, "--dry-run", "--json").json["images"] == 210 + 105
    done = kd_here(elsewhere, *more, "--json")
    assert f"{unlabelled}: decoding 105 images, once: 11.3 kB" in done.err
    assert len(done.json["folders"]) == 2
    assert "decoding" not in kd_here(elsewhere, *more).err
    shutil.copytree(unlabelled, photos.parent / "more")
    beside = ("cache", "photos", "--size", "6", "--set", "data.unlabelled=more", "--dry-run", "--json")
    assert kd_here(photos.parent, *beside).json["images"] == 210 + 105


def test_images_that_are_replaced_are_not_decoded(photos: Path) -> None:
    (photos.parent / "photos.yaml").write_text(EXPERIMENT.replace("../", ""))
    done = kd_here(photos.parent, "train-teacher", "photos.yaml", "--dry-run", "--set", "data.size=5")
    assert done.code == 0, done.err
    assert re.findall("once: (.*) in", done.err) == ["15.8 kB"]  # 210 of 5 x 5 pixels
    done = kd_here(photos.parent, "train-teacher", "photos.yaml", "--dry-run", "--set", "data.size=6")
    assert done.err.splitlines()[-1] == "--set data.size=6: changes nothing: that is its value already"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("photos", "--size", "0"), "--size 0: data.size: must be greater than or equal to 1, not 0"),
        (("photos", "--channels", "2"), "--channels 2: data.channels: must be 1 or 3, not 2"),
        (("digits",), "digits: its images are no files in a folder, which alone are decoded ahead"),
        (("photos", "--on", "ray://127.0.0.1:1"), "--on ray://127.0.0.1:1: no Ray cluster answers there: Connection"),
        (("photos", "--set", "distill.T=9"), "--set distill.T=9: changes nothing that kd cache does"),
        (("nowhere",), "nowhere: neither an experiment's name nor a .yaml file"),
    ],
)
def test_what_cannot_be_decoded_ahead_is_told(words: tuple[str, ...], said: str, photos: Path) -> None:
    done = kd_here(photos.parent, "cache", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(said)


def test_a_log_has_a_line_a_minute(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 61).__next__)
    lines = kd_here(photos.parent, "cache", "photos").err.splitlines()
    assert f"{photos}: 100 of 168 images" in lines


def test_shards_are_tasks_of_ray(photos: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cache, "SHARD", 50)
    monkeypatch.setattr(cache, "in_processes", lambda *_: pytest.fail("decoded here"))
    assert built(photos, "--on", "ray") == whole
    assert not ray.is_initialized()


def test_images_that_write_their_labels_are_decoded_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster's node the labels would be written into a copy."""
    monkeypatch.setattr(cache, "on_cluster", lambda *_: pytest.fail("decoded elsewhere"))
    file, form = tmp_path / "x.npy", cache.Form([1, 2, 2], None)
    token = cache.CLUSTER.set(object())
    try:
        cache.fill(file, range(3), form, "squares", lambda i: Image.new("L", (2, 2), 7 * i))
    finally:
        cache.CLUSTER.reset(token)
    assert np.load(file)[:, 0, 0, 0].tolist() == [0, 7, 14]
