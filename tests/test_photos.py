"""A folder of photographs from end to end, through real processes: init, teacher, students, report, export, predict."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Shell, kd_here
from jsonschema import Draft202012Validator
from PIL import Image

from kdcli import init, score, yamlfile
from kdcli.report.show import duration
from kdcli.runs.spec import Spec

NAMES = ("cat", "dog", "owl")
PHOTOS = """\
name: photos
threads: 1
data: {folder: photos, size: 12}
teacher:
  model: {name: resnet8}
  train: {epochs: 4, batch_size: 16, lr: 0.05, flip: true, jitter: 1, nesterov: true}
student:
  model: {name: "torchvision:mobilenet_v3_small"}
  train: &small {epochs: 1, batch_size: 16, lr: 0.01}
distill: {T: 4, lambda1: 0.9}
omit_classes:
  - {omit: [cat], train: *small}
"""


def photographs(root: Path, counts: dict[str, int]) -> None:
    """JPEG files of 20 x 16 pixels, each class with a colour of its own below the noise; one test image is a copy."""
    rng = np.random.default_rng(0)
    for part, share in (("train", 1), ("test", 2)):
        for k, name in enumerate(NAMES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(counts[name] // share):
                noise = rng.normal(0, 40, (16, 20, 3)) + np.eye(3)[k] * 90 + 80
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
    (root / "test" / "cat" / "copy.jpg").write_bytes((root / "train" / "cat" / "0.jpg").read_bytes())
    (root / "train" / "notes.txt").write_text("x")
    (root / "train" / "cat" / "notes.txt").write_text("x")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("photos"))
    photographs(shell.folder / "photos", {"cat": 60, "dog": 30, "owl": 30})
    (shell.folder / "photos.yaml").write_text(PHOTOS)
    return shell


@pytest.fixture(scope="module")
def document(shell: Shell) -> dict[str, Any]:
    done = shell("run", "photos.yaml", "--seeds", "0-1", "--json", OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    assert done.err.count("1 test image is also in the training set, pixel for pixel: ") == 1
    return done.json


def test_the_table_is_that_of_any_experiment_with_the_balanced_error(shell: Shell, document: dict[str, Any]) -> None:
    rows = {row["row"]: row for row in document["points"][0]["table"]}
    assert list(rows) == [
        "teacher",
        "baseline",
        "student",
        *(f"omit cat{b}" for b in ("", ", test bias", ", heldout bias", ", prior bias")),
    ]
    assert rows["teacher"]["mean"] < 10  # of 61
    assert 0 <= rows["teacher"]["balanced"] < 0.25
    assert document["classes"] == list(NAMES)
    text = kd_here(shell.folder, "run", "photos.yaml", "--seeds", "0-1").out
    assert "balanced" in text
    assert "top-5" not in text  # of three classes


def test_copies_of_training_images_are_in_the_output_the_json_and_the_report(
    shell: Shell, document: dict[str, Any]
) -> None:
    note = f"1 test image is also in the training set, pixel for pixel: {shell.folder}/photos/test/cat/copy.jpg is {shell.folder}/photos/train/cat/0.jpg."
    assert note in document["remarks"]
    assert f"{shell.folder}/photos: .txt files, which are not read as images, left out: 1." in document["remarks"]
    assert "is also in the training set" in (shell.folder / "runs/photos/report/report.html").read_text()
    assert note in (shell.folder / "runs/photos/report/report.md").read_text()


def test_a_class_is_left_out_by_its_name(shell: Shell, document: dict[str, Any]) -> None:
    done = kd_here(shell.folder, "omit-classes", "photos.yaml", "--omit", "dog", "--epochs", "1", "--json")
    assert done.json["omitted"] == ["dog"]
    wrong = kd_here(shell.folder, "omit-classes", "photos.yaml", "--omit", "dgo")
    assert wrong.code == 2
    assert "there is no class dgo; did you mean dog?" in wrong.err


def test_an_exported_net_reads_a_photograph_as_the_run_does(shell: Shell, document: dict[str, Any]) -> None:
    """Of any size: the middle of it, normalised inside the file."""
    run = next(r["run"] for r in document["points"][0]["runs"] if r["row"] == "teacher")
    done = kd_here(shell.folder, "export", run, "--out", "teacher.onnx")
    assert done.code == 0, done.err
    big = shell.folder / "big.png"
    Image.open(shell.folder / "photos/test/owl/0.jpg").resize((200, 160)).save(big)
    answers = [
        kd_here(shell.folder, "predict", net, "photos/test/owl/0.jpg", str(big), "--json").json
        for net in (run, "teacher.onnx")
    ]
    for one, other in zip(*(answer["images"] for answer in answers), strict=True):
        assert np.allclose(one["views"][0]["p"], other["views"][0]["p"], atol=1e-4)
        assert int(np.argmax(one["views"][0]["p"])) == 2
    numbered = kd_here(shell.folder, "predict", run, "--test-image", str(31 + 15), "--json").json["images"][0]
    assert np.allclose(numbered["views"][0]["p"], answers[0]["images"][0]["views"][0]["p"], atol=1e-4)


def test_init_writes_a_file_that_runs_as_it_stands(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    done = kd_here(shell.folder, "init", "photos")
    assert done.code == 0, done.err
    (shell.folder / "mine.yaml").write_text(done.out)
    values = yaml.load(done.out, yamlfile.Loader)
    assert values["data"] == {"folder": str(shell.folder / "photos"), "size": 16}
    assert values["teacher"]["model"] == {"name": "resnet20"}
    assert "120 training and 61 test images of 3 classes" in done.out
    assert "30 to 60 training images per class, of 20 x 16 pixels" in done.out
    planned = kd_here(shell.folder, "run", "mine.yaml", "--dry-run", "--json").json
    assert len(planned["runs"]) > 9
    assert planned["seconds"] > 0
    timed: list[str] = []

    def seconds(specs: Sequence[Spec], *_: Any) -> dict[str, float]:
        timed.extend(spec.name for spec in specs)
        return dict.fromkeys(timed, 1.0)

    monkeypatch.setattr(init, "seconds", seconds)
    kd_here(shell.folder, "init", "photos")
    one, other = (
        sorted(name.rpartition("-")[0] for name in names) for names in (timed, [r["run"] for r in planned["runs"]])
    )
    assert one == other  # the time is that of what is trained


def test_init_keeps_names_as_they_are_read(shell: Shell, tmp_path: Path) -> None:
    """A folder's name becomes that of an experiment, letters without their accents; classes keep theirs."""
    folder = tmp_path / "Été 2024"
    shutil.copytree(shell.folder / "photos", folder)
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / "Boot & chaloupe à rames")
    done = kd_here(tmp_path, "init", str(folder))
    assert "name: Ete-2024\n" in done.out
    assert f'folder: "{folder}"' in done.out
    assert 'omit: ["Boot & chaloupe à rames"]' in done.out


