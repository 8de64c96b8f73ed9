"""Where runs are trained: several at once or one after another, and what becomes of one that goes wrong."""

import contextlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Shell, kd_here
from test_resume import Forked, nothing, the_run, wait_until

from kdcli.runs.directory import Places, open_run
from kdcli.score import Latency
from kdcli.training.engine import _Worker
from kdcli.training.worker import Ended

# Nets of somebody's own, one that prints and one that fails in its second epoch: of 120 images, 16 a step.
NETS = """\
import sys

from torch import nn


class Net(nn.Sequential):
    def __init__(self, classes, channels, width=4):
        super().__init__(
            nn.Conv2d(channels, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )


class Loud(Net):
    def forward(self, x):
        print("a step")
        sys.stdout.write("of a net\\n")
        return super().forward(x)


class Unquiet(Net):
    def forward(self, x):
        if self.training:
            print("past sys.stdout", file=sys.__stdout__, flush=True)
        return super().forward(x)


class Failing(Net):
    steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.steps > 8:
            raise KeyError("head")
        return super().forward(x)
"""
FAULT = NETS.partition("raise KeyError")[0].count("\n") + 1  # the line


@pytest.fixture
def folder(kd: Shell) -> Path:
    (kd.folder / "nets.py").write_text(NETS)
    return kd.folder


def models(*names: str) -> list[str]:
    """Words that make these nets the members of the ensemble."""
    return ["--set", f"ensemble.models=[{', '.join(f'{{name: nets.py:{name}}}' for name in names)}]"]


def forked(folder: Path, *words: str, prepare: Callable[[pytest.MonkeyPatch], None] = nothing) -> Done:
    with Forked(folder, list(words), prepare) as process:
        out, err = process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out, err)


def at_work(process: Forked, count: int) -> dict[int, Path]:
    """The workers of a process by their ids, with the run that each is at: so many have an epoch behind them."""
    found = dict[int, Path]()

    def enough() -> bool:
        with contextlib.suppress(OSError):  # a thread or a process ends as we look: look again
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    files = [file.readlink() for file in Path(f"/proc/{child}/fd").iterdir()]
                    found.update({int(child): file.parent for file in files if file.name == "lock"})
        begun = [run / "metrics.jsonl" for run in found.values()]
        return sum(path.is_file() and path.stat().st_size > 0 for path in begun) >= count

    wait_until(enough)
    return found


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
        return True


