import contextlib
import fcntl
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MNIST_FILES, TINY, Done, Shell, kd_here
from rich.console import Console
from safetensors.torch import load_file

from kdcli.report.show import Table, say
from kdcli.runs.directory import open_run

COMMANDS = ("train-teacher", "ensemble", "distill", "omit-classes", "evaluate", "run")


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures, which take seconds."""
    monkeypatch.setattr("kdcli.report.page.pictures", lambda *_, **__: {})


@pytest.fixture
def kd(kd: Shell, trained: Shell) -> Shell:
    """A folder of the test's own that starts with the finished runs of tiny.yaml."""
    shutil.copytree(trained.folder / "runs", kd.folder / "runs")
    return kd


def here(kd: Shell, *words: str) -> Done:
    """A command in this process, which also trains."""
    return kd_here(kd.folder, *words, "--jobs", "1")


def only(folder: Path, command: str) -> Path:
    """The first run directory of a command: an ensemble of teachers, a student of a single teacher."""
    runs = sorted((folder / "runs" / "tiny" / command).iterdir())
    unwanted = {"ensemble": "tiny/baseline/", "distill": "tiny/ensemble/"}.get(command, "no run")
    return next(run for run in runs if unwanted not in (run / "config.yaml").read_text())


# What is wrong, the words after `kd`, and what the one line on stderr must hold.
MISTAKES: dict[str, tuple[str, str]] = {
    "no such command": ("distil tiny.yaml", "No such command 'distil'"),
    "no such option": ("distill tiny.yaml --Tt 3", "No such option: --Tt"),
    "not a number": ("distill tiny.yaml --T x", "kd: --T x: must be a number (see kd distill --help)"),
    "another tool's lambda1": ("distill tiny.yaml --alpha 0.9", "there is no option --alpha here: write --lambda1 ("),
    "another tool's T": ("run tiny.yaml --temperature=4", "--temperature here: write --set distill.T=… ("),
    "a rate of the student": ("distill tiny.yaml --lr 0.1", "--lr here: write --set student.train.lr=… ("),
    "a rate of the teacher": ("ensemble tiny.yaml --lr 0.1", "--lr here: write --set teacher.train.lr=… ("),
    "half a job": ("run tiny.yaml --jobs 1.5", "kd: --jobs 1.5: must be a whole number (see"),
    "an option without its value": ("distill tiny.yaml --seed", "kd: --seed: needs a value (see"),
    "a file that is no text": ("run own_image.yaml", "own_image.yaml: is not a text file: an experiment file is YAML"),
    "two teachers": (
        "distill tiny.yaml --with-teacher --teacher tiny/train-teacher/TEACHER",
        "--teacher --with-teacher: use one or the other",
    ),
    "classes from the end": (
        "omit-classes tiny.yaml --omit 9-0",
        "--omit 9-0: omit_classes.0.omit: there is no class 9-0",
    ),
    "the beginning of several runs": ("export ti/d/0", "ti/d/0: is the beginning of 2 runs:"),
    "no such experiment": ("distill mnst", "mnst: neither an experiment's name nor a .yaml file; did you mean mnist?"),
    "missing file": ("distill absent.yaml", "absent.yaml: there is no such experiment file"),
    "negative T": ("distill tiny.yaml --T -3", "--T -3: distill.T: must be greater than or equal to 0.001, not -3.0"),
    "lambda1 of -1": (
        "distill tiny.yaml --lambda1 -1",
        "--lambda1 -1: distill.lambda1: must be greater than or equal to 0",
    ),
    "lambda1 of 2": ("distill tiny.yaml --lambda1 2", "above 1 it needs a lambda2 too"),
    "misspelled --set": ("distill tiny.yaml --set distill.Temp=3", "--set distill.Temp=3: distill.Temp: unknown key"),
    "--set without =": ("distill tiny.yaml --set T", "write it as --set section.key=value"),
    "unknown class": ("omit-classes tiny.yaml --omit 11", "--omit 11: omit_classes.0.omit: there is no class 11"),
    "class by another name": ("omit-classes tiny.yaml --omit three", "there is no class three (known: 0, 1, 2, 3"),
    "omit and keep": (
        "omit-classes tiny.yaml --omit 3 --keep 7",
        "--omit 3 --keep 7: omit_classes.0: needs either omit or keep",
    ),
    "a class twice": ("omit-classes tiny.yaml --omit 3,3", "--omit 3,3: omit_classes.0.omit: names a class twice"),
    "all classes": (
        "omit-classes tiny.yaml --omit 0,1,2,3,4,5,6,7,8,9",
        "must leave one class out and one in",
    ),
    "no CUDA": ("distill tiny.yaml --device cuda:7", "--device cuda:7: this machine has"),
    "no such device": ("distill tiny.yaml --device gpu", "--device gpu: must be auto, cpu, cuda or cuda:N"),
    "bad seeds": ("distill tiny.yaml --seed 4-0", "--seeds 4-0: must be a seed, a range or a list"),
    "no threads": ("distill tiny.yaml --threads 0", "--threads 0: threads: must be greater than or equal to 1"),
    "teacher not trained": ("distill tiny.yaml --seed 5", "is missing; train it: kd train-teacher tiny.yaml --seed 5"),
    "teacher that is no run": ("distill tiny.yaml --teacher nonsense", "nonsense: there is no such run"),
    "teacher that is a student": (
        "distill tiny.yaml --teacher tiny/distill/STUDENT",
        "is a distill run; a teacher is a train-teacher or ensemble run",
    ),
    "teacher of other images": (
        "distill own.yaml --teacher tiny/train-teacher/TEACHER",
        "cannot be a teacher in this experiment: other images or classes",
    ),
    "runs folder is a file": (
        "train-teacher tiny.yaml --runs-dir tiny.yaml",
        "--runs-dir tiny.yaml: cannot be written",
    ),
    "dry run into a file": (
        "run tiny.yaml --dry-run --runs-dir tiny.yaml/runs",
        "--runs-dir tiny.yaml/runs: cannot be written: tiny.yaml: Not a directory",
    ),
    "teachers not trained": (
        "distill tiny.yaml --seeds 0,5-6",
        "(seeds 5-6), are missing; train them: kd train-teacher tiny.yaml --seed 5-6, or add",
    ),
    "a run elsewhere": (
        "distill tiny.yaml --runs-dir other --teacher runs/tiny/train-teacher/TEACHER",
        "lies outside the runs folder: add --runs-dir",
    ),
    "dry run of a teacher that is no run": (
        "distill tiny.yaml --dry-run --teacher nonsense",
        "--teacher nonsense: there is no such run",
    ),
    "dry run of a baseline as teacher": (
        "distill tiny.yaml --dry-run --teacher tiny/baseline/BASELINE",
        "is a baseline run; a teacher is a train-teacher or ensemble run",
    ),
    "dry run without the teacher": (
        "omit-classes tiny.yaml --dry-run --seed 5",
        "is missing; train it: kd train-teacher tiny.yaml --seed 5",
    ),
    "dry run without the images": (
        "run mnist --dry-run --data-dir nowhere",
        "nowhere: MNIST is missing, and --dry-run downloads nothing",
    ),
    "a report of what is not there": (
        "report tiny.yaml --seed 7",
        "train them: kd run tiny.yaml --seeds 7",
    ),
    "an empty name": ("run ''", "'': neither an experiment's name nor a .yaml file"),
    "nothing to check": ("run tiny.yaml --check", "--check: tiny.yaml has no expect section to check"),
    "nothing to evaluate": ("evaluate tiny.yaml --runs-dir none", "no finished runs; train some: kd run tiny.yaml"),
    "a run twice": (
        "evaluate tiny.yaml --run tiny/distill/STUDENT --run ti/d/STUDENT",
        "--run: names tiny/distill/STUDENT twice",
    ),
    "a folder called as a file": ("run fold.yaml", "fold.yaml: is a folder, not an experiment file"),
    "a file for a folder": ("init tiny.yaml", "tiny.yaml: is a file, not a folder"),
    "a table for arrays": (
        "run tiny.yaml --set data={arrays:\\ tiny.yaml}",
        "tiny.yaml: data.arrays is an .npz file: np.savez writes one",
    ),
    "half a normalisation": (
        "run tiny.yaml --set data.mean=[0.5]",
        "data.std: is missing: mean needs it",
    ),
    "no such run": ("evaluate tiny.yaml --run tiny/distill/0-ffffffffff", "there is no such run"),
    "one member": (
        "ensemble tiny.yaml --members 1",
        "--members 1: ensemble.members: must be greater than or equal to 2",
    ),
    "unknown average": (
        "ensemble tiny.yaml --average mean",
        "--average mean: ensemble.average: must be 'arithmetic' or 'geometric', not 'mean'",
    ),
    "no epochs": (
        "train-teacher tiny.yaml --epochs 0",
        "--epochs 0: teacher.train.epochs: must be greater than or equal to 1",
    ),
    "too many jobs wanted": ("run tiny.yaml --jobs 0", "kd: --jobs 0: must be 1 or more (see"),
    "a seed twice": ("run tiny.yaml --seeds 1,1", "--seeds 1,1: seed: names a seed twice: [1, 1]"),
    "a value of the wrong kind": (
        "run tiny.yaml --set teacher.train.lr=fast",
        "--set teacher.train.lr=fast: teacher.train.lr: must be a valid number, not 'fast'",
    ),
    "a section set to a word": (
        "run tiny.yaml --set distill=hot",
        "--set distill=hot: distill: must be a section of keys and values, not 'hot'",
    ),
    "broken value": ("run tiny.yaml --set seed=[1", "--set seed=[1: the value is not YAML"),
    "both lambdas 0": ("distill tiny.yaml --lambda1 0 --lambda2 0", "the student would learn nothing"),
    "a dataset that kd does not know": (
        "run tiny.yaml --set data.name=mnits",
        "data.name: must be digits, mnist or torchvision:CLASS, such as torchvision:CIFAR10, not 'mnits'; did you mean mnist?",
    ),
    "too few to transfer": (
        "distill tiny.yaml --set data.transfer=9",
        "--set data.transfer=9: data.transfer: 9 of 1297 images: must leave one of each of 10 classes",
    ),
    "more to transfer than there are": (
        "distill tiny.yaml --set data.transfer=1298",
        "--set data.transfer=1298: data.transfer: must be at most 1297",
    ),
    "too few held out": (
        "run tiny.yaml --set data.heldout=9",
        "--set data.heldout=9: data.heldout: 9 of 1297 images: must leave one of each of 10 classes",
    ),
    "a --set of the file's own value": (
        "distill tiny.yaml --set distill.T=4",
        "--set distill.T=4: changes nothing: that is its value already",
    ),
    "a --set that a flag beats": (
        "train-teacher tiny.yaml --set teacher.train.epochs=3 --epochs 4",
        "--set teacher.train.epochs=3: changes nothing: --epochs 4 beats it",
    ),
    "a --set for another command": (
        "train-teacher tiny.yaml --set distill.T=3",
        "--set distill.T=3: changes nothing that kd train-teacher does; it changes: student, student of ensemble, omit 3",
    ),
    "a --set for members where there are none": (
        "distill tiny.yaml --set ensemble.members=3",
        "changes nothing that kd distill does; it changes: ensemble, ensemble of baselines, student of ensemble",
    ),
    "a --set that takes a row of another command away": (
        "distill tiny.yaml --set omit_classes=[]",
        "changes nothing that kd distill does; it changes: omit 3",
    ),
    "a --set for an evaluation of what is there": (
        "evaluate tiny.yaml --set student.model.hidden=[7]",
        "changes nothing that kd evaluate does; it changes: baseline, ",
    ),
    "a name that leaves the runs folder": ("run tiny.yaml --set name=../x", "name: must begin with a letter or digit"),
    "too many held out": ("run tiny.yaml --set data.heldout=1000", "data.heldout: must be at most 432"),
    "an expectation of no row": (
        "run tiny.yaml --set expect={studnt:\\ 5}",
        "expect.studnt: is not a row of this experiment; did you mean student?",
    ),
    "an ensemble of nothing": (
        "run tiny.yaml --set ensemble=null --set distill.teacher=ensemble",
        "but there is no ensemble section",
    ),
    "a folder for an experiment": ("run ./", "./: neither an experiment's name nor a .yaml file"),
    "unknown order of runs": (
        "runs --sort date",
        "kd: --sort date: must be one of name, errors, age, size (see kd runs --help)",
    ),
    "removing what is no run": ("runs rm tiny/report", "tiny/report: there is no such run"),
    "removing what lies elsewhere": ("runs rm ../..", "../..: there is no such run"),
    "removing with nobody to ask": (
        "runs rm tiny/distill/STUDENT",
        "asks before it removes, and nobody is there to answer: add --yes",
    ),
    "a list that removes": ("runs --force", "--match, --sort and --json are of the list, --force and --yes of rm"),
    "removing a part of the list": (
        "runs rm tiny/distill/STUDENT --match x",
        "--match, --sort and --json are of the list, --force and --yes of rm",
    ),
    "removing nothing": ("runs rm --yes", "kd runs rm: name the runs to remove"),
    "no classes to omit": ("omit-classes tiny.yaml --set omit_classes=[]", "tiny.yaml: omit_classes: "),
    "no ensemble to train": ("ensemble tiny.yaml --set ensemble=null", "tiny.yaml: ensemble: "),
    "no such thing to do with runs": ("runs remove", "kd: remove: must be one of rm (see"),
    "removing a teacher in use": ("runs rm tiny/train-teacher/TEACHER", "these runs were made from them; remove them"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(mistake: str, kd: Shell) -> None:
    words, line = MISTAKES[mistake]
    words = words.replace("TEACHER", only(kd.folder, "train-teacher").name)
    words = words.replace("STUDENT", only(kd.folder, "distill").name)
    line = line.replace("STUDENT", only(kd.folder, "distill").name)
    (kd.folder / "fold.yaml").mkdir()
    words = words.replace("BASELINE", only(kd.folder, "baseline").name)
    (kd.folder / "own_image.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    before = sorted(kd.folder.rglob("*"))
    done = kd_here(kd.folder, *shlex.split(words))
    assert (done.code, done.out) == (2, "")
    assert sorted(kd.folder.rglob("*")) == before
    besides = ("  similar run: ", "  tiny/", "remove: ", "a net is made")
    *more, last = [line for line in done.err.splitlines() if not line.startswith(besides)]
    assert line in done.err
    assert all(extra.startswith("1 run, ") for extra in more), last


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_dry_run_says_that_runs_cannot_be_written(kd: Shell) -> None:
    (kd.folder / "shut").mkdir(0o555)
    told = [here(kd, "run", "tiny.yaml", "--runs-dir", "shut", *dry) for dry in ((), ("--dry-run",))]
    line = "--runs-dir shut: cannot be written: shut: Permission denied\n"
    assert [(done.code, done.out, done.err) for done in told] == [(2, "", line)] * 2


def test_a_broken_file_is_told_with_its_line(kd: Shell) -> None:
    (kd.folder / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: six", 1).replace("T: 4", "T: 4, T: 5"))
    done = kd_here(kd.folder, "distill", "tiny.yaml")
    assert done.code == 2
    assert done.err.splitlines() == [
        "tiny.yaml:11: distill.T: duplicate key, first given on line 11",
        "tiny.yaml:6: teacher.train.epochs: must be a valid integer, not 'six'",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("heldout: 200", "heldout: 9", "tiny.yaml:3: data.heldout: 9 of 1297 images: must leave one of each"),
        ("heldout: 200", "transfer: 9", "tiny.yaml:3: data.transfer: 9 of 1297 images: must leave one of each"),
        ("omit: [3]", "omit: [12]", "tiny.yaml:13: omit_classes.0.omit: there is no class 12"),
        (
            "jitter: 1",
            "jitter: 4",
            "tiny.yaml:6: teacher.train.jitter: must be less than half of the 8 x 8 pixels of the images",
        ),
    ],
)
def test_what_the_images_do_not_allow_is_told_with_its_line(old: str, new: str, line: str, kd: Shell) -> None:
    (kd.folder / "tiny.yaml").write_text(TINY.replace(old, new))
    done = kd_here(kd.folder, "run", "tiny.yaml")
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith(line)
    assert len(list((kd.folder / "runs/tiny").glob("*/*/config.yaml"))) == 9  # those of before


def test_classes_may_be_omitted_that_the_file_does_not_name(kd: Shell) -> None:
    """One that it names keeps its recipe; what it says of other rows stands in nobody's way."""
    own = TINY.replace("- omit: [3]\n", "- omit: [3]\n    train: {epochs: 1, lr: 0.1}\n  - omit: [4]\n")
    (kd.folder / "tiny.yaml").write_text(f"{own}paper: {{omit 4: 9}}\nexpect: {{omit 4: 99}}\n")
    for classes, epochs in (("3", 1), ("5,6", None)):
        done = kd_here(kd.folder, "omit-classes", "tiny.yaml", "--omit", classes, "--dry-run", "--json")
        assert done.code == 0, done.err
        (entry,) = done.json["resolved"]["omit_classes"]
        assert entry["omit"] == classes.split(",")
        assert entry.get("train", {}).get("epochs") == epochs


def test_a_set_that_an_entry_with_a_train_of_its_own_does_not_hear_is_refused(kd: Shell) -> None:
    own = TINY.replace("- omit: [3]\n", "- omit: [3]\n    train: {epochs: 1, lr: 0.1}\n")
    (kd.folder / "tiny.yaml").write_text(f"{own}baseline: {{train: {{epochs: 1, lr: 0.1}}}}\n")
    done = kd_here(kd.folder, "omit-classes", "tiny.yaml", "--set", "student.train.epochs=2")
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(
        "--set student.train.epochs=2: changes nothing that kd omit-classes does; it changes: student"
    )
    assert line.endswith("; set for nets with a train of their own: baseline.train.epochs, omit_classes.0.train.epochs")
    words = ("omit-classes", "tiny.yaml", "--json")
    assert here(kd, *words, "--set", "omit_classes.0.train.epochs=2").json["last_epoch"]["epoch"] == 2
    assert here(kd, *words, "--epochs", "3").json["last_epoch"]["epoch"] == 3


@pytest.mark.parametrize(
    "sets",
    [
        ["data.heldout=100"],
        ["data.transfer=500"],
        ["data.evaluate_on=heldout"],
        ["data={function: 'own_data.py:load'}", "omit_classes=[{omit: [dog]}]"],
        ["data.name=null", "data.function=own_data.py:load", "data.heldout=24", "omit_classes=[{omit: [dog]}]"],
    ],
)
def test_a_set_of_the_images_is_heard(sets: list[str], kd: Shell) -> None:
    words = [word for text in sets for word in ("--set", text)]
    done = kd_here(kd.folder, "run", "tiny.yaml", "--dry-run", "--json", *words)
    assert done.code == 0, done.err
    assert {run["run"] for run in done.json["runs"]} - set(run_names(kd))


def test_a_flag_beats_set_which_beats_the_grid_and_the_file(kd: Shell) -> None:
    text = TINY.replace("omit_classes:\n  - omit: [3]\n", "grid: {distill.T: [1, 8], student.train.lr: [0.1, 0.2]}\n")
    (kd.folder / "grid.yaml").write_text(text)

    def resolved(*words: str) -> dict[str, Any]:
        done = kd_here(kd.folder, *words, "--dry-run", "--json")
        assert done.code == 0, done.err
        return done.json

    section = ("--set", "distill={T: 6, lambda1: 0.5}")
    assert resolved("distill", "tiny.yaml", "--T", "5", *section)["resolved"]["distill"]["T"] == 5
    assert resolved("distill", "tiny.yaml", "--set", "distill.T=6")["resolved"]["distill"]["T"] == 6
    students = [run for run in resolved("run", "grid.yaml")["runs"] if run["row"] == "student"]
    by_hand = resolved("run", "grid.yaml", "--set", "distill.T=3")
    assert by_hand["resolved"]["distill"]["T"] == 3
    assert len(students) == 2 * len([run for run in by_hand["runs"] if run["row"] == "student"]) == 4
    both = ("--set", "distill.T=3", "--set", "student.train.lr=0.1")
    assert resolved("distill", "grid.yaml", *both)["resolved"]["student"]["train"]["lr"] == 0.1


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_teacher_stops_what_needs_it_alone(damage: str, kd: Shell) -> None:
    name, student = (f"tiny/{c}/{only(kd.folder, c).name}" for c in ("train-teacher", "distill"))
    weights = only(kd.folder, "train-teacher") / "weights.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(content[:100])
    done = kd_here(kd.folder, "distill", "tiny.yaml", "--T", "9")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert f"weights.safetensors: {'cannot be read' if damage == 'missing' else 'is damaged'}" in line
    assert line.endswith(f": remove it, kd runs rm {name} --force, and train it again")
    asked = kd_here(kd.folder, "predict", student, "--test-image", "0", "--json")
    assert asked.err == f"{student}: without its teacher's predictions: {line}\n"
    assert [view["net"] for view in asked.json["images"][0]["views"]] == ["net"]
    shown = here(kd, "evaluate", "tiny.yaml", "--json")
    ensemble = f"tiny/ensemble/{only(kd.folder, 'ensemble').name}"
    assert {f"left out: {run}: {line}" for run in (name, ensemble)} <= {*shown.err.splitlines()}
    rows = {run["run"]: run for run in shown.json["runs"]}
    assert len(shown.err.splitlines()) == len({*run_names(kd)} - {*rows}) + 1
    assert rows.keys() == {run for run in run_names(kd) if run not in (name, ensemble)}
    assert "teacher" not in rows[student]
    alone = here(kd, "evaluate", "tiny.yaml", "--run", student, "--json")
    assert alone.err.splitlines()[0] == f"left out: {name}: {line}"


def test_a_student_whose_teacher_is_gone_is_reported_without_it(kd: Shell) -> None:
    student, teacher = (f"tiny/{c}/{only(kd.folder, c).name}" for c in ("distill", "train-teacher"))
    assert kd_here(kd.folder, "runs", "rm", "--yes", "--force", teacher).code == 0
    done = kd_here(kd.folder, "report", student, "--json")
    assert done.code == 0, done.err
    assert [row["row"] for row in done.json["points"][0]["table"]] == ["baseline", "student"]
    assert f"Its teacher is not shown: {teacher}, or a member of it, is gone." in done.json["remarks"]


def test_the_experiment_of_a_name_is_told_from_the_file_beside_it(kd: Shell) -> None:
    shutil.copy(kd.folder / "tiny.yaml", kd.folder / "digits.yaml")
    note = "digits is kd's own experiment; for the file here type digits.yaml"
    own, file = (here(kd, "distill", name, "--dry-run") for name in ("digits", "digits.yaml"))
    assert own.err.splitlines()[0] == note
    assert note not in file.err


def test_a_mismatched_teacher_names_the_close_runs_and_what_to_type(kd: Shell) -> None:
    done = kd_here(kd.folder, "distill", "tiny.yaml", "--set", "teacher.train.lr=0.5", "--seed", "1")
    assert done.code == 2
    first, close, *_ = done.err.splitlines()
    typed = "train it: kd train-teacher tiny.yaml --set teacher.train.lr=0.5 --seed 1, or add --with-teacher (about "
    assert typed in first
    assert close.startswith("  similar run: tiny/train-teacher/1-")
    name = close.split()[2]
    assert close.endswith(f"{name} (completed), with train.lr 0.003 instead of 0.5 (to use it: --teacher {name})")


def test_a_missing_teacher_is_trained_first_where_that_is_asked_for(kd: Shell) -> None:
    words = ("distill", "tiny.yaml", "--seeds", "0,7", "--with-teacher", "--json")
    planned = kd_here(kd.folder, *words, "--dry-run").json["runs"]
    assert [(one["row"], one["run"].split("/")[2][0], one["status"]) for one in planned] == [
        ("teacher", "7", "missing"),
        ("baseline", "0", "completed"),
        ("baseline", "7", "missing"),
        ("student", "0", "completed"),
        ("student", "7", "missing"),
    ]
    found = here(kd, *words).json["runs"]
    assert [run["seed"] for run in found] == [0, 7]
    assert found[1]["teacher"]["run"] == planned[0]["run"]
    assert kd_here(kd.folder, "distill", "tiny.yaml", "--seeds", "7", "--json").code == 0
    of_ensemble = kd_here(
        kd.folder, *words, "--dry-run", "--set", "distill.teacher=ensemble", "--set", "ensemble.members=3"
    ).json["runs"]
    assert [one["row"] for one in of_ensemble[:2]] == ["member", "ensemble"]  # the third member, then all of them


def test_ranges_of_classes_and_beginnings_of_names_are_understood(kd: Shell) -> None:
    done = kd_here(kd.folder, "omit-classes", "tiny.yaml", "--keep", "7-8,1", "--dry-run", "--json")
    assert done.json["resolved"]["omit_classes"] == [{"keep": ["7", "8", "1"]}]
    (kd.folder / "own_data.py").write_text((kd.folder / "own_data.py").read_text().replace('"dog"', '"0-1"'))
    words = ("omit-classes", "own.yaml", "--omit", "0-1", "--dry-run", "--json", "--with-teacher")
    done = kd_here(kd.folder, *words)
    assert done.json["resolved"]["omit_classes"] == [{"omit": ["0-1"]}]
    (kd.folder / "runs/tinier/omit-classes").mkdir(parents=True)
    for start in ("tiny/omit-classes/0", "tiny/o/0", "t/omit/0"):
        assert kd_here(kd.folder, "predict", start, "--test-image", "1", "--json").json["run"].startswith("tiny/omit")


def test_mnist_that_is_absent_or_damaged_is_told_in_one_line(kd: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.delenv("KD_DATA", raising=False)
    done = kd_here(kd.folder, "train-teacher", "mnist", "--data-dir", "nowhere")
    assert done.code == 2
    assert "MNIST is missing and could not be downloaded" in done.err
    assert "digits" in done.err
    raw = kd.folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (60_000, 28, 28))
    for name in MNIST_FILES:
        (raw / f"{name}-ubyte").write_bytes(header + b"\0" * 1000)
    done = kd_here(kd.folder, "train-teacher", "mnist")
    assert done.code == 2
    assert "MNIST is damaged or cannot be read" in done.err
    assert len(done.err.splitlines()) == 1


def test_help_and_version(kd: Shell) -> None:
    for words in ([], ["--help"]):
        done = kd_here(kd.folder, *words)
        assert done.code == 0
        assert all(command in done.out for command in COMMANDS)
    assert kd("--version").out.startswith("kd ")
    assert "--lambda1" in kd_here(kd.folder, "distill", "--help").out


def test_usage_never_imports_torch() -> None:
    code = "import sys; sys.argv = ['kd', '--help']\ntry: from kdcli.cli import main; main()\nfinally: print([m for m in ('torch', 'torchvision', 'matplotlib', 'sklearn', 'scipy') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_without_posix_locks_one_sentence_says_where_kd_runs() -> None:
    code = "import sys; sys.modules['fcntl'] = None\nfrom kdcli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("kd: runs on Linux and macOS")


def test_dry_run_shows_the_resolved_experiment_and_writes_nothing(kd: Shell) -> None:
    before = sorted(kd.folder.rglob("*"))
    done = kd_here(kd.folder, "distill", "tiny.yaml", "--dry-run", "--set", "distill.T=7")
    assert done.code == 0, done.err
    loss = {"teacher": "teacher", "T": 7.0, "lambda1": 0.9, "lambda2": 0.1, "t_squared": True, "half": False}
    loss |= {"loss": "kd", "standardize": False, "warmup": 0.0}
    assert yaml.safe_load(done.out.partition("# device")[0])["distill"] == loss
    assert "2 runs, of which 1 is completed" in done.out
    document = kd_here(kd.folder, "run", "tiny.yaml", "--dry-run", "--json", "--set", "distill.T=7").json
    assert document["resolved"]["distill"] == loss
    runs = {run["row"]: run for run in document["runs"]}
    assert set(runs) == {
        "teacher", "member", "baseline", "member of the baselines", "ensemble", "ensemble of baselines", "student",
        "student of ensemble", "omit 3",
    }  # fmt: skip
    assert [runs[row]["status"] for row in ("teacher", "student")] == ["completed", "missing"]
    assert (runs["teacher"]["parameters"], runs["teacher"]["steps"]) == (4810, 156)
    assert runs["student"]["parameters"] == 65 * 16 + 17 * 10
    assert "steps" not in runs["ensemble"]
    evaluated = kd_here(kd.folder, "evaluate", "tiny.yaml", "--dry-run", "--json").json["runs"]
    assert sorted(run["run"] for run in evaluated) == run_names(kd)
    assert sorted(kd.folder.rglob("*")) == before


def test_a_dry_run_on_a_pipe_shows_every_column(trained: Shell) -> None:
    out = kd_here(trained.folder, "run", "tiny.yaml", "--dry-run").out
    assert all(column in out for column in ("parameters", "steps", "status"))
    assert out.count("completed") == 1 + 9  # in the title, and of each run


def run_names(kd: Shell) -> list[str]:
    """The names of all runs in a folder."""
    folders = (file.parent for file in (kd.folder / "runs").glob("*/*/*/config.yaml"))
    return sorted("/".join(folder.parts[-3:]) for folder in folders)


@pytest.mark.usefixtures("quick_reports")
def test_a_dry_run_is_exactly_what_is_trained_afterwards(kd: Shell) -> None:
    shutil.rmtree(kd.folder / "runs")
    (kd.folder / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: 2"))
    for command, *words in (
        ("train-teacher", "--seeds", "0-1"),
        ("ensemble", "--members", "3"),
        ("distill", "--seeds", "0-1"),
        ("omit-classes", "--keep", "7,8"),
        ("run", "--seeds", "0-2", "--set", "data.transfer=500"),
        ("distill", "--set", "distill.teacher=ensemble", "--no-baseline", "--epochs", "1"),
    ):
        planned = kd_here(kd.folder, command, "tiny.yaml", *words, "--dry-run", "--json").json["runs"]
        before = run_names(kd)
        done = here(kd, command, "tiny.yaml", *words)
        assert done.code == 0, done.err
        made = set(run_names(kd)) - set(before)
        assert made == {run["run"] for run in planned if run["status"] == "missing"}
        assert {run["run"] for run in planned if run["status"] == "completed"} <= set(before)
        for run in planned:
            folder = kd.folder / "runs" / run["run"]
            result = json.loads((folder / "result.json").read_text())
            assert ("steps" in run) == (result["command"] != "ensemble")
            if "steps" in run:
                assert run["samples"] == result["samples"]
                assert run["steps"] == result["last_epoch"]["epoch"] * math.ceil(result["samples"] / run["batch_size"])
                weights = load_file(folder / "weights.safetensors")
                assert run["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_a_dry_run_of_an_evaluation_is_exactly_what_is_evaluated(kd: Shell) -> None:
    other_recipe = here(kd, "distill", "tiny.yaml", "--no-baseline", "--epochs", "1", "--json").json["run"]
    planned, evaluated = (
        {run["run"] for run in kd_here(kd.folder, "evaluate", "tiny.yaml", "--json", *words).json["runs"]}
        for words in (("--dry-run",), ())
    )
    assert planned == evaluated == set(run_names(kd))
    assert other_recipe in planned


# Housekeeping.


def test_runs_are_listed_with_status_errors_age_and_size(kd: Shell) -> None:
    broken = only(kd.folder, "baseline")
    (broken / "config.yaml").write_text("?")
    listed = {d["run"]: d for d in kd_here(kd.folder, "runs", "--json").json["runs"]}
    assert len(listed) == len(list((kd.folder / "runs/tiny").glob("*/*/config.yaml")))
    damaged = listed["/".join(broken.parts[-3:])]
    assert (damaged["status"], damaged.get("errors")) == ("damaged", None)
    folder = only(kd.folder, "distill")
    student = listed["/".join(folder.parts[-3:])]
    assert student["status"] == "completed"
    assert student["errors"] == json.loads((folder / "result.json").read_text())["test"]["errors"]
    assert student["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert 0 <= student["age_s"] < 3600
    errors = [
        d["errors"]
        for d in kd_here(kd.folder, "runs", "--json", "--sort", "errors", "--match", "completed").json["runs"]
    ]
    assert errors == sorted(errors)
    text = kd_here(kd.folder, "runs", "--match", "distill").out
    assert folder.name in text
    assert "train-teacher" not in text
    assert kd_here(kd.folder, "runs", "--runs-dir", "none").err == "--runs-dir none: there is no such folder\n"


def test_runs_of_before_are_listed_and_refused_in_one_line(kd: Shell) -> None:
    folder = kd.folder / "runs/tiny/train-teacher/0-0123456789"
    shutil.copytree(only(kd.folder, "train-teacher"), folder)
    (folder / "config.yaml").write_text(
        "experiment: tiny\ncommand: train-teacher\nseed: 0\nparents: []\nsettings: {}\n"
    )
    listed = {d["run"]: d["status"] for d in kd_here(kd.folder, "runs", "--json").json["runs"]}
    assert listed.pop("tiny/train-teacher/0-0123456789") == "damaged"
    assert set(listed.values()) == {"completed"}
    line = "config.yaml: is of another kd (its runs have schema 1, this one's 2): remove it, kd runs rm "
    for words in (
        ("distill", "tiny.yaml", "--teacher", "tiny/train-teacher/0-0123456789"),
        ("predict", "tiny/train-teacher/0-0123456789", "--test-image", "0"),
        ("report", "tiny/train-teacher/0-0123456789"),
    ):
        done = kd_here(kd.folder, *words)
        assert (done.code, done.out) == (2, "")
        assert line in done.err
        assert len(done.err.splitlines()) == 1
    evaluated = kd_here(kd.folder, "evaluate", "tiny.yaml", "--json", "--seed", "0")
    assert {run["seed"] for run in evaluated.json["runs"]} == {0}
    assert len([said for said in evaluated.err.splitlines() if line in said]) == 1


def test_a_run_that_others_need_is_removed_only_by_force(kd: Shell) -> None:
    teacher, student = only(kd.folder, "train-teacher"), only(kd.folder, "distill")
    refused = kd_here(kd.folder, "runs", "rm", str(teacher), "--yes")
    assert refused.code == 2
    assert f"  tiny/distill/{student.name}" in refused.err.splitlines()
    assert f"  tiny/ensemble/{only(kd.folder, 'ensemble').name}" in refused.err.splitlines()
    assert teacher.exists()
    forced = kd_here(kd.folder, "runs", "rm", str(teacher), "--yes", "--force")
    assert forced.code == 0, forced.err
    assert f"orphaned: tiny/distill/{student.name}" in forced.err.splitlines()
    assert not teacher.exists()
    assert kd_here(kd.folder, "runs", "rm", f"tiny/distill/{student.name}", "--yes").code == 0
    assert not student.exists()


def test_a_run_goes_with_all_that_was_made_from_it(kd: Shell) -> None:
    runs = [str(path.relative_to(kd.folder)) for path in (kd.folder / "runs/tiny").glob("*/*") if path.is_dir()]
    shutil.rmtree(kd.folder / "runs/tiny/report")
    done = kd_here(kd.folder, "runs", "rm", "--yes", *runs)
    assert done.code == 0, done.err
    assert not list((kd.folder / "runs").iterdir())


def test_removal_takes_all_or_nothing_and_no_options_get_lost(kd: Shell) -> None:
    one, other = (path for path in sorted((kd.folder / "runs/tiny/distill").iterdir()))
    with (other / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the kd that trains it does
        done = kd_here(kd.folder, "runs", "rm", "--yes", str(one), str(other))
    assert done.code == 2
    assert "is being written by a kd: stop that first; nothing was removed" in done.err
    assert one.exists()
    assert kd_here(kd.folder, "runs", "--runs-dir", "elsewhere", "rm", "--yes", str(one)).code == 2
    assert one.exists()


def test_a_student_of_other_weights_than_its_teacher_has_now_is_told(kd: Shell) -> None:
    teacher = only(kd.folder, "train-teacher")
    run = open_run(kd.folder / "runs", str(teacher))
    result = run.result()
    assert kd_here(kd.folder, "runs", "rm", "--yes", "--force", str(teacher)).code == 0
    assert here(kd, "train-teacher", "tiny.yaml").code == 0
    assert here(kd, "distill", "tiny.yaml").code == 0  # the same weights again
    run.save("weights", {name: tensor + 1 for name, tensor in run.load("weights").items()})
    run.finish(result)
    for words in ((), ("--dry-run",)):
        done = here(kd, "distill", "tiny.yaml", *words)
        assert done.code == 2
        assert "was made from other weights than tiny/train-teacher/" in done.err


def test_a_log_has_a_line_a_run_or_more_or_none(kd: Shell) -> None:
    for seed, (word, epochs) in enumerate({"--jobs=1": ["3/3"], "-v": ["1/3", "2/3", "3/3"], "-q": []}.items(), 7):
        done = kd_here(kd.folder, "train-teacher", "tiny.yaml", "--epochs", "3", "--seed", str(seed), word)
        assert done.code == 0, done.err
        assert re.findall(r": epoch (\S+),", done.err) == epochs


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_table_keeps_every_word_whole(width: int) -> None:
    """Of headings too; columns without room follow below, and none is lost."""
    names = ["", *(f"heading-{i} two" for i in range(9))]
    cells = [[f"tiny/omit-classes/{i}", *(f"{i}{k}-whole {i}.{k}" for k in range(9))] for i in range(2)]
    console = Console(file=io.StringIO(), width=width)
    console.print(Table("Errors", names, cells))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert {word for row in (names, *cells) for cell in row for word in cell.split()} <= set(" ".join(lines).split())
    assert max(map(len, lines)) <= width


def test_a_terminal_breaks_prose_between_words_and_no_command() -> None:
    prose, command = (
        "B helped: 5.4 fewer errors (3.7 to 7.1 fewer)",
        "next: kd report digits/baseline --runs-dir elsewhere",
    )
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=20, force_terminal=terminal)
        for line in (prose, command):
            say(console, line)
        shown[terminal] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    *broken, last = shown[True]
    assert max(map(len, broken)) <= 20 < len(prose)
    assert " ".join(" ".join(broken).split()) == prose
    assert last == command
    assert shown[False] == [prose, command]


def test_a_terminal_shows_a_bar_a_run(kd: Shell) -> None:
    import pty

    ours, theirs = pty.openpty()
    words = ["train-teacher", "tiny.yaml", "--seeds", "5-6", "--epochs", "20", "--jobs", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", *words], cwd=kd.folder, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 65536):
                shown += chunk
    assert process.returncode == 0, shown.decode()
    assert b"train-teacher/5-" in shown
    assert b"epoch 20/20" in shown
    assert b"\xe2\x94\x81" in shown  # a bar


@pytest.mark.parametrize(("answer", "stays"), [("y", False), ("n", True), ("", True)])
def test_removal_asks_first(kd: Shell, answer: str, stays: bool) -> None:
    import pty

    run, (ours, theirs) = only(kd.folder, "distill"), pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", "runs", "rm", str(run)], cwd=kd.folder, stdin=theirs, stderr=subprocess.PIPE
    ) as process:
        os.write(ours, f"{answer}\n".encode())
        _, errors = process.communicate()
    assert process.returncode == 0
    assert b"Remove them? [y/N]" in errors
    assert run.exists() == stays


# What the finished experiment looks like.


def test_run_ends_with_one_table_and_a_verdict(trained: Shell) -> None:
    document = json.loads((trained.folder / "run.json").read_text())
    (point,) = document["points"]
    rows = {row["row"]: row for row in point["table"]}
    assert list(rows) == [
        "teacher",
        "ensemble",
        "baseline",
        "ensemble of baselines",
        "student",
        "student of ensemble",
        "omit 3",
        "omit 3, test bias",
        "omit 3, heldout bias",
        "omit 3, prior bias",
    ]
    assert point["verdict"]["verdict"] in ("helped", "hurt", "no evidence")
    assert point["verdict"]["fewer_errors"] == rows["baseline"]["mean"] - rows["student"]["mean"]
    folder = trained.folder / "runs" / "tiny" / "report"
    assert json.loads((folder / "report.json").read_text()) == document
    for name in ("errors.png", "learning-curves.png", "omitted-classes.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "| student |" in (folder / "report.md").read_text()


@pytest.mark.usefixtures("quick_reports")
def test_asking_again_prints_the_finished_run(kd: Shell, trained: Shell) -> None:
    before = {path: path.stat().st_mtime_ns for path in (kd.folder / "runs").rglob("*.safetensors")}
    again = here(kd, "run", "tiny.yaml", "--json")
    assert again.code == 0
    assert "finished before" in again.err
    assert "epoch" not in again.err
    first = json.loads((trained.folder / "run.json").read_text())
    assert again.json["points"][0]["table"] == first["points"][0]["table"]
    assert {path: path.stat().st_mtime_ns for path in (kd.folder / "runs").rglob("*.safetensors")} == before


def epochs(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run but for the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in lines]


def test_the_same_seed_gives_the_same_weights(kd: Shell, trained: Shell) -> None:
    shutil.rmtree(kd.folder / "runs")
    assert here(kd, "train-teacher", "tiny.yaml").code == 0
    assert here(kd, "distill", "tiny.yaml").code == 0
    for command in ("train-teacher", "baseline", "distill"):
        one, two = (only(folder, command) for folder in (kd.folder, trained.folder))
        assert one.name == two.name
        assert (one / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()
        assert epochs(one) == epochs(two)


KEYS = {"command", "experiment", "run", "seed", "status", "device", "seconds", "test"}


def test_json_documents_hold_what_they_promise(kd: Shell) -> None:
    teacher = here(kd, "train-teacher", "tiny.yaml", "--json").json
    assert teacher.keys() >= KEYS
    assert (teacher["row"], teacher["kind"]) == ("teacher", "teacher")
    assert teacher["status"] == "completed"
    assert teacher["test"]["total"] == 500
    assert sum(teacher["test"]["per_class_errors"]) == teacher["test"]["errors"]
    student = here(kd, "distill", "tiny.yaml", "--json").json
    assert (student["row"], student["kind"]) == ("student", "student")
    assert (student["teacher"]["run"], student["teacher"]["errors"]) == (teacher["run"], teacher["test"]["errors"])
    assert student["baseline"]["run"].startswith("tiny/baseline/0-")
    assert (
        student["baseline"]["errors"] - student["test"]["errors"]
        == student["baseline"]["fixed"] - student["baseline"]["broken"]
    )
    assert "baseline" not in kd_here(kd.folder, "distill", "tiny.yaml", "--json", "--no-baseline").json
    omitted = here(kd, "omit-classes", "tiny.yaml", "--json", "--omit", "3").json
    assert (omitted["row"], omitted["kind"], omitted["omitted"]) == ("omit 3", "omission", ["3"])
    assert omitted["bias"].keys() == {"test", "heldout", "prior"}
    for bias in omitted["bias"].values():
        assert bias.keys() == {"shift", "added_to", "errors", "per_class_errors"}
        assert bias["added_to"] == ["3"]
    assert omitted["bias"]["test"]["errors"] <= min(omitted["test"]["errors"], omitted["bias"]["prior"]["errors"])
    several = here(kd, "train-teacher", "tiny.yaml", "--json", "--seeds", "0-1").json
    assert [run["seed"] for run in several["runs"]] == [0, 1]


def test_omitted_classes_and_heldout_images_are_outside_the_transfer_set(trained: Shell) -> None:
    result = json.loads((only(trained.folder, "omit-classes") / "result.json").read_text())
    threes, heldout_threes = 132, 20  # of 1,297 and of 200: see the split's shares in test_data
    assert result["samples"] == pytest.approx(1297 - 200 - threes + heldout_threes, abs=3)


def test_an_ensemble_reports_members_both_averages_and_its_gain(kd: Shell) -> None:
    arithmetic = here(kd, "ensemble", "tiny.yaml", "--json").json
    geometric = here(kd, "ensemble", "tiny.yaml", "--json", "--average", "geometric").json
    assert arithmetic["run"] != geometric["run"]
    assert arithmetic["members"] == geometric["members"]
    assert arithmetic["averages"] == geometric["averages"]
    assert geometric["test"] == geometric["averages"]["geometric"]
    errors = [member["errors"] for member in arithmetic["members"]]
    gain = arithmetic["fewer_errors_than"]
    assert gain == {
        "best_member": min(errors) - arithmetic["test"]["errors"],
        "mean_member": sum(errors) / 2 - arithmetic["test"]["errors"],
    }


def test_either_ensemble_can_be_distilled(kd: Shell) -> None:
    options = ("--json", "--no-baseline", "--set", "distill.teacher=ensemble")
    described = here(kd, "distill", "tiny.yaml", *options).json
    assert described["teacher"]["run"].startswith("tiny/ensemble/0-")
    missing = kd_here(kd.folder, "distill", "tiny.yaml", *options, "--set", "ensemble.average=geometric")
    assert missing.code == 2
    assert "train it: kd ensemble tiny.yaml --set ensemble.average=geometric --seed 0" in missing.err
    geometric = here(kd, "ensemble", "tiny.yaml", "--average", "geometric", "--json").json["run"]
    named = here(kd, "distill", "tiny.yaml", "--json", "--no-baseline", "--teacher", geometric).json
    assert named["teacher"]["run"] == geometric
    one, two = (load_file(kd.folder / "runs" / d["run"] / "weights.safetensors") for d in (described, named))
    assert any(bool((one[key] != two[key]).any()) for key in one)


def test_an_ensemble_of_different_models(kd: Shell) -> None:
    done = here(kd, "ensemble", "tiny.yaml", "--json", "--set", "ensemble.models=[{hidden: [8]}, {hidden: [12]}]")
    assert done.code == 0, done.err
    widths = [
        yaml.safe_load((kd.folder / "runs" / m["run"] / "config.yaml").read_text())["model"]["hidden"]
        for m in done.json["members"]
    ]
    assert widths == [[8], [12]]


def test_a_jittered_student_asks_its_teacher_anew(kd: Shell) -> None:
    done = here(kd, "distill", "tiny.yaml", "--json", "--no-baseline", "--set", "student.train.jitter=1")
    assert done.code == 0, done.err
    assert done.json["run"] != kd_here(kd.folder, "distill", "tiny.yaml", "--json").json["run"]


def test_few_training_images_are_not_tested_every_epoch(kd: Shell) -> None:
    """100 of 500 test images: after five epochs, and after the last. More of them than test images: after each."""
    few = here(kd, "distill", "tiny.yaml", "--json", "--set", "data.transfer=100").json["run"]
    tested: dict[str, list[int]] = {}
    for run in (
        few,
        *(f"tiny/train-teacher/{path.name}" for path in (kd.folder / "runs/tiny/train-teacher").iterdir()),
    ):
        epochs = [json.loads(line) for line in (kd.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        tested[run] = [epoch["epoch"] for epoch in epochs if "test_errors" in epoch]
        result = json.loads((kd.folder / "runs" / run / "result.json").read_text())
        assert epochs[-1]["test_errors"] == result["test"]["errors"]
    assert tested.pop(few) == [5, 6]
    assert set(map(tuple, tested.values())) == {(1, 2, 3, 4, 5, 6)}


def test_in_a_long_training_each_line_says_after_which_epoch_errors_were_counted(kd: Shell) -> None:
    """Of 40 epochs after every second one."""
    done = here(kd, "train-teacher", "tiny.yaml", "-v", "--set", "teacher.train.epochs=40")
    errors = [
        found[1] for line in done.err.splitlines() if (found := re.search(r"epoch \d+/40, loss [^,]+, ([^,]+)", line))
    ]
    assert len(errors) == 40
    assert errors[0] == "not tested"
    assert all(re.fullmatch(r"\d+ errors", counted) for counted in errors[1::2])
    assert errors[2::2] == [f"{counted} after epoch {2 * i}" for i, counted in enumerate(errors[1:-1:2], 1)]


def test_what_reads_the_json_may_go_before_the_report_is_written(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    shutil.copy(trained.folder / "tiny.yaml", tmp_path)
    shutil.rmtree(tmp_path / "runs/tiny/report")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "kdcli", "report", "tiny.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert "wrote runs/tiny/report: report.html" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_agrees_with_what_training_counted(kd: Shell) -> None:
    document = kd_here(kd.folder, "evaluate", "tiny.yaml", "--json").json
    assert {run["command"] for run in document["runs"]} == {
        "train-teacher",
        "ensemble",
        "baseline",
        "distill",
        "omit-classes",
    }
    for run in document["runs"]:
        result = json.loads((kd.folder / "runs" / run["run"] / "result.json").read_text())
        assert run["test"] == result["test"]
        assert sum(map(sum, run["quality"]["confusion"])) == 500
        assert run["cost"]["weight_bytes"] == 4 * run["cost"]["parameters"]
        assert ("teacher" in run) == (run["command"] in ("baseline", "distill", "omit-classes"))
    ensembles = [run["cost"]["parameters"] for run in document["runs"] if run["command"] == "ensemble"]
    assert sorted(ensembles) == [2 * 1210, 2 * 4810]
    text = kd_here(kd.folder, "evaluate", "tiny.yaml", "--run", document["runs"][0]["run"])
    two = kd_here(kd.folder, "evaluate", "tiny.yaml", "--run", document["runs"][0]["run"], "--threads", "2", "--json")
    assert two.json["runs"][0]["cost"]["measured_on"] == "cpu, 2 threads"
    assert "Where the errors are" in text.out


def test_evaluation_leaves_out_what_it_cannot_score_and_says_so(kd: Shell) -> None:
    assert here(kd, "train-teacher", "tiny.yaml", "--set", "data.evaluate_on=heldout").code == 0
    member = next((kd.folder / "runs/tiny/train-teacher").glob("1-*"))
    shutil.rmtree(member)
    copy = only(kd.folder, "distill")
    shutil.copytree(copy, copy.with_name("0-copy"))
    done = here(kd, "evaluate", "tiny.yaml", "--json")
    assert done.code == 0, done.err
    commands = ["baseline", "baseline", "distill", "distill", "ensemble", "omit-classes", "train-teacher"]
    assert sorted(run["command"] for run in done.json["runs"]) == commands
    for reason in (
        "data.evaluate_on heldout instead of test",
        f"its member tiny/train-teacher/{member.name} is gone",
        "is missing, damaged, or of another run",
    ):
        assert reason in done.err
    assert here(kd, "evaluate", "tiny.yaml", "--seeds", "4").code == 2


def test_a_student_does_not_start_from_its_teachers_weights(kd: Shell) -> None:
    same = ["--set", "student.model={hidden: [64]}", "--set", "student.train={epochs: 1, lr: 1e-30}"]
    still = ["--set", "teacher.model={hidden: [64]}", "--set", "teacher.train={epochs: 1, lr: 1e-30}"]
    assert here(kd, "train-teacher", "tiny.yaml", *still, "--runs-dir", "still").code == 0
    student = here(kd, "distill", "tiny.yaml", *same, *still, "--runs-dir", "still", "--json").json
    start = {
        name: load_file(kd.folder / "still" / run / "weights.safetensors")["layers.0.weight"]
        for name, run in (
            ("student", student["run"]),
            ("teacher", student["teacher"]["run"]),
            ("baseline", student["baseline"]["run"]),
        )
    }
    assert bool((start["student"] == start["baseline"]).all())
    assert not bool((start["student"] == start["teacher"]).any())


def test_what_does_not_fit_follows_beside_all_that_tells_rows_apart() -> None:
    out = io.StringIO()
    console = Console(file=out, width=24)
    console.print(
        Table("", ["T", "lr", "errors", "verdict"], [["1", "0.1", "12.5", "helped"], ["1", "0.2", "9", "hurt"]], 2)
    )
    lines = [line.split() for line in out.getvalue().splitlines() if "─" not in line and line.strip()]
    assert lines == [
        ["T", "lr", "errors"],
        ["1", "0.1", "12.5"],
        ["1", "0.2", "9"],
        ["T", "lr", "verdict"],
        ["1", "0.1", "helped"],
        ["1", "0.2", "hurt"],
    ]


@pytest.mark.usefixtures("quick_reports")
def test_check_exits_with_3_where_an_expectation_is_missed(kd: Shell) -> None:
    met = kd_here(kd.folder, "run", "tiny.yaml", "--check", "--set", "expect={student: 500}")
    assert met.code == 0, met.err
    missed = kd_here(kd.folder, "run", "tiny.yaml", "--check", "--set", "expect={student: 0}")
    assert missed.code == 3
    assert "expect.student: " in missed.err
    assert kd_here(kd.folder, "run", "tiny.yaml", "--set", "expect={student: 0}").code == 0


def test_epochs_reach_the_baseline_with_a_recipe_of_its_own(kd: Shell) -> None:
    own = "baseline: {train: {epochs: 5, batch_size: 50, lr: 0.1}}\n"
    (kd.folder / "tiny.yaml").write_text(TINY + own)
    student = here(kd, "distill", "tiny.yaml", "--epochs", "2", "--json").json
    for run in (student["run"], student["baseline"]["run"]):
        assert len((kd.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_leaves_130_and_a_run_that_can_be_asked_for_again(kd: Shell) -> None:
    words = ["train-teacher", "tiny.yaml", "-v", "--set", "teacher.train.epochs=100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", *words], cwd=kd.folder, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        process.stderr.readline()  # the first epoch is done
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "interrupted" in process.stderr.read()
    results = [json.loads(p.read_text()) for p in (kd.folder / "runs/tiny/train-teacher").glob("0-*/result.json")]
    assert sorted(result["status"] for result in results) == ["completed", "interrupted"]
    done = kd_here(kd.folder, "distill", "tiny.yaml", "--set", "teacher.train.epochs=100000")
    assert done.code == 2
    assert "is interrupted; train it: kd train-teacher" in done.err


def test_the_next_command_works_as_it_is_suggested(kd: Shell) -> None:
    """Flags of one command are not passed on to another, and a report is suggested where it would succeed."""
    for words in (
        "train-teacher tiny.yaml --epochs 2",
        "ensemble tiny.yaml --members 3 --average geometric --epochs 1 --jobs 1",
    ):
        done = kd_here(kd.folder, *words.split())
        assert done.code == 0, done.err
        suggested = done.err.partition("next: kd ")[2].splitlines()[0]
        then = kd_here(kd.folder, *shlex.split(suggested), "--no-baseline")
        assert then.code == 0, then.err
        assert "finished before" not in then.err
    assert "next:" not in kd_here(kd.folder, "evaluate", "tiny.yaml", "--set", "teacher.train.epochs=2").err


def test_a_flag_that_says_what_the_file_says_is_not_retyped(kd: Shell) -> None:
    done = kd_here(kd.folder, "ensemble", "tiny.yaml", "--members", "2", "--epochs", "6")
    suggested = done.err.partition("next: kd ")[2].splitlines()[0]
    assert suggested == "distill tiny.yaml --set distill.teacher=ensemble"
    assert kd_here(kd.folder, *suggested.split()).code == 0


def test_what_students_alone_have_is_not_passed_on_to_their_teacher(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    for words in ("distill tiny.yaml --set data.transfer=600", "omit-classes tiny.yaml --set data.heldout=150"):
        done = kd_here(tmp_path, *words.split())
        assert "train it: kd train-teacher tiny.yaml --seed 0, or" in done.err
    words = "omit-classes tiny.yaml --set data.evaluate_on=heldout --set data.heldout=150"
    done = kd_here(tmp_path, *words.split())
    assert "tiny.yaml --set data.evaluate_on=heldout --set data.heldout=150 --seed 0" in done.err


def test_epochs_of_an_ensemble_are_those_of_its_listed_members(kd: Shell) -> None:
    own = "{model: {hidden: [8]}, train: {epochs: 4, batch_size: 50, lr: 0.1}}"
    words = ["ensemble", "tiny.yaml", "--set", f"ensemble={{members: [{own}, {own}]}}", "--dry-run", "--json"]
    shown = kd_here(kd.folder, *words, "--epochs", "1").json["resolved"]
    assert [member["train"]["epochs"] for member in shown["ensemble"]["members"]] == [1, 1]
    assert shown["teacher"]["train"]["epochs"] == 6


def test_a_teacher_of_a_file_that_asks_its_ensemble_is_followed_by_that(kd: Shell) -> None:
    (kd.folder / "all.yaml").write_text(TINY.replace("distill: {", "distill: {teacher: ensemble, "))
    assert "next: kd ensemble all.yaml\n" in kd_here(kd.folder, "train-teacher", "all.yaml").err


def test_no_key_is_named_that_the_command_would_refuse(kd: Shell) -> None:
    for words in ("ensemble tiny.yaml --T 5", "train-teacher tiny.yaml --alpha 0.5", "evaluate tiny.yaml --T 5"):
        done = kd_here(kd.folder, *words.split())
        assert done.code == 2
        assert "--set" not in done.err


def test_what_is_expected_of_the_teacher_is_expected_whatever_is_omitted(kd: Shell) -> None:
    words = ["--set", "expect={teacher: 9, 'omit 3': 90}", "--dry-run", "--json"]
    assert kd_here(kd.folder, "omit-classes", "tiny.yaml", "--omit", "3", *words).json["resolved"]["expect"] == {
        "teacher": 9.0
    }


def test_the_teacher_of_a_point_of_a_grid_is_asked_for_at_that_point(kd: Shell) -> None:
    """`--set` of a key with points in its name: that of a grid."""
    (kd.folder / "grid.yaml").write_text(TINY.replace("omit_classes:\n  - omit: [3]\n", ""))
    walk = ["--set", "grid.distill.T=[1, 8]", "--dry-run", "--json"]
    assert kd_here(kd.folder, "run", "grid.yaml", *walk).json["resolved"]["grid"] == {"distill.T": [1, 8]}
    with (kd.folder / "grid.yaml").open("a") as file:
        file.write("grid: {distill.T: [1, 8]}\n")
    done = kd_here(kd.folder, "distill", "grid.yaml", "--T", "1", "--seed", "5")
    typed = "kd train-teacher grid.yaml --set distill.T=1.0 --seed 5"
    assert f"{typed}, or" in done.err
    assert kd_here(kd.folder, *shlex.split(typed)[1:], "--dry-run").code == 0


def test_of_close_runs_none_is_named_that_cannot_be_used(kd: Shell) -> None:
    words = "--set distill.teacher=ensemble --set ensemble.average=geometric"
    done = kd_here(kd.folder, "distill", "tiny.yaml", *words.split())
    (name,) = re.findall(r"--teacher (\S+)\)", done.err)
    assert kd_here(kd.folder, "distill", "tiny.yaml", "--teacher", name, "--dry-run").code == 0