@pytest.mark.parametrize("name", ["2024", "2024-13-45", "null"])
def test_init_quotes_a_name_that_yaml_reads_as_something_else(name: str, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(shell.folder / "photos")
    done = kd_here(tmp_path, "init", name)
    assert done.code == 0, done.err
    assert yaml.load(done.out, yamlfile.Loader)["name"] == name


def test_init_leaves_out_what_a_rare_class_does_not_allow(shell: Shell, tmp_path: Path) -> None:
    shutil.copytree(shell.folder / "photos", tmp_path / "photos")
    for file in sorted((tmp_path / "photos/train/owl").iterdir())[2:]:
        file.unlink()
    done = kd_here(tmp_path, "init", "photos")
    assert done.code == 0, done.err
    assert "# no omit_classes: " in done.out
    (tmp_path / "mine.yaml").write_text(done.out)
    assert kd_here(tmp_path, "run", "mine.yaml", "--dry-run").code == 0


def test_init_takes_nets_by_name_and_refuses_what_is_none(shell: Shell) -> None:
    done = kd_here(shell.folder, "init", "photos", "--student", "wrn-10-1")
    assert 'name: "wrn-10-1"' in done.out
    own = kd_here(shell.folder, "init", "photos", "--teacher", "own_nets.py:make")
    assert f'name: "{shell.folder}/own_nets.py:make"' in own.out  # it may be written to any folder
    for words, said in (
        (("photos", "--teacher", "resnet21"), "resnet21: there is no net of this depth and width: depths are 6n + 2"),
        (("photos", "--teacher", "resnet"), "resnet: must be resnet8"),
        (("nowhere",), "nowhere: there is no such folder"),
    ):
        wrong = kd_here(shell.folder, "init", *words)
        assert (wrong.code, wrong.out) == (2, "")
        assert said in wrong.err


def test_the_schema_accepts_the_experiments_that_kd_accepts(shell: Shell) -> None:
    schema = json.loads(kd_here(shell.folder, "schema").out)
    check = Draft202012Validator(schema)
    files = [*yamlfile.experiments().values(), *shell.folder.glob("*.yaml")]
    assert len(files) > 8
    for file in files:
        assert list(check.iter_errors(yaml.load(file.read_text(), yamlfile.Loader))) == []
    wrong: tuple[dict[str, Any], ...] = (
        {"dta": {}},
        {"seed": "x"},
        {"data": {"name": 3}},
        {"teacher": {"model": {"hidden": 3}}},
    )
    for change in wrong:
        assert list(check.iter_errors(yaml.load(PHOTOS, yamlfile.Loader) | change))


def test_nets_of_timm_are_built_for_the_channels_and_classes(shell: Shell) -> None:
    words = [
        "train-teacher",
        "photos.yaml",
        "--set",
        "teacher.model={name: 'timm:test_resnet'}",
        "--epochs",
        "2",
        "--json",
    ]
    done = kd_here(shell.folder, *words)
    assert done.code == 0, done.err
    wrong = kd_here(shell.folder, "train-teacher", "photos.yaml", "--set", "teacher.model={name: 'timm:resnet_18'}")
    assert "timm:resnet_18: timm has no such net; did you mean resnet" in wrong.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:mobilenet_v9", "torchvision has no such classifier; did you mean mobilenet_v"),
        ("{name: 'torchvision:vgg11', args: {depth: 3}}", "cannot be made with its args"),
        ("{name: 'torchvision:alexnet'}", "does not take images [3, 12, 12]"),
        ("wrn-11-2", "there is no net of this depth and width: depths are 6n + 4"),
    ],
)
def test_a_net_that_cannot_be_is_told_at_the_start(name: str, said: str, shell: Shell) -> None:
    model = name if name.startswith("{") else f"{{name: '{name}'}}"
    done = kd_here(shell.folder, "train-teacher", "photos.yaml", "--set", f"teacher.model={model}")
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "teacher.model.name" in done.err


