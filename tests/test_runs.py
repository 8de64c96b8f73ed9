import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcli import BadInput, runs
from kdcli.runs import Run, Spec

SPEC = Spec("exp", "train-teacher", 3, {"data": {"name": "digits"}, "model": {"hidden": [4]}})


def finished(root: Path, spec: Spec = SPEC) -> Run:
    run = Run(root, spec)
    with run.writing("cpu", 1):
        run.restart()
        run.log({"epoch": 1, "loss": 0.5, "seconds": 1.0})
        run.save("weights", {"w": torch.arange(6.0).view(2, 3)})
        run.finish(
            {"test": {"errors": 1}, "seconds": 1.0, "device": "cpu", "evaluated_on": "test images"}, "# report\n"
        )
    return run


def test_identity_is_command_settings_seed_and_parents() -> None:
    assert SPEC.name.startswith("exp/train-teacher/3-")
    others = [
        Spec("exp", "baseline", 3, SPEC.settings),
        Spec("exp", "train-teacher", 4, SPEC.settings),
        Spec("exp", "train-teacher", 3, {**SPEC.settings, "model": {"hidden": [5]}}),
        Spec("exp", "train-teacher", 3, SPEC.settings, ("exp/train-teacher/0-x",)),
    ]
    assert len({spec.name.rpartition("-")[2] for spec in (SPEC, *others)}) == 5
    reordered = Spec("exp", "train-teacher", 3, dict(reversed(SPEC.settings.items())))
    assert reordered.name == SPEC.name


def test_a_finished_run_holds_everything_and_reads_back(tmp_path: Path) -> None:
    run = finished(tmp_path)
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "lock",
        "metrics.jsonl",
        "report.md",
        "result.json",
        "weights.safetensors",
    }
    assert run.completed
    again = runs.open_run(tmp_path, run.name)
    assert again.spec == SPEC
    assert again.metrics() == [{"epoch": 1, "loss": 0.5, "seconds": 1.0}]
    assert torch.equal(again.load("weights")["w"], torch.arange(6.0).view(2, 3))
    assert runs.open_run(tmp_path, str(run.path)).name == run.name
    environment = json.loads((run.path / "environment.json").read_text())
    assert {"torch", "python", "device", "threads", "command_line", "git_commit", "started"} <= environment.keys()


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("x"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_an_unfinished_run_says_so_and_starts_again_clean(error: BaseException, status: str, tmp_path: Path) -> None:
    run = Run(tmp_path, SPEC)
    assert run.status == "missing"

    def work() -> None:
        with run.writing("cpu", 1):
            run.log({"epoch": 1})
            assert run.result["status"] == "running"
            raise error

    with pytest.raises(type(error)):
        work()
    assert run.status == status
    assert finished(tmp_path).metrics() == [{"epoch": 1, "loss": 0.5, "seconds": 1.0}]


def test_a_second_writer_is_refused_and_kill_9_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kdcli.runs import Run, Spec\n"
        f"run = Run(Path({str(tmp_path)!r}), Spec('exp', 'train-teacher', 3, {SPEC.settings!r}))\n"
        "with run.writing('cpu', 1): print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        assert Run(tmp_path, SPEC).status == "running"
        with pytest.raises(BadInput, match="is being written by another kd"), Run(tmp_path, SPEC).writing("cpu", 1):
            pytest.fail("the second writer got in")
        other.kill()
        other.wait()
    assert Run(tmp_path, SPEC).status == "interrupted"
    assert finished(tmp_path).completed


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing", "empty"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    path = run.path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-5], "empty": b"", "bit-flipped": bytes(content)}[damage])
    with pytest.raises(BadInput, match=r"weights.safetensors: is (missing|damaged or truncated).*train it again"):
        run.load("weights")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_damaged_result_is_refused(content: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.path / "result.json").write_text(content)
    with pytest.raises(BadInput, match=r"result.json: .* train it again"):
        _ = run.completed


@pytest.mark.parametrize("content", ["", "[]", "{", "command: x", "!!python/object/apply:os.getcwd []"])
def test_a_damaged_config_is_refused(content: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(BadInput, match=r"config.yaml: is not a run's configuration"):
        runs.open_run(tmp_path, run.name)


def test_a_renamed_or_edited_run_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(BadInput, match="does not belong in this folder"):
        runs.open_run(tmp_path, run.name)
    with pytest.raises(BadInput, match="there is no such run"):
        runs.open_run(tmp_path, "exp/train-teacher/9-0000000000")


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    runs.write_aside(path, b"old")

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        runs.write_aside(path, b"new, and longer")
    assert path.read_bytes() == b"old"


def test_differences_name_the_key_and_both_values() -> None:
    wanted = {"seed": 0, "train": {"epochs": 60, "lr": 0.1}}
    found = {"seed": 1, "train": {"epochs": 5, "lr": 0.1}}
    assert runs.differences(wanted, found) == ["seed is 1, not 0", "train.epochs is 5, not 60"]