def without_report(patch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures and the timing of nets, which take seconds."""
    patch.setattr("kdcli.report.page.write_report", lambda *given: [given[3] / "report.html"])
    patch.setattr("kdcli.score.latency", lambda *_: Latency(p50=1, p95=1, images_per_s=1))


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("weights.safetensors")}


def results(folder: Path, command: str = "train-teacher") -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob(f"runs/*/{command}/*/result.json")]
    return sorted(found, key=lambda result: str(result["run"]))


def statuses(folder: Path) -> list[str]:
    return [run["status"] for run in kd_here(folder, "runs", "--json").json["runs"]]


# Several at once.


def test_runs_at_once_are_bit_for_bit_those_one_after_another(folder: Path) -> None:
    """A whole experiment, whose runs need each other, of nets that print whenever they are asked."""
    (folder / "own.yaml").write_text((folder / "own.yaml").read_text().replace("own_nets.py:make", "nets.py:Loud"))
    mixed = "ensemble.models=[{name: nets.py:Loud}, {hidden: [8], dropout: 0.5}]"
    documents = []
    for jobs in ("1", "2"):
        words = ["--json", "--jobs", jobs, "--runs-dir", jobs, "--set", mixed]
        done = forked(folder, "run", "own.yaml", *words, prepare=without_report)
        assert done.code == 0, done.err
        assert done.out.startswith("{"), done.out[:200]
        assert "a step\nof a net\n" in done.err
        documents.append(done.json["points"][0]["table"])
    assert weights(folder / "1") == weights(folder / "2")
    assert len(weights(folder / "1")) == 8  # teacher, 2 members, 2 baselines, 2 students, omission
    assert documents[0] == documents[1]


def test_what_a_net_prints_in_a_worker_is_on_stderr(folder: Path) -> None:
    """Even what goes past sys.stdout: the document of --json stays whole."""
    words = ["--seeds", "0-1", "--jobs", "2", "--epochs", "1", "--json"]
    done = forked(folder, "train-teacher", "own.yaml", *words, "--set", "teacher.model={name: nets.py:Unquiet}")
    assert done.code == 0, done.err
    assert [run["status"] for run in done.json["runs"]] == ["completed"] * 2
    assert done.err.count("past sys.stdout") > 2


def test_a_killed_worker_takes_no_other_down_and_asking_again_trains_what_is_missing(kd: Shell) -> None:
    words = ["train-teacher", "tiny.yaml", "--seeds", "0-2", "--epochs", "60", "--jobs"]
    with Forked(kd.folder, [*words, "2"], nothing) as process:
        worker, run = next(iter(at_work(process, 1).items()))
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 1
    killed = f"tiny/train-teacher/{run.name}"
    found = {result["run"]: result["status"] for result in results(kd.folder)}
    assert found.pop(killed) == "running"
    assert list(found.values()) == ["completed"] * 2
    assert f"kd: failed: {killed}: its process ended with exit code -9" in errors.splitlines()
    assert "Traceback" not in errors
    again = kd_here(kd.folder, *words, "1", "--json")
    assert again.code == 0, again.err
    assert "and 1 more: finished before" in again.err
    assert [run["status"] for run in again.json["runs"]] == ["completed"] * 3


def test_a_worker_that_dies_while_it_is_idle_is_told(folder: Path) -> None:
    assert kd_here(folder, "train-teacher", "tiny.yaml", "--epochs", "1").code == 0
    spec = open_run(folder / "runs", str(the_run(folder))).spec
    worker = _Worker(Places(folder / "other"))
    worker.process.kill()
    worker.process.wait()
    worker.give(spec)
    assert worker.receive() == Ended(spec.name, (f"{spec.name}: its process ended with exit code -9",))


def test_ctrl_c_ends_all_processes(kd: Shell) -> None:
    words = ["train-teacher", "tiny.yaml", "--seeds", "0-3", "--jobs", "2", "--epochs", "100000"]
    with Forked(kd.folder, words, nothing) as process:
        workers = at_work(process, 2)
        process.send_signal(signal.SIGINT)  # to kd alone: a terminal would tell its workers as well
        _, errors = process.communicate()
        assert process.returncode == 130
    assert all(map(is_gone, workers))
    assert "Traceback" not in errors
    assert statuses(kd.folder) == ["interrupted"] * 2


def test_workers_end_with_the_process_that_started_them(kd: Shell) -> None:
    words = ["train-teacher", "tiny.yaml", "--seeds", "0-1", "--jobs", "2", "--epochs", "100000"]
    with Forked(kd.folder, words, nothing) as process:
        workers = at_work(process, 2)
        process.kill()
        wait_until(lambda: all(map(is_gone, workers)))
        wait_until(lambda: statuses(kd.folder) == ["interrupted"] * 2)  # a zombie may hold its lock for an instant


def test_a_run_is_trained_anywhere_with_nothing_but_its_arguments(folder: Path, tmp_path: Path) -> None:
    """A fresh process in another folder, that knows the spec and the places."""
    done = kd_here(folder, "train-teacher", "own.yaml")
    assert done.code == 0, done.err
    spec = open_run(folder / "runs", str(the_run(folder))).spec
    code = "import pickle, sys; from kdcli.training.train import train; train(*pickle.load(sys.stdin.buffer), print, print)"
    arguments = pickle.dumps((spec, Places(tmp_path / "elsewhere")))
    fresh = subprocess.run([sys.executable, "-c", code], input=arguments, cwd="/", capture_output=True)
    assert fresh.returncode == 0, fresh.stderr
    assert weights(tmp_path / "elsewhere") == weights(folder / "runs")
    assert (fresh.stdout, fresh.stderr.count(spec.name.encode())) == (b"", 8)  # told of every epoch
    assert b"a net is made" in fresh.stderr


# What goes wrong.


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_net_that_fails_is_told_with_its_line_and_takes_no_other_down(folder: Path, jobs: str) -> None:
    done = kd_here(folder, "ensemble", "own.yaml", "--jobs", jobs, *models("Failing", "Net"))
    assert done.code == 2
    failed, other = (result["run"] for result in results(folder))
    told = done.err.splitlines()
    assert f"{folder / 'nets.py'}:{FAULT}: KeyError: 'head'" in told
    (given_up,) = [line for line in told if "not trained" in line]
    assert re.fullmatch(rf"own/ensemble/0-\w+: not trained: it is made from .*{failed}.*", given_up)
    assert "Traceback" not in done.err
    assert [(result["run"], result["status"]) for result in results(folder)] == [
        (failed, "failed"),
        (other, "completed"),
    ]
    assert len((folder / "runs" / failed / "metrics.jsonl").read_text().splitlines()) == 1
    assert not results(folder, "ensemble")


def test_what_is_not_trained_names_what_failed_of_its_own(folder: Path) -> None:
    done = kd_here(folder, "ensemble", "own.yaml", "--seeds", "0,2", "--jobs", "1", *models("Failing", "Net"))
    assert done.code == 2
    line = r"^own/ensemble/(\d)-\w+: not trained: it is made from what failed \(own/train-teacher/(\d)-\w+\)$"
    assert re.findall(line, done.err, re.MULTILINE) == [("0", "0"), ("2", "2")]


def little_memory(_: pytest.MonkeyPatch) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))


def test_a_run_without_memory_takes_no_other_down(kd: Shell) -> None:
    wild = "ensemble.models=[{hidden: [8]}, {hidden: [100000, 100000]}]"  # 37 GiB of weights: no room
    words = ["ensemble", "tiny.yaml", "--seeds", "0,2", "--jobs", "1", "--set", wild]
    done = forked(kd.folder, *words, prepare=little_memory)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert re.search(r"kd: failed: tiny/train-teacher/1-\w+: .*memory", done.err)
    assert done.err.count(": not trained: it is made from ") == 2
    statuses = [(result["seed"], result["status"]) for result in results(kd.folder) if "seed" in result]
    assert statuses == [(0, "completed"), (2, "completed")]
    assert [result["status"] for result in results(kd.folder)].count("failed") == 2


def test_a_diverged_run_says_where_and_is_no_teacher(kd: Shell) -> None:
    wild = ["--set", "teacher.train={epochs: 5, optimizer: sgd, lr: 1e30, batch_size: 50}"]
    done = kd_here(kd.folder, "train-teacher", "tiny.yaml", *wild)
    assert done.code == 1
    assert "diverged at step 2 (epoch 1), at a learning rate of" in done.err
    assert "lower the lr of 1e+30" in done.err
    assert "train.lr: 1e+30 is very large: rates from 0.0001 to 1 are usual" in done.err.splitlines()
    assert "Traceback" not in done.err
    (result,) = results(kd.folder)
    assert result["status"] == "diverged"
    student = kd_here(kd.folder, "distill", "tiny.yaml", *wild)
    assert student.code == 2
    assert student.err.startswith(f"teacher {result['run']}: has diverged: lower teacher.train.lr (1e+30)\n")
    assert kd_here(kd.folder, "evaluate", "tiny.yaml").code == 2


def test_one_that_diverges_takes_no_other_down(kd: Shell) -> None:
    wild = ["--set", "ensemble.models=[{hidden: [8]}, {hidden: [16]}]", "--set", "teacher.train.lr=1e38"]
    done = kd_here(kd.folder, "ensemble", "tiny.yaml", "--jobs", "1", *wild)
    assert done.code == 1
    assert [result["status"] for result in results(kd.folder)] == ["diverged", "diverged"]
    assert done.err.count(": diverged at step ") == 2
    assert done.err.count(": not trained: it is made from ") == 1


def test_a_training_no_better_than_guessing_says_so(kd: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the note, in the result, and below every table."""
    without_report(monkeypatch)
    wild, said = ["--set", "student.train.lr=1e6"], []
    words = ["run", "tiny.yaml", "--jobs", "1", "--set", "omit_classes=[]", "--set", "ensemble=null"]
    done = kd_here(kd.folder, *words, *wild)
    assert done.code == 0, done.err
    for command in ("baseline", "distill"):
        (result,) = results(kd.folder, command)
        assert result["test"]["errors"] >= 449
        assert (
            result["warning"] == "is no better than guessing, which makes 449 errors: train it longer, or at another lr"
        )
        note = f"{result['run']}: {result['test']['errors']} errors of 500: {result['warning']}"
        assert note in done.err.splitlines()
        said.append(f"{result['run']}: {result['warning']}.")
    assert set(said) <= set(done.out.splitlines())
    assert set(said) <= set(kd_here(kd.folder, "distill", "tiny.yaml", *wild).out.splitlines())
    sound = kd_here(kd.folder, *words)
    assert sound.code == 0, sound.err
    assert "guessing" not in sound.out + sound.err


def test_files_of_the_users_folder_take_the_place_of_no_module(kd: Shell) -> None:
    for name in ("random", "statistics", "yaml", "kdcli"):
        (kd.folder / f"{name}.py").write_text("raise SystemExit('a file of the user was run')\n")
    command = [
        str(Path(sys.executable).with_name("kd")),
        "train-teacher",
        "tiny.yaml",
        "--seeds",
        "0-1",
        "--epochs",
        "1",
    ]
    done = subprocess.run(command, cwd=kd.folder, capture_output=True, text=True)
    assert (done.returncode, "was run" in done.stderr) == (0, False), done.stderr