def test_balanced_error_and_top_five_by_hand() -> None:
    """Six samples of class 0, one wrong, and two of class 1, one wrong: (1/6 + 1/2) / 2."""
    labels = torch.tensor([0] * 6 + [1] * 2)
    log_p = torch.eye(2)[[0, 0, 0, 0, 0, 1, 1, 0]].mul(9).log_softmax(1)
    found = score.quality(log_p, labels)
    assert found.balanced == pytest.approx(1 / 3)
    assert found.top5 is None
    assert score.quality(log_p[4:], labels[4:]).balanced is None  # two of each
    many = torch.arange(12.0).repeat(3, 1).log_softmax(1)  # the likeliest are 11, 10, 9, 8, 7
    assert score.quality(many, torch.tensor([11, 7, 6])).top5 == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (59.4, "59 s"), (61, "1 min"), (3_599, "60 min"), (3_700, "1 h 2 min"), (200_000, "2.3 days")],
)
def test_durations_for_a_reader(seconds: float, said: str) -> None:
    assert duration(seconds) == ("1 h 0 min" if said == "60 min" else said)


@pytest.mark.parametrize("key", ["flip=true", "crop=0.5", "elastic=1", "cutout=1", "jitter=1"])
def test_a_table_is_taken_as_one(key: str, shell: Shell) -> None:
    """scikit-learn's breast cancer, 30 columns of very different sizes: perceptrons make few errors on it."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    np.savez(shell.folder / "table.npz", x_train=x[:400], y_train=y[:400], x_test=x[400:], y_test=y[400:])
    text = "name: table\ndata: {arrays: table.npz}\nteacher: {model: {hidden: [64]}, train: {epochs: 20, lr: 0.05}}\n"
    text += "student: {model: {hidden: [4]}, train: {epochs: 20, lr: 0.05}}\ndistill: {T: 2, lambda1: 0.9}\n"
    (shell.folder / "table.yaml").write_text(text)
    refused = kd_here(shell.folder, "run", "table.yaml", "--set", f"student.train.{key}")
    assert (refused.code, refused.out) == (2, "")
    assert "student.train." in refused.err
    assert "belongs to images, and this is a table: remove it" in refused.err
    if key.startswith("flip"):
        done = kd_here(shell.folder, "run", "table.yaml", "--json")
        assert done.code == 0, done.err
        assert {row["row"]: row["mean"] < 12 for row in done.json["points"][0]["table"]} == dict.fromkeys(
            ("teacher", "baseline", "student"), True
        )
