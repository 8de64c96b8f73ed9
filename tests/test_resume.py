"""Interrupted, killed and damaged trainings: what is asked for again ends as if nothing had happened."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from conftest import Shell, kd_here

from kdcli import cli
from kdcli.call import Call
from kdcli.runs import directory
from kdcli.runs.directory import STATES, Run, State, open_run

LIMIT = 120.0  # seconds that nothing takes: against hanging alone
EPOCHS = 30
WHOLE = ["tiny.yaml", "own.yaml"]  # a perceptron; BatchNorm and nn.Dropout; both with averages and shifts

# Each process is forked from one that has imported everything, which takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "kdcli.training.engine", "kdcli.report.page", "sklearn.model_selection", "torch._dynamo"]
)


Prepare = Callable[[pytest.MonkeyPatch], None]


class Forked:
    """`kd` in a process of its own; `prepare` may break something in it before."""

    def __init__(self, folder: Path, words: list[str], prepare: Prepare) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.process: ForkServerProcess = FORKS.Process(target=_kd, args=(folder, words, prepare))
        self.process.start()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.join()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, sent: int) -> None:
        os.kill(self.pid, sent)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; what it printed."""
        self.process.join(LIMIT)
        assert self.returncode is not None, "it hangs"
        return self.out.read_text(), self.err.read_text()


def _kd(folder: Path, words: list[str], prepare: Prepare) -> None:
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["kd", *words]
    prepare(pytest.MonkeyPatch())
    sys.exit(cli.main())


# What may be done to a `kd` before it begins.


def nothing(_: pytest.MonkeyPatch) -> None:
    pass


def eager(patch: pytest.MonkeyPatch) -> None:
    """Save the training state after every epoch, in workers too."""
    places = Call.places
    patch.setattr(Call, "places", lambda *call: places(*call)._replace(save_every=0.0))


def after_two_states(patch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Do something when two states are saved."""
    eager(patch)
    save, saved = Run.save_state, list[int]()

    def save_state(run: Run, state: State) -> None:
        save(run, state)
        saved.append(state.epochs)
        if len(saved) == 2:
            then()

    patch.setattr(Run, "save_state", save_state)


def stopping(patch: pytest.MonkeyPatch) -> None:
    """Stop, as by Ctrl-Z, until a signal lets it go on."""
    after_two_states(patch, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def slow_ending(patch: pytest.MonkeyPatch) -> None:
    """Stop likewise; to write how the run ended takes forever, whatever is raised meanwhile."""

    def end(*_: object) -> None:
        Path("ending").touch()
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(LIMIT)

    stopping(patch)
    patch.setattr(directory, "failure", end)


def no_big_files(patch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands in for a full disk: the write fails half-way."""
    eager(patch)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def broken_disk(patch: pytest.MonkeyPatch) -> None:
    """The 20th flush to the disk fails, in the middle of saving states."""
    eager(patch)
    flush, calls = os.fsync, list[int]()

    def broken(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    patch.setattr(os, "fsync", broken)


def words(epochs: int, experiment: str) -> list[str]:
    return ["train-teacher", experiment, "--set", "teacher.train.ema=0.8", "--epochs", str(epochs)]


def start(shell: Shell, epochs: int = EPOCHS, experiment: str = "tiny.yaml", prepare: Prepare = eager) -> Forked:
    """Begin to train the teacher in a process of its own."""
    return Forked(shell.folder, words(epochs, experiment), prepare)


def finish(shell: Shell, epochs: int = EPOCHS, experiment: str = "tiny.yaml") -> str:
    """Train it to the end; what was said on the way."""
    done = kd_here(shell.folder, *words(epochs, experiment))
    assert done.code == 0, done.err
    return done.err


def stopped(shell: Shell, prepare: Prepare = stopping) -> Forked:
    """A process that has saved two states and then stopped."""
    process = start(shell, prepare=prepare)
    wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] == "T")
    return process


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def the_run(folder: Path, command: str = "train-teacher") -> Path:
    (found,) = (folder / "runs").glob(f"*/{command}/*")
    return found


def outcome(folder: Path, command: str = "train-teacher") -> dict[str, Any]:
    """All that must not differ: the weights, and the metrics and result but for their times."""
    run = the_run(folder, command)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    assert scalars(run) == [{k: pytest.approx(v, rel=1e-6) for k, v in line.items()} for line in lines]
    for timed in (*lines, result, result["last_epoch"]):
        del timed["seconds"]
    for line in (*lines, result["last_epoch"]):
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
    """The outcome of each experiment's teacher."""
    found = {}
    for experiment in WHOLE:
        shell = Shell(tmp_path_factory.mktemp("whole"))
        finish(shell, experiment=experiment)
        found[experiment] = outcome(shell.folder)
    return found


# Killed and stopped.


