import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import Shell


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a process, by any thread, has started."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("weights.safetensors")}


def test_runs_at_once_are_bit_for_bit_those_one_after_another(kd: Shell, trained: Shell) -> None:
    for jobs in ("1", "3"):
        assert kd("ensemble", "tiny.yaml", "--seeds", "0-1", "--jobs", jobs, "--runs-dir", f"runs{jobs}").code == 0
    one, three = (weights(kd.folder / f"runs{jobs}") for jobs in ("1", "3"))
    assert len(one) == 3  # members 0 and 1, and 1 and 2
    assert one == three
    parallel = weights(trained.folder / "runs")  # `kd run` trained with as many jobs as there are cores
    assert all(parallel[name] == content for name, content in one.items() if name in parallel)


def test_a_run_that_fails_takes_no_other_down(kd: Shell) -> None:
    wild = "ensemble.models=[{hidden: [8]}, {hidden: [100000, 100000]}]"  # 37 GiB of weights: no room
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, ({12 * 2**30}, {12 * 2**30})); sys.argv[0] = 'kd'; runpy.run_module('kdcli', run_name='__main__')"
    words = ["ensemble", "tiny.yaml", "--seeds", "0,2", "--jobs", "2", "--set", wild]
    done = subprocess.run([sys.executable, "-c", limit, *words], cwd=kd.folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"tiny/train-teacher/1-\w+: .*memory", done.stderr)
    results = [json.loads(path.read_text()) for path in (kd.folder / "runs").rglob("result.json")]
    assert sorted((r["seed"], r["status"]) for r in results) == [
        (0, "completed"),
        (1, "failed"),
        (2, "completed"),
        (3, "failed"),
    ]


def test_a_killed_worker_takes_no_other_down_and_asking_again_trains_what_is_missing(kd: Shell) -> None:
    words = ["train-teacher", "tiny.yaml", "--seeds", "0-3", "--jobs", "2", "--set", "teacher.train.epochs=400"]
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", *words], cwd=kd.folder, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        begun: set[str] = set()
        while len(begun) < 2:
            begun.add(process.stderr.readline().split()[0])
        os.kill(children(process)[0], signal.SIGKILL)
        assert process.wait(120) == 1
        assert "exit code -9" in process.stderr.read()
    results = [json.loads(path.read_text()) for path in (kd.folder / "runs").rglob("result.json")]
    assert sorted(r["status"] for r in results) == ["completed", "completed", "completed", "running"]
    again = kd(*words, "--json")
    assert again.code == 0, again.err
    assert "and 2 more: finished before" in again.err
    assert [run["status"] for run in again.json["runs"]] == ["completed"] * 4


def test_ctrl_c_ends_all_processes(kd: Shell) -> None:
    words = ["train-teacher", "tiny.yaml", "--seeds", "0-3", "--jobs", "2", "--set", "teacher.train.epochs=100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", *words], cwd=kd.folder, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        process.stderr.readline()
        workers = children(process)
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)  # to kd alone: a terminal would tell its workers as well
        assert process.wait(20) == 130
    for _ in range(50):
        if not any(Path(f"/proc/{child}").exists() for child in workers):
            return
        time.sleep(0.1)
    raise AssertionError("a worker lives on")
