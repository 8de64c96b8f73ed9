"""Interrupted, killed and damaged trainings: what is asked for again ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Shell
from test_train import DIGITS, net, train, weights

from kdcli import core
from kdcli.config import Train
from kdcli.train import fit

# `kd` that saves the training state after every epoch.
EAGER = "import sys, kdcli.recipes as r; r.SAVE_EVERY = 0; sys.argv[0] = 'kd'; from kdcli.cli import main; main()"
WORDS = ["train-teacher", "tiny.yaml", "--set", "teacher.train.ema=0.9", "--epochs"]


def start(shell: Shell, epochs: int = 60) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", EAGER, *WORDS, str(epochs)],
        cwd=shell.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(shell: Shell, epochs: int = 60) -> str:
    with start(shell, epochs) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not differ: the weights, and the metrics and result but for their times."""
    (run,) = (folder / "runs" / "tiny" / "train-teacher").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    for timed in (*lines, result):
        del timed["seconds"]
    files = sorted(path.name for path in run.iterdir())
    return {"lines": lines, "result": result, "weights": (run / "weights.safetensors").read_bytes(), "files": files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shell = Shell(tmp_path_factory.mktemp("whole"))
    finish(shell)
    return outcome(shell.folder)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimizer": "adam", "lr": 1e-3, "ema": 0.9, "jitter": 1},
    {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "max_norm": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("members", [1, 3])
def test_fit_goes_on_from_a_state_bit_for_bit(options: dict[str, Any], members: int) -> None:
    settings, seeds = train(epochs=4, **options), range(members)

    def models() -> list[core.MLP]:
        return [net(seed, dropout=0.5) for seed in seeds]

    def fitted(settings: Train, **how: Any) -> Any:
        return list(fit(models(), DIGITS.train, settings, seeds, **how))

    *_, whole = fitted(settings)
    halfway = fit(models(), DIGITS.train, settings, seeds)
    next(halfway)
    states = [{k: t.clone() for k, t in state.items()} for state in next(halfway).states]
    *_, resumed = fitted(settings, done=2, states=states)
    assert resumed.metrics == whole.metrics
    for one, other in zip(resumed.models, whole.models, strict=True):
        assert torch.equal(weights(one), weights(other))


def test_kill_9_at_any_instant_loses_nothing(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """Five kills on the way to one result, each continued by the next; `make torture` does many more."""
    shell, draws = Shell(tmp_path), random.Random(0)
    kills = 0
    while kills < 5:
        with start(shell) as process:
            time.sleep(draws.uniform(1.5, 4.0))
            process.kill()
            process.communicate()
        if process.returncode == 0:  # it was quicker: begin anew
            (run,) = (tmp_path / "runs" / "tiny" / "train-teacher").iterdir()
            assert outcome(tmp_path) == uninterrupted
            for path in run.iterdir():
                path.unlink()
        kills += 1
    finish(shell)
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_and_the_same_command_continues(
    tmp_path: Path, uninterrupted: dict[str, Any], sent: int, code: int
) -> None:
    shell = Shell(tmp_path)
    with start(shell) as process:
        while not list(tmp_path.rglob("state.previous")):  # two epochs are saved
            time.sleep(0.02)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "to continue, type again: kd train-teacher tiny.yaml" in errors
    assert "Traceback" not in errors
    assert "continued after epoch" in finish(shell)
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("harm", ["flipped", "truncated", "both"])
def test_a_damaged_state_is_noted_and_the_one_before_is_used(
    tmp_path: Path, uninterrupted: dict[str, Any], harm: str
) -> None:
    shell = Shell(tmp_path)
    with start(shell) as process:
        while not list(tmp_path.rglob("state.previous")):
            time.sleep(0.02)
        process.kill()
        process.communicate()
    (previous,) = tmp_path.rglob("state.previous")
    newest = previous.with_name("state")
    if not newest.exists():  # killed between a renaming and a writing
        shutil.copy(previous, newest)
    for path in [newest, previous] if harm == "both" else [newest]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else content)
    errors = finish(shell)
    assert "is damaged: an earlier state is used" in errors
    assert ("continued after epoch" in errors) == (harm != "both")
    assert outcome(tmp_path) == uninterrupted


def test_a_diverged_run_says_where_and_is_no_teacher(kd: Shell) -> None:
    wild = ["--set", "teacher.train={epochs: 5, optimizer: sgd, lr: 1e30, batch_size: 50}"]
    done = kd("train-teacher", "tiny.yaml", *wild)
    assert done.code == 1
    assert "diverged at step 2 (epoch 1), at a learning rate of" in done.err
    assert "lower the lr of 1e+30" in done.err
    assert "Traceback" not in done.err
    (result,) = (json.loads(p.read_text()) for p in kd.folder.rglob("result.json"))
    assert result["status"] == "diverged"
    student = kd("distill", "tiny.yaml", *wild)
    assert student.code == 2
    assert "is diverged; train it" in student.err
    assert kd("evaluate", "tiny.yaml").code == 2


def test_one_that_diverges_takes_no_other_down(kd: Shell) -> None:
    models = "ensemble.models=[{hidden: [8]}, {hidden: [16]}]"
    done = kd("ensemble", "tiny.yaml", "--set", models, "--jobs", "1", "--set", "teacher.train.lr=1e38")
    assert done.code == 1
    statuses = [json.loads(p.read_text())["status"] for p in kd.folder.rglob("result.json")]
    assert statuses == ["diverged", "diverged"]


def test_a_full_disk_is_an_error_and_the_last_state_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails half-way, as on a full one."""
    shell = Shell(tmp_path)
    limit = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); {EAGER}"
    done = subprocess.run([sys.executable, "-c", limit, *WORDS, "60"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "runs" / "tiny" / "train-teacher")
    assert finish(shell)