@pytest.mark.parametrize("experiment", WHOLE)
def test_kill_9_at_any_instant_loses_nothing(experiment: str, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """Kills on the way to one result, each continued by the next; `make torture` does many more."""
    shell, draws, killed = Shell(tmp_path), random.Random(experiment), 0

    def epochs() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in tmp_path.rglob("metrics.jsonl"))

    for least in sorted(draws.randrange(EPOCHS * 3 // 4) for _ in range(8)):
        with start(shell, experiment=experiment) as process:
            wait_until(lambda process=process, least=least: process.returncode is not None or epochs() >= least)  # type: ignore[misc]
            time.sleep(draws.uniform(0, 0.05))
            process.kill()
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
    assert killed
    finish(shell, experiment=experiment)
    assert outcome(tmp_path) == uninterrupted[experiment]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_and_the_same_command_continues(
    tmp_path: Path, uninterrupted: dict[str, Any], sent: int, code: int
) -> None:
    shell = Shell(tmp_path)
    with stopped(shell) as process:
        process.send_signal(sent)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate()
    assert process.returncode == code
    assert "to continue from what was saved last, type again: kd train-teacher tiny.yaml" in errors
    assert "Traceback" not in errors
    assert json.loads((the_run(tmp_path) / "result.json").read_text())["status"] == "interrupted"
    assert "continued after epoch 2" in finish(shell)
    assert outcome(tmp_path) == uninterrupted["tiny.yaml"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """Here the first one is held up."""
    shell = Shell(tmp_path)
    with stopped(shell, slow_ending) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        wait_until((tmp_path / "ending").exists)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    (listed,) = kd_here(tmp_path, "runs", "--json").json["runs"]
    assert listed["status"] == "interrupted"
    assert "continued after epoch 2" in finish(shell)
    assert outcome(tmp_path) == uninterrupted["tiny.yaml"]


# Damaged.


@pytest.mark.parametrize("harm", ["flipped", "truncated", "both"])
def test_a_damaged_state_is_noted_and_the_one_before_is_used(
    tmp_path: Path, uninterrupted: dict[str, Any], harm: str
) -> None:
    shell = Shell(tmp_path)
    with stopped(shell):
        pass
    states = [the_run(tmp_path) / name for name in STATES]
    for path in states if harm == "both" else states[:1]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else content)
    errors = finish(shell)
    assert "state: is damaged and not used" in errors
    assert ("continued after epoch 1" in errors) == (harm != "both")
    assert ("restarted from epoch 0: no training state was found" in errors) == (harm == "both")
    assert outcome(tmp_path) == uninterrupted["tiny.yaml"]


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    with stopped(shell):
        pass
    run = open_run(tmp_path / "runs", str(the_run(tmp_path)))
    state = run.load_state(pytest.fail)
    run.save_state(State(2, {"w": state.tensors["net/layers.0.weight"]}))
    done = kd_here(tmp_path, *words(EPOCHS, "tiny.yaml"))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("the saved training state does not belong to this net and optimizer")


# Nowhere to write.


def test_a_full_disk_is_an_error_and_the_last_state_stays(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    shell = Shell(tmp_path)
    with start(shell, prepare=no_big_files) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "File too large" in errors
    assert "Traceback" not in errors
    assert json.loads((the_run(tmp_path) / "result.json").read_text())["status"] == "failed"
    finish(shell)
    assert outcome(tmp_path) == uninterrupted["tiny.yaml"]


def test_a_write_error_is_told_and_the_last_state_stays(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    shell = Shell(tmp_path)
    with start(shell, prepare=broken_disk) as process:
        _, errors = process.communicate()
    run = the_run(tmp_path)
    name = f"tiny/train-teacher/{run.name}"
    told = f"kd: failed: {name}: runs/{name}/state: Input/output error"
    assert (process.returncode, errors.splitlines()[-1]) == (1, told)
    assert {"state", "state.previous"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob("*.tmp"))
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    assert "continued after epoch" in finish(shell)
    assert outcome(tmp_path) == uninterrupted["tiny.yaml"]


def test_a_full_file_system_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """On a real file system of 216 KB, in a mount namespace of the test's own: it fills while states are saved."""
    shell, disk, tests = Shell(tmp_path), tmp_path / "runs", str(Path(__file__).parent)
    disk.mkdir()
    arguments = words(EPOCHS, "tiny.yaml")
    code = f"import sys; sys.path.insert(0, {tests!r}); import test_resume as t; t.eager(t.pytest.MonkeyPatch())\n"
    code += f"sys.argv = ['kd', *{arguments}]; sys.exit(t.cli.main())"
    copy = f"{shlex.join([sys.executable, '-c', code])}; code=$?; cp -r runs kept; exit $code"
    script = f"mount -t tmpfs -o size=216k tmpfs runs || exit 99; {copy}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        pytest.skip("needs the right to mount a tmpfs")
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "kept").rglob("state*"))
    disk.rmdir()
    (tmp_path / "kept").rename(disk)
    assert "continued after epoch" in finish(shell)
    assert outcome(tmp_path) == uninterrupted["tiny.yaml"]


# Students.


STUDENT = ["distill", "own.yaml", "--no-baseline", "--set", "student.train.jitter=1"]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_student_continues_only_with_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    """Its teacher is trained anew meanwhile, and other weights come of it, as from another version of torch."""
    folder = Shell(tmp_path).folder
    assert kd_here(folder, "train-teacher", "own.yaml").code == 0
    shutil.copytree(folder / "runs", folder / "whole" / "runs")
    assert kd_here(folder, *STUDENT, "--runs-dir", "whole/runs").code == 0

    with pytest.MonkeyPatch.context() as patch:
        after_two_states(patch, interrupt)
        assert kd_here(folder, *STUDENT).code == 130
    teacher, student = open_run(folder / "runs", str(the_run(folder))), the_run(folder, "distill")
    weights, result = teacher.load("weights"), teacher.result()
    teacher.save("weights", {name: 1.01 * t if t.is_floating_point() else t for name, t in weights.items()})
    teacher.finish(result)
    done, name = kd_here(folder, *STUDENT), student.relative_to(folder / "runs")
    assert done.code == 2
    told = f"{name}: was begun with other weights than its teacher has now: remove it, kd runs rm {name}, and train it again"
    assert [line for line in done.err.splitlines() if line.startswith(str(name))] == [told]
    assert json.loads((student / "result.json").read_text())["status"] == "interrupted"
    assert not (student / "weights.safetensors").exists()

    teacher.save("weights", weights)
    teacher.finish(result)
    done = kd_here(folder, *STUDENT)
    assert done.code == 0, done.err
    assert "continued after epoch 2" in done.err
    assert outcome(folder, "distill") == outcome(folder / "whole", "distill")
