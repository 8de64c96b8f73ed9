"""Interrupted, killed and damaged trainings: what is asked for again ends as if nothing had happened."""

import json
import os
import random
import shlex
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

from kdcli import core, runs
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


def wait_for_two_states(folder: Path) -> Path:
    """Wait until a training has saved two epochs; returns the older state."""
    while not (found := list(folder.rglob("state.previous"))):
        time.sleep(0.02)
    return found[0]


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not differ: the weights, and the metrics and result but for their times."""
    (run,) = (folder / "runs" / "tiny" / "train-teacher").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    assert scalars(run) == [{k: pytest.approx(v, rel=1e-6) for k, v in line.items()} for line in lines]
    for timed in (*lines, result):
        del timed["seconds"]
    for line in lines:
        del line["images_per_s"]
    del result["checksum"], result["sha256"]["metrics.jsonl"]  # which cover those times
    files = sorted(path.name.partition(".tfevents")[0] for path in run.iterdir())
    return {"lines": lines, "result": result, "weights": (run / "weights.safetensors").read_bytes(), "files": files}


def scalars(run: Path) -> list[dict[str, float]]:
    """What TensorBoard shows of a run, by epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    found: dict[int, dict[str, float]] = {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            found.setdefault(event.step, {"epoch": event.step})[key] = event.value
    return list(found.values())


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
        wait_for_two_states(tmp_path)
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
        previous = wait_for_two_states(tmp_path)
        process.kill()
        process.communicate()
    newest = previous.with_name("state")
    if not newest.exists():  # killed between a renaming and a writing
        shutil.copy(previous, newest)
    for path in [newest, previous] if harm == "both" else [newest]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else content)
    errors = finish(shell)
    assert "is damaged and not used" in errors
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


# A `kd` whose flush to the disk fails the 20th time, as on a broken one: in the middle of saving states.
BROKEN = """
import errno, os
flush, calls = os.fsync, []
def broken(descriptor):
    calls.append(descriptor)
    if len(calls) == 20:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    flush(descriptor)
os.fsync = broken
"""


def test_a_write_error_is_told_and_the_last_state_stays(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    shell = Shell(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN + EAGER, *WORDS, "60"], cwd=tmp_path, capture_output=True, text=True
    )
    (run,) = (tmp_path / "runs" / "tiny" / "train-teacher").iterdir()
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[-1]) == (
        1,
        f"kd: failed: tiny/train-teacher/{run.name}: runs/tiny/train-teacher/{run.name}/state: Input/output error",
    )
    assert {"state", "state.previous"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob("*.tmp"))
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    assert "continued after epoch" in finish(shell)
    assert outcome(tmp_path) == uninterrupted


def test_a_full_file_system_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """On a real file system of 216 KB, in a mount namespace of the test's own: it fills while states are saved."""
    shell, disk = Shell(tmp_path), tmp_path / "runs"
    disk.mkdir()
    kd = shlex.join([sys.executable, "-c", EAGER, *WORDS, "60"])
    copy = f"{kd}; code=$?; cp -r runs kept; exit $code"
    script = f"mount -t tmpfs -o size=216k tmpfs runs || exit 99; {copy}"
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        pytest.skip("needs the right to mount a tmpfs")
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "kept").rglob("state*"))
    disk.rmdir()
    (tmp_path / "kept").rename(disk)
    assert "continued after epoch" in finish(shell)
    assert outcome(tmp_path) == uninterrupted


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """Here the first one is held up: writing the status takes forever."""
    slow = "import time, kdcli.runs as r; r.Run.end = lambda *_: (print('ending', flush=True), time.sleep(100))\n"
    shell = Shell(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", slow + EAGER, *WORDS, "60"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_two_states(tmp_path)
        process.send_signal(signal.SIGINT)
        assert process.stdout
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert shell("runs", "--json").json["runs"][0]["status"] == "interrupted"
    assert "continued after epoch" in finish(shell)
    assert outcome(tmp_path) == uninterrupted


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    words = [*WORDS, "100000", "--seeds", "0-1", "--jobs", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", EAGER, *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while len(list(tmp_path.rglob("metrics.jsonl"))) < 2:
            time.sleep(0.05)
        process.kill()
    end = time.monotonic() + 20
    while {d["status"] for d in shell("runs", "--json").json["runs"]} != {"interrupted"}:
        assert time.monotonic() < end, "a worker trains on"


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    with start(shell) as process:
        previous = wait_for_two_states(tmp_path)
        process.kill()
        process.communicate()
    previous.with_name("state").unlink(missing_ok=True)
    run = runs.open_run(tmp_path / "runs", str(previous.parent))
    _, tensors = run.load_state(print)
    run.save_state(1, {"w": tensors["layers.0.weight"]})
    with start(shell) as process:
        _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("the saved training state is not one of this net and optimizer")
