"""Any input, however wrong, is a valid run or one clear error: exit code 2, no traceback, nothing hangs."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import TINY, Done, Shell
from conftest import kd_here as kd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdcli import BadInput, score, yamlfile

BRIEF = settings(max_examples=150, deadline=None)


def is_clear(done: Done, *codes: int) -> bool:
    """It succeeded, or told what is wrong without a traceback or an exception's name."""
    if done.code == 0:
        return True
    internal = re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b", done.err)
    return done.code in (codes or (2,)) and bool(done.err.strip()) and not internal and not done.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Shell(tmp_path_factory.mktemp("fuzz")).folder


WORDS = st.sampled_from(
    ["3", "-1", "1e9", ".nan", "true", "null", "~", "[", "]", "{", "}", ":", "- ", "? ", "&a ", "*a", "!!python/name:x ", "!!binary ", "<<: ", "'", '"', "|", ">", "#", "%", "@", "\t", "\n", "\0", "﻿", "é", "=", "2026-01-01", "0x1F", "1:30", "digits", "mnist", "9" * 30, "epochs: ", "T: ", "omit: ", "heldout: ", "own_nets.py:make", "own_data.py:load"]
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, len(TINY)), st.integers(0, 12), WORDS | st.text(max_size=6)), min_size=1, max_size=4
)


@given(EDITS)
@settings(max_examples=400, deadline=None)
def test_an_edited_experiment_file_is_valid_or_told_with_its_place(
    folder: Path, edits: list[tuple[int, int, str]]
) -> None:
    text = TINY
    for place, cut, word in edits:
        text = text[:place] + word + text[place + cut :]
    path = folder / "edited.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    lines: tuple[str, ...] = ()
    try:
        yamlfile.load(str(path))
    except BadInput as error:
        lines = error.lines
        assert lines
    assert all(line.startswith(str(path)) and "\n" not in line for line in lines)


KEYS = st.sampled_from(["seed", "data.name", "data.function", "distill.T", "teacher.train", "teacher.train.lr", "student.model.hidden", "student.model.name", "omit_classes.0.omit", "expect", "ensemble", "name", "threads"])  # fmt: skip


@given(st.sampled_from(["tiny.yaml", "own.yaml"]), KEYS | st.text(max_size=10), WORDS | st.text(max_size=12))
@BRIEF
@example("tiny.yaml", "teacher.train.epochs", "1_000")
@example("tiny.yaml", "seed", "[[[[[[")
@example("own.yaml", "x" * 5000, "1")
def test_any_set_is_valid_or_one_clear_error(folder: Path, experiment: str, key: str, value: str) -> None:
    assert is_clear(kd(folder, "run", experiment, "--dry-run", "--set", f"{key}={value}"))


FLAGS = st.sampled_from(
    ["--T", "--lambda1", "--lambda2", "--teacher", "--epochs", "--seed", "--threads", "--jobs", "--device", "--set", "--omit", "--keep", "--data-dir", "--members", "--average", "--run"]
)  # fmt: skip
COMMANDS = st.sampled_from(["train-teacher", "ensemble", "distill", "omit-classes", "evaluate", "run"])


@given(COMMANDS, st.lists(st.tuples(FLAGS, WORDS | st.text(max_size=8)), max_size=3))
@BRIEF
@example("omit-classes", [("--omit", "3,,3")])
@example("distill", [("--seed", "0-999")])
@example("train-teacher", [("--epochs", "9" * 400)])
@example("distill", [("--teacher", "\0")])
@example("distill", [("--teacher", "x" * 5000)])
@example("evaluate", [("--run", "x" * 300)])
def test_any_flags_are_valid_or_one_clear_error(folder: Path, command: str, flags: list[tuple[str, str]]) -> None:
    words = [word for flag, value in flags for word in (flag, value)]
    assert is_clear(kd(folder, command, "tiny.yaml", *words, "--dry-run"))
    assert not (folder / "runs").exists()


@given(st.text(max_size=20) | st.sampled_from(["..", "../..", "/", "~", "runs", "tiny.yaml", "\0", "a\nb"]))
@BRIEF
def test_any_name_of_an_experiment_or_a_run_is_told(folder: Path, name: str) -> None:
    for words in (["run", "--dry-run"], ["runs", "rm", "--yes"], ["evaluate", "--run"]):
        assert is_clear(
            kd(folder, *words, "--", name) if words[-1] != "--run" else kd(folder, *words, name, "tiny.yaml")
        )


DAMAGES = ["flip", "cut", "empty", "grow", "remove", "folder", "swap"]


def damage(run: Path, file: Path, how: str, draws: random.Random) -> None:
    content = bytearray(file.read_bytes())
    place = draws.randrange(len(content)) if content else 0
    if how == "flip" and content:
        content[place] ^= 1 << draws.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "empty":
        content.clear()
    elif how == "grow":
        content[place:place] = draws.randbytes(3)
    elif how == "swap":
        content = bytearray(draws.choice([f for f in sorted(run.iterdir()) if f.is_file()]).read_bytes())
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "remove":
        file.write_bytes(content)


def numbers(done: Done) -> object:
    """What `kd evaluate` counted, but for its times."""
    return {d["run"]: (d["test"], d["quality"], d["seconds"]) for d in json.loads(done.out)["runs"]}


@pytest.fixture(scope="module")
def wanted(trained: Shell) -> object:
    return numbers(kd(trained.folder, "evaluate", "tiny.yaml", "--json"))


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_run_is_told_or_does_no_harm(
    seed: int, trained: Shell, wanted: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of one run is damaged at random: every number shown is the old one, or the damage is told."""
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    shutil.copy(trained.folder / "tiny.yaml", tmp_path)
    monkeypatch.setattr(
        score, "latency", lambda *_: score.Latency(p50=1, p95=1, images_per_s=1)
    )  # to measure takes long
    draws = random.Random(seed)
    runs = sorted(path for path in (tmp_path / "runs/tiny").glob("*/*") if path.parent.name != "report")
    run = draws.choice(runs)
    file, how = draws.choice(sorted(path for path in run.iterdir() if path.is_file())), draws.choice(DAMAGES)
    damage(run, file, how, draws)
    found = kd(tmp_path, "evaluate", "tiny.yaml", "--json")
    assert is_clear(found), (file.name, how, found)
    if found.code == 0 and "left out" not in found.err:  # a damaged configuration leaves its run out
        assert numbers(found) == wanted, (file.name, how)
    for words in (["runs"], ["distill", "tiny.yaml", "--T", "5", "--epochs", "1", "--jobs", "1"]):
        done = kd(tmp_path, *words)
        assert is_clear(done), (file.name, how, done)
    assert kd(tmp_path, "runs", "rm", "--force", "--yes", str(run)).code == 0
    assert not run.exists()
