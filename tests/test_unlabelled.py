"""Images that only the teacher labels, from the samples of a transfer set to the report."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, Done, Shell, kd_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcli import BadInput
from kdcli.config import Data
from kdcli.data.dataset import Split, open_dataset
from kdcli.runs.directory import Run, open_run
from kdcli.teachers.teacher import cached, dataset_of, kept_logits, live, logits_of
from kdcli.training import estimate

CPU, EXTRA = torch.device("cpu"), 30
DEVICES = [CPU, *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_two_stores_are_one_set_of_samples(data: st.DataObject) -> None:
    """Against the images and labels of a plain concatenation, for any choice of samples before and after."""
    n, m = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    store, extra = (torch.arange(start, start + k).view(-1, 1, 1, 1).byte() for start, k in ((0, n), (100, m)))
    some, labels = st.lists(st.integers(0, n - 1), max_size=9), torch.arange(n)
    images, wanted = Split(store, labels, 255), store.flatten()
    if data.draw(st.booleans()):
        chosen = torch.tensor(data.draw(some), dtype=torch.int64)
        images, wanted, labels = images.at(chosen), wanted[chosen], labels[chosen]
    whole = images.followed_by(Split(extra, torch.full((m,), -1), 255))
    wanted, labels = torch.cat([wanted, extra.flatten()]), torch.cat([labels, torch.full((m,), -1)])
    for _ in range(2):
        for device in DEVICES:
            there = whole.to(device)
            assert len(there) == len(wanted)
            assert there.labels.tolist() == labels.tolist()
            index = torch.tensor(data.draw(st.lists(st.integers(0, len(wanted) - 1))) if len(wanted) else [])
            found = there.images(index.long().to(device))
            assert found.device.type == device.type
            assert found.flatten().tolist() == wanted[index.long()].tolist()
        if len(wanted):
            chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(wanted) - 1))), dtype=torch.int64)
            whole, wanted, labels = whole.at(chosen), wanted[chosen], labels[chosen]


def write_images(folder: Path, seed: int = 0) -> None:
    """Digits of the training set that noise has changed, at two depths."""
    rng, digits = np.random.default_rng(seed), open_dataset(Data(name="digits")).train.store[:EXTRA, 0].numpy()
    for i, digit in enumerate(digits):
        file = folder / ("deep" if i % 2 else ".") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noisy = (digit + rng.integers(-3, 4, digit.shape)).clip(0, 16)
        Image.fromarray((noisy * 255.0 / 16).round().astype(np.uint8)).save(file)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with the tiny experiment and the same with unlabelled images, whose teachers, the same, are trained."""
    shell = Shell(tmp_path_factory.mktemp("unlabelled"))
    write_images(shell.folder / "more")
    plain = TINY.replace("epochs: 6", "epochs: 2")
    (shell.folder / "tiny.yaml").write_text(plain)
    (shell.folder / "more.yaml").write_text(plain.replace("heldout: 200}", "heldout: 200, unlabelled: more}"))
    done = kd_here(shell.folder, "ensemble", "more.yaml", "--jobs", "1")
    assert done.code == 0, done.err
    return shell


