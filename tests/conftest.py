import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from kdcli import cli
from kdcli.runs.spec import Facts

torch.set_num_threads(1)

MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
CACHE = Path(tempfile.gettempdir(), f"kd-tests-{os.getuid()}")  # of decoded images, for all tests and later ones
os.environ.setdefault("XDG_CACHE_HOME", str(CACHE))
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 its workers wait for the other tests

# The whole of an experiment on the embedded digits, small enough to train in a second.
TINY = """\
name: tiny
threads: 1
data: {name: digits, heldout: 200}
teacher:
  model: {hidden: [64], dropout: 0.5}
  train: {epochs: 6, batch_size: 50, optimizer: adam, lr: 3e-3, jitter: 1, max_norm: 3}
ensemble: {members: 2}
student:
  model: {hidden: [16]}
  train: {epochs: 6, batch_size: 50, optimizer: adam, lr: 1e-2}
distill: {T: 4, lambda1: 0.9}
omit_classes:
  - omit: [3]
"""

# Somebody's own data and net: colour images that are not square, classes with names, BatchNorm and dropout.
OWN_DATA = """\
import numpy as np

NAMES = ["cat", "dog", "owl"]


def load(classes=NAMES, each=40, noise=60):
    rng = np.random.default_rng(0)
    prototypes = rng.integers(60, 195, (len(classes), 3, 6, 9))

    def draw(each):
        labels = np.repeat(np.arange(len(classes)), each)
        images = prototypes[labels] + rng.normal(0, noise, (len(labels), 3, 6, 9))
        return images.clip(0, 255).astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = draw(each), draw(each // 2)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, "classes": classes}


def hundred():
    return load([f"kind {i}" for i in range(100)], each=12, noise=30)
"""
OWN_NETS = """\
from torch import nn


def make(classes, channels, width=8):
    print("a net is made")  # which breaks nothing
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
"""
OWN = """\
name: own
threads: 1
data: {function: "own_data.py:load", heldout: 24}
teacher:
  model: {name: "own_nets.py:make", args: {width: 16}}
  train: {epochs: 8, batch_size: 16, optimizer: adam, lr: 1e-2, jitter: 1, flip: true, crop: 0.7, cutout: 2, mixup: 0.1, ema: 0.9}
ensemble: {members: 2}
student:
  model: {name: "own_nets.py:make", args: {width: 4}}
  train: {epochs: 8, batch_size: 16, optimizer: adamw, lr: 1e-2, clip: 5, schedule: step, milestones: [1]}
distill: {T: 4, lambda1: 0.9}
omit_classes:
  - omit: [dog]
"""


def facts(shape: list[int], classes: int, **more: Any) -> Facts:
    """What a dataset is, of this shape and with so many classes."""
    return Facts(fingerprint="", classes=[str(c) for c in range(classes)], shape=shape, white=255, **more)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: left to the end they would run alone, with the other processes idle."""
    items.sort(key=lambda item: item.path.stem not in ("test_ray", "test_mnist"))


class Done(NamedTuple):
    """A finished `kd` process."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


class Shell:
    """Runs `kd` as a user would, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "tiny.yaml").write_text(TINY)
        for name, text in (("own.yaml", OWN), ("own_data.py", OWN_DATA), ("own_nets.py", OWN_NETS)):
            (folder / name).write_text(text)

    def __call__(self, *arguments: str, **environment: str) -> Done:
        variables = {k: v for k, v in os.environ.items() if k != "KD_DATA"} | environment
        done = subprocess.run(
            [sys.executable, "-m", "kdcli", *arguments], cwd=self.folder, env=variables, capture_output=True, text=True
        )
        return Done(done.returncode, done.stdout, done.stderr)


def kd_here(folder: Path, *words: str) -> Done:
    """`kd` in this process, which takes a hundredth of the time of a new one."""
    out, err, before, argv, threads = io.StringIO(), io.StringIO(), Path.cwd(), sys.argv, torch.get_num_threads()
    os.chdir(folder)
    sys.argv = ["kd", *words]
    try:
        # One core, also where the system does not say which: to start processes takes longer than to train.
        one = mock.patch("os.sched_getaffinity", return_value={0}, create=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one:
            code = cli.main()
    finally:
        os.chdir(before)
        sys.argv = argv
        torch.set_num_threads(threads)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture
def kd(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder in which `kd run tiny.yaml` was run; tests read it and do not change it."""
    shell = Shell(tmp_path_factory.mktemp("trained"))
    done = shell("run", "tiny.yaml", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    (shell.folder / "run.json").write_text(done.out)
    return shell


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder with real MNIST. Without it the test is skipped, or fails where CI=true."""
    folder = Path(os.environ.get("KD_DATA", "data")).resolve()
    if not all((folder / "MNIST" / "raw" / f"{name}-ubyte").is_file() for name in MNIST_FILES):
        reason = f"needs MNIST in {folder}: set KD_DATA to the folder that holds MNIST/raw"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