@pytest.fixture(scope="module")
def distilled(shell: Shell) -> Done:
    done = shell("distill", "more.yaml", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    return done


def student(shell: Shell, done: Done) -> Run:
    return open_run(shell.folder / "runs", done.json["run"])


def test_a_student_sees_them_and_its_teacher_and_baseline_do_not(shell: Shell, distilled: Done) -> None:
    document = distilled.json
    assert (document["samples"], document["unlabelled"]) == (1297, EXTRA)
    plain, more = (kd_here(shell.folder, "distill", f"{name}.yaml", "--dry-run", "--json") for name in ("tiny", "more"))
    names = [planned["run"] for planned in plain.json["runs"]]
    assert document["baseline"]["run"] in names
    assert document["run"] not in names
    assert all("train-teacher" in parent for parent in document["parents"])
    baseline = open_run(shell.folder / "runs", document["baseline"]["run"])
    assert (baseline.result().samples, baseline.result().unlabelled) == (1297, None)
    steps = {planned["row"]: (planned["samples"], planned["steps"]) for planned in more.json["runs"]}
    assert steps == {"baseline": (1297, 52), "student": (1327, 54)}


def test_the_time_of_a_dry_run_is_of_all_that_a_student_sees(
    shell: Shell, distilled: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a second a step: 2 epochs of 27 steps for 1,327 images in batches of 50; 26 would do for the labelled ones."""
    monkeypatch.setattr(estimate, "_timed", lambda *_: (1.0, 0.0, 0.0))
    words = ["distill", "more.yaml", "--no-baseline", "--set", "distill.T=5", "--dry-run", "--json"]
    assert kd_here(shell.folder, *words).json["seconds"] == 54


SAW = "The {} saw {} labelled images and 30 that only its teacher labels, which no baseline sees."


def test_the_table_and_the_report_say_how_many_images_the_student_saw(shell: Shell, distilled: Done) -> None:
    done = kd_here(shell.folder, "distill", "more.yaml")
    assert SAW.format("student", "1,297") in done.out.splitlines()
    assert kd_here(shell.folder, "distill", "tiny.yaml").out.count("labelled images") == 0
    done = kd_here(shell.folder, "report", distilled.json["run"])
    assert done.code == 0, done.err
    assert SAW.format("student", "1,297") in done.out.splitlines()
    assert "baseline" in done.out  # which is found, though it saw other images
    assert "no baseline of its seed" not in done.out
    page = shell.folder / "runs" / distilled.json["run"] / "report"
    for name in ("report.md", "report.html"):
        assert SAW.format("student", "1,297") in (page / name).read_text()


def test_students_without_classes_see_them_all_and_that_is_said(shell: Shell, distilled: Done) -> None:
    done = kd_here(shell.folder, "omit-classes", "more.yaml", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["unlabelled"] == EXTRA
    lines = kd_here(shell.folder, "omit-classes", "more.yaml").out.splitlines()
    assert SAW.format("student (omit 3)", f"{document['samples']:,}") in lines
    assert "The unlabelled images may include classes left out." in lines
    assert "may include classes" not in kd_here(shell.folder, "distill", "more.yaml").out


def test_two_runs_that_differ_in_them_are_compared(shell: Shell, distilled: Done) -> None:
    plain = kd_here(shell.folder, "distill", "tiny.yaml", "--json").json["run"]
    done = kd_here(shell.folder, "compare", plain, distilled.json["run"], "--json")
    assert done.code == 0, done.err
    fingerprint = student(shell, distilled).spec.dataset.unlabelled or ""
    assert done.json["comparisons"][0]["changed"] == {"data.unlabelled": [None, fingerprint[:12]]}


@pytest.mark.parametrize("kind", ["teacher", "ensemble"])
def test_a_teacher_that_is_asked_once_says_of_them_what_a_live_one_says(
    kind: str, shell: Shell, distilled: Done
) -> None:
    dataset = dataset_of(student(shell, distilled), None)
    folder = {"teacher": "train-teacher", "ensemble": "ensemble"}[kind]
    run = open_run(shell.folder / "runs", str(next((shell.folder / "runs" / "tiny" / folder).glob("0-*"))))
    assert dataset.unlabelled
    transfer, whole = torch.tensor([5, 7]), dataset.train.at(torch.tensor([5, 7])).followed_by(dataset.unlabelled)
    index = torch.tensor([1, 2, 31, 0])
    x = whole.inputs(index)
    one = cached(run, transfer, 1297, CPU, dataset.unlabelled).logits(index, x)
    assert one.shape == (2 if kind == "ensemble" else 1, 4, 10)
    assert torch.allclose(one, live(run, CPU).logits(index, x), atol=1e-5)


def test_logits_of_them_that_a_teacher_kept_are_used(shell: Shell, distilled: Done, tmp_path: Path) -> None:
    dataset, name = dataset_of(student(shell, distilled), None), next(iter(distilled.json["parents"]))
    shutil.copytree(shell.folder / "runs" / name, tmp_path / name)
    run = open_run(tmp_path, name)
    assert dataset.unlabelled
    for kept, said in ((torch.rand(EXTRA, 10), ""), (torch.rand(EXTRA + 1, 10), "not those of the 30 unlabelled")):
        run.save("logits", run.load("logits") | {"unlabelled": kept})
        run.finish(run.result())
        if said:
            with pytest.raises(BadInput, match=said):
                logits_of(run, "unlabelled", dataset.unlabelled)
        else:
            assert torch.equal(logits_of(run, "unlabelled", dataset.unlabelled)[0], kept)
            assert torch.equal(kept_logits(run, "unlabelled", EXTRA)[0], kept)


def test_a_student_of_changed_images_is_refused_and_its_baseline_needs_none(distilled: Done, shell: Shell) -> None:
    """In a folder of their own beside the same runs, since a run knows where its images lie."""
    run = student(shell, distilled)
    baseline = open_run(shell.folder / "runs", distilled.json["baseline"]["run"])
    lies = shell.folder / "more"
    try:
        lies.rename(shell.folder / "away")
        assert len(dataset_of(baseline, None).train) == 1297
        with pytest.raises(BadInput, match=r"data\.unlabelled: there is no folder"):
            dataset_of(run, None)
        write_images(lies, seed=1)
        with pytest.raises(BadInput, match="its unlabelled images are not those that it was planned with"):
            dataset_of(run, None)
    finally:
        shutil.rmtree(lies)
        (shell.folder / "away").rename(lies)


def test_augmented_students_ask_their_teacher_live(shell: Shell) -> None:
    words = ["--set", "student.train.jitter=1", "--set", "student.train.mixup=0.2", "--no-baseline", "--json"]
    document = kd_here(shell.folder, "distill", "more.yaml", "--epochs", "1", *words).json
    assert (document["samples"], document["unlabelled"]) == (1297, EXTRA)


def test_what_cannot_be_is_told_with_the_line_of_its_key(shell: Shell) -> None:
    done = kd_here(shell.folder, "distill", "more.yaml", "--set", "data.unlabelled=none")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"--set data.unlabelled=none: data.unlabelled: there is no folder {shell.folder}/none\n"
    lines = yaml.safe_load((shell.folder / "more.yaml").read_text())
    lines["data"]["unlabelled"] = "none"
    (shell.folder / "none.yaml").write_text(yaml.safe_dump(lines))
    done = kd_here(shell.folder, "distill", "none.yaml")
    assert done.err.startswith("none.yaml:")
    assert f"data.unlabelled: there is no folder {shell.folder}/none" in done.err


def test_held_out_images_among_them_are_told(shell: Shell, tmp_path: Path) -> None:
    """All training images, written to files without noise."""
    (tmp_path / "all").mkdir()
    for i, digit in enumerate(open_dataset(Data(name="digits")).train.store[:, 0].numpy()):
        Image.fromarray((digit * 255.0 / 16).round().astype(np.uint8)).save(tmp_path / "all" / f"{i:04}.png")
    data = Data(name="digits", unlabelled=str(tmp_path / "all"), evaluate_on="heldout", heldout=200)
    assert "Among the unlabelled images too, pixel for pixel: 200 held-out images." in open_dataset(data).notes


def test_a_file_of_logits_answers_for_the_unlabelled_images_that_it_was_read_with(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    labels = open_dataset(Data(name="digits")).train.labels
    eye = 4 * np.eye(10, dtype=np.float32)
    np.savez(tmp_path / "a.npz", train=eye[labels], unlabelled=eye[labels[:EXTRA]])
    teacher = "teacher: {logits: a.npz}\n"
    text = TINY[: TINY.index("teacher:")] + teacher + TINY[TINY.index("student:") :]
    (tmp_path / "more.yaml").write_text(text.replace("heldout: 200}", "heldout: 200, unlabelled: more}"))
    write_images(tmp_path / "more")
    assert kd_here(shell.folder, "train-teacher", "more.yaml").code == 0
    (run,) = (tmp_path / "runs/tiny/train-teacher").iterdir()
    name = f"tiny/train-teacher/{run.name}"
    named = ["distill", "more.yaml", "--dry-run", "--teacher", name]
    assert kd_here(shell.folder, *named).code == 0
    shutil.rmtree(tmp_path / "more")
    write_images(tmp_path / "more", seed=1)
    done = kd_here(shell.folder, "distill", "more.yaml")
    assert done.code == 2
    assert f"similar run: {name} (completed)" in done.err
    assert "--teacher" not in done.err
    done = kd_here(shell.folder, *named)
    lacks = "a file of logits, which has no answers for these unlabelled images: leave --teacher out"
    assert done.err == f"--teacher {name}: {lacks}\n"
    (tmp_path / "x.yaml").write_text((tmp_path / "more.yaml").read_text())
    missing = kd_here(shell.folder, "distill", "x.yaml", "--set", "data.transfer=600")
    assert "kd train-teacher x.yaml --seed 0, or" in missing.err
