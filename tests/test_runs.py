import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli import BadInput
from kdcli.config import Data, Distill, Model, Train
from kdcli.runs import directory
from kdcli.runs.directory import STATES, Run, State, find_folder, list_runs, open_run, write_aside
from kdcli.runs.spec import TEACHERS, Counted, Epoch, Facts, Result, Spec, Unfinished, differences, settings
from kdcli.runs.survey import dependents, remove, survey

FACTS = Facts(fingerprint="1f", classes=["cat", "dog"], shape=[3, 6, 9], white=255)
SPEC = Spec(
    experiment="exp",
    command="train-teacher",
    seed=3,
    dataset=FACTS,
    data=Data(name="digits"),
    model=Model(hidden=[4]),
    train=Train(epochs=2, lr=0.1),
)


def changed(**more: Any) -> Spec:
    return Spec(**{key: getattr(SPEC, key) for key in Spec.model_fields} | more)


STUDENT = changed(command="distill", parents=[SPEC.name])


def epoch(number: int) -> Epoch:
    return Epoch(epoch=number, loss=0.5, hard_loss=0.5, train_errors=1, test_errors=2, seconds=1, images_per_s=7)


def result(run: Run, errors: int = 1) -> Result:
    return Result(
        command=run.spec.command,
        experiment=run.spec.experiment,
        run=run.name,
        seed=run.spec.seed,
        seconds=1.0,
        evaluated_on="test images",
        test=Counted(errors=errors, total=9, per_class_errors=[errors, 0]),
    )


def finished(root: Path, spec: Spec = SPEC, errors: int = 1) -> Run:
    run = Run(root, spec)
    with run.writing("cpu", 1, {}):
        run.load_state(note=pytest.fail)
        run.log(epoch(1))
        run.log(epoch(2))
        run.save("weights", {"w": torch.arange(6.0).view(2, 3)})
        run.finish(result(run, errors))
    return run


def interrupted(root: Path, spec: Spec = SPEC, parents: dict[str, str] | None = None) -> Run:
    """A run whose training stopped after its first epoch."""
    run = Run(root, spec)
    with contextlib.suppress(KeyboardInterrupt), run.writing("cpu", 1, parents or {}):
        run.log(epoch(1))
        run.save_state(State(1, {"w": torch.ones(2)}))
        raise KeyboardInterrupt
    return run


# Identity.


def test_a_run_is_named_by_what_its_result_depends_on() -> None:
    assert SPEC.name.startswith("exp/train-teacher/3-")
    others = [
        changed(command="baseline"),
        changed(seed=4),
        changed(model=Model(hidden=[5])),
        changed(model=Model(hidden=[4], dropout=0.5)),
        changed(train=Train(epochs=2, lr=0.2)),
        changed(distill=Distill(T=4, lambda1=0.9, lambda2=0.1)),
        changed(omitted=["cat"]),
        changed(parents=["exp/train-teacher/0-x"]),
        changed(dataset=FACTS.model_copy(update={"fingerprint": "2f"})),
        changed(data=Data(name="digits", heldout=5)),
        changed(data=Data(name="digits", transfer=5)),
        changed(data=Data(name="digits", evaluate_on="heldout")),
    ]
    others += [changed(code=code, model=Model(name=f"{__file__}:make")) for code in ("a", "b")]
    others += [changed(code="a", model=Model(name=f"{__file__}:other"))]
    others += [changed(code="a", model=Model(name=f"{__file__}:make", args={"width": 3}))]
    assert len({spec.name.rpartition("-")[2] for spec in (SPEC, *others)}) == 1 + len(others)


def test_a_name_depends_on_no_path_and_on_no_default_that_is_spelled_out(tmp_path: Path) -> None:
    (tmp_path / "own.py").touch()
    shutil.copy(tmp_path / "own.py", tmp_path / "moved.py")
    same = [
        changed(data=Data(function=f"{tmp_path}/own.py:load")),
        changed(model=Model(hidden=[4], dropout=0.0, args={})),
        changed(train=Train.model_validate({"epochs": 2, "lr": 0.1, "momentum": 0.9, "schedule": "linear"})),
        changed(train=Train(epochs=2, lr=0.1, momentum=0.9, warmup=0, jitter=0, ema=None)),
        changed(omitted=[], average="arithmetic", code=None),
    ]
    assert {spec.name for spec in same} == {SPEC.name}
    nets = [changed(code="a", model=Model(name=f"{tmp_path}/{file}.py:make")) for file in ("own", "moved")]
    assert nets[0].name == nets[1].name
    elsewhere = changed(experiment="other")
    assert elsewhere.name == SPEC.name.replace("exp/", "other/")


def test_the_name_of_a_run_never_changes() -> None:
    """A later kd finds what this one trained: a new key with a default renames nothing."""
    train = {"epochs": 2, "lr": 0.1, "momentum": 0.9}
    identity = {"schema": 2, "command": "train-teacher", "seed": 3, "dataset": "1f", "data": {}}
    identity |= {"model": {"hidden": [4]}, "train": train}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    assert SPEC.name == f"exp/train-teacher/3-{digest[:10]}" == "exp/train-teacher/3-eb72aae0d8"


# What is in the folder.


def test_a_finished_run_holds_everything_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path)
    names = {
        "config.yaml",
        "environment.json",
        "lock",
        "metrics.jsonl",
        "result.json",
        "weights.safetensors",
    }
    assert {path.name for path in run.path.iterdir()} == names
    assert run.status() == "completed"
    again = open_run(tmp_path, run.name)
    assert again.spec == SPEC
    assert again.metrics() == [epoch(1), epoch(2)]
    assert again.result().test.errors == 1
    assert set(again.result().sha256) == {"weights.safetensors", "metrics.jsonl"}
    assert torch.equal(again.load("weights")["w"], torch.arange(6.0).view(2, 3))
    assert open_run(tmp_path, str(run.path)).name == run.name
    assert open_run(tmp_path, run.name[:-3]).name == run.name
    record = json.loads((run.path / "environment.json").read_text())
    assert {"torch", "python", "device", "threads", "command_line", "git_commit", "started"} <= record.keys()
    monkeypatch.chdir(tmp_path.parent)
    assert open_run(Path(tmp_path.name), run.name).root == tmp_path


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    """As tied weights, and views that are not contiguous."""
    run, tied = Run(tmp_path, SPEC), torch.arange(6.0).view(2, 3)
    with run.writing("cpu", 1, {}):
        run.save("weights", {"a": tied, "b": tied, "c": tied.t(), "n": torch.tensor(3)})
        run.finish(result(run))
    found = run.load("weights")
    assert torch.equal(found["a"], found["b"])
    assert torch.equal(found["c"], tied.t())
    assert found["n"].dtype == torch.int64


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("x"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_an_unfinished_run_says_so_and_starts_again_clean(error: BaseException, status: str, tmp_path: Path) -> None:
    run = Run(tmp_path, SPEC)
    assert run.status() == "missing"

    def work() -> None:
        with run.writing("cpu", 1, {"exp/train-teacher/0-x": "aa"}):
            run.log(epoch(1))
            assert run.read() == Unfinished(status="running", run=run.name, parents={"exp/train-teacher/0-x": "aa"})
            assert run.status() == "running"
            raise error

    with pytest.raises(type(error)):
        work()
    found = run.read()
    assert isinstance(found, Unfinished)
    assert (run.status(), found.parents) == (status, {"exp/train-teacher/0-x": "aa"})
    assert run.finished() is None
    with pytest.raises(BadInput, match=f"is {status}: cannot be a teacher; train it first"):
        run.result("a teacher")
    run.save("weights", {"w": torch.ones(2)})
    with pytest.raises(BadInput, match=f"is {status}: cannot be used; train it first"):
        run.load("weights")
    notes: list[str] = []
    with run.writing("cpu", 1, {}):
        assert run.load_state(notes.append) == State(0, {})
    assert notes == [f"{run.name}: restarted from epoch 0: no training state was found"]
    assert run.metrics() == []
    (run.path / "metrics.jsonl").write_text('{"epoch": 1, "lo')  # the disk was full
    with run.writing("cpu", 1, {}):
        assert run.load_state(notes.append) == State(0, {})
    assert run.metrics() == []


def test_training_continues_from_the_newest_state_that_is_whole(tmp_path: Path) -> None:
    run, notes = Run(tmp_path, SPEC), list[str]()
    with run.writing("cpu", 1, {}):
        for number in (1, 2):
            run.log(epoch(number))
            run.save_state(State(number, {"w": torch.full((2,), float(number))}))
        run.log(epoch(3))
        state = run.load_state(pytest.fail)
        assert (state.epochs, state.tensors["w"].tolist()) == (2, [2, 2])
        assert run.metrics() == [epoch(1), epoch(2)]
        (run.path / "state").write_bytes((run.path / "state").read_bytes()[:-1])
        state = run.load_state(notes.append)
    assert (state.epochs, state.tensors["w"].tolist()) == (1, [1, 1])
    assert run.metrics() == [epoch(1)]
    assert notes == [f"{run.path / 'state'}: is damaged and not used"]


def test_a_state_without_the_metrics_of_all_its_epochs_is_not_used(tmp_path: Path) -> None:
    """As when the disk kept the state and lost the last line, or half of it."""
    run, newest = Run(tmp_path, SPEC), f"{tmp_path / SPEC.name / 'state'}: is damaged and not used"
    with run.writing("cpu", 1, {}):
        for number in (1, 2):
            run.log(epoch(number))
            run.save_state(State(number, {"w": torch.ones(2)}))
        metrics = run.path / "metrics.jsonl"
        for kept in (metrics.read_bytes().splitlines(keepends=True)[0], metrics.read_bytes()[:-1]):
            notes = list[str]()
            metrics.write_bytes(kept)
            assert run.load_state(notes.append).epochs == 1
            assert (run.metrics(), notes) == ([epoch(1)], [newest])


def test_a_training_that_cannot_continue_says_so(tmp_path: Path) -> None:
    run, notes = interrupted(tmp_path), list[str]()
    (run.path / "metrics.jsonl").unlink()
    with run.writing("cpu", 1, {}):
        assert run.load_state(notes.append) == State(0, {})
    assert len(notes) == 1


def test_a_run_continues_only_from_the_weights_that_its_teacher_had(tmp_path: Path) -> None:
    run = interrupted(tmp_path, STUDENT, {SPEC.name: "aa"})
    with (
        pytest.raises(
            BadInput,
            match=r"was begun with other weights than its teacher has now: remove it, kd runs rm .*, and train it",
        ),
        run.writing("cpu", 1, {SPEC.name: "bb"}),
    ):
        pytest.fail("it went on")
    assert (run.status(), run.read().parents) == ("interrupted", {SPEC.name: "aa"})
    with run.writing("cpu", 1, {SPEC.name: "aa"}):
        assert run.load_state(pytest.fail).epochs == 1
        for name in STATES:
            (run.path / name).unlink(missing_ok=True)
    with run.writing("cpu", 1, {SPEC.name: "bb"}):  # nothing to continue from: all of it is made anew
        assert run.read().parents == {SPEC.name: "bb"}


def test_a_finished_run_is_not_written_again(tmp_path: Path) -> None:
    run = finished(tmp_path)
    with pytest.raises(BadInput, match="was finished by another kd in the meantime"), run.writing("cpu", 1, {}):
        pytest.fail("it was written")
    assert run.status() == "completed"
    assert run.load("weights")


def test_a_report_inside_a_run_is_no_obstacle(tmp_path: Path) -> None:
    run = interrupted(tmp_path)
    (run.path / "report" / "pictures").mkdir(parents=True)
    (run.path / "report" / "index.html").write_text("<html>")
    assert finished(tmp_path).status() == "completed"
    assert (run.path / "report" / "index.html").exists()
    (listed,) = survey(tmp_path)
    assert (listed.run, listed.status) == (run.name, "completed")
    remove([run.path])
    assert not list(tmp_path.iterdir())


# Who writes.


def test_a_second_writer_is_refused_and_kill_9_leaves_no_lock(tmp_path: Path) -> None:
    run = Run(tmp_path, SPEC)
    code = (
        "import pathlib, sys, time; from kdcli.runs.directory import Run; from kdcli.runs.spec import Spec\n"
        "run = Run(pathlib.Path(sys.argv[1]), Spec.model_validate_json(sys.argv[2]))\n"
        "with run.writing('cpu', 1, {}): print('held', flush=True); time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path), SPEC.model_dump_json()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        assert run.status() == "running"
        with pytest.raises(BadInput, match="is being written by another kd"), run.writing("cpu", 1, {}):
            pytest.fail("the second writer got in")
        other.kill()
        other.wait()
    assert run.status() == "interrupted"
    assert finished(tmp_path).status() == "completed"


def test_who_only_looks_refuses_no_writer(tmp_path: Path) -> None:
    """`kd runs` holds a shared lock of a running run for an instant."""
    run = interrupted(tmp_path)
    with (run.path / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        timer = threading.Timer(0.3, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        timer.start()
        assert finished(tmp_path).status() == "completed"
        timer.join()


def test_a_folder_that_is_removed_while_its_lock_is_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, hold = Run(tmp_path, SPEC), directory.hold

    def hold_and_vanish(descriptor: int) -> bool:
        shutil.rmtree(run.path)
        return bool(hold(descriptor))

    monkeypatch.setattr(directory, "hold", hold_and_vanish)
    with pytest.raises(BadInput, match="is being written by another kd"):
        finished(tmp_path)
    assert run.status() == "missing"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"^--runs-dir .*/file: cannot be written"):
        finished(tmp_path / "file")
    (tmp_path / "exp").touch()
    with pytest.raises(BadInput, match=r"^--runs-dir .*: cannot be written: .*/3-\w+: Not a directory"):
        finished(tmp_path)


# Damage.


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing", "empty", "a folder"])
@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.jsonl"])
def test_a_damaged_file_is_refused(damage: str, name: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    path = run.path / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": whole[:-5], "empty": b"", "bit-flipped": bytes(content)}[damage])
    with pytest.raises(BadInput, match=rf"{name}: (is damaged or|cannot be read).*train it again"):
        _ = run.load("weights") if name == "weights.safetensors" else run.metrics()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "null", '{"status": "completed"}', '{"status": "done", "run": "x"}']
)
def test_a_damaged_result_is_refused(content: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.path / "result.json").write_text(content)
    with pytest.raises(BadInput, match=r"result.json: .* train it again"):
        run.finished()


def test_an_edited_result_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path, errors=7)
    path = run.path / "result.json"
    path.write_text(path.read_text().replace('"errors": 7', '"errors": 6'))
    with pytest.raises(BadInput, match=r"result.json: is damaged or edited: remove it, kd runs rm .*, and train"):
        run.finished()


def test_a_later_kd_whose_results_say_more_finds_these_whole(tmp_path: Path) -> None:
    class Later(Result):
        more: int = 0

    found = finished(tmp_path).result()
    assert Later.model_validate(found.model_dump()).digest() == found.checksum


@pytest.mark.parametrize("content", ["", "[]", "{", "schema: 2", "!!python/object/apply:os.getcwd []", "\x00", "3"])
def test_a_damaged_config_is_refused(content: str, tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(
        BadInput, match=r"config.yaml: is missing, damaged, or of another run: remove it, kd runs rm .*, and train it"
    ):
        open_run(tmp_path, run.name)


def test_runs_of_before_are_refused_in_one_line_and_listed_as_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "exp" / "train-teacher" / "0-1234567890"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("experiment: exp\ncommand: train-teacher\nseed: 0\nsettings: {}\nparents: []\n")
    (folder / "result.json").write_text('{"status": "completed", "test": {"errors": 3}}')
    with pytest.raises(BadInput) as error:
        open_run(tmp_path, "exp/train-teacher/0-1234567890")
    assert error.value.lines == (
        f"{folder}/config.yaml: is of another kd (its runs have schema 1, this one's 2): "
        f"remove it, kd runs rm exp/train-teacher/0-1234567890 --force --runs-dir {tmp_path}, and train it again",
    )
    (listed,) = survey(tmp_path)
    assert (listed.run, listed.status, listed.errors) == ("exp/train-teacher/0-1234567890", "damaged", None)
    notes: list[str] = []
    assert list_runs(tmp_path, "exp", TEACHERS, notes.append) == []
    assert notes == [f"left out: {error.value}"]
    later = folder / "config.yaml"
    later.write_text(later.read_text() + "schema: 3\n")
    with pytest.raises(BadInput, match="its runs have schema 3, this one's 2"):
        open_run(tmp_path, "exp/train-teacher/0-1234567890")


def test_a_run_whose_code_is_gone_is_still_read(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.touch()
    spec = changed(code="a", model=Model(name=f"{own}:make"), data=Data(function=f"{own}:load"))
    run = finished(tmp_path / "runs", spec)
    own.unlink()
    assert open_run(tmp_path / "runs", run.name).spec == spec


def test_a_renamed_or_edited_run_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(BadInput, match=r"config.yaml: is missing, damaged, or of another run"):
        open_run(tmp_path, run.name)
    with pytest.raises(BadInput, match="there is no such run"):
        open_run(tmp_path, "exp/train-teacher/9-0000000000")


def test_the_beginning_of_a_name_must_be_of_one_run(tmp_path: Path) -> None:
    finished(tmp_path)
    finished(tmp_path, changed(model=Model(hidden=[5])))
    with pytest.raises(BadInput) as error:
        open_run(tmp_path, "exp/train-teacher/3-", "--teacher")
    assert error.value.lines[0] == "--teacher exp/train-teacher/3-: is the beginning of 2 runs:"
    assert len(error.value.lines) == 3
    with pytest.raises(BadInput, match="is a group of runs: name one of them"):
        open_run(tmp_path, "exp/train-teacher")
    other = finished(tmp_path / "other")
    with pytest.raises(BadInput, match=f"lies outside the runs folder: add --runs-dir {tmp_path / 'other'}"):
        open_run(tmp_path, str(other.path))


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_aside(path, b"old")

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output") as error:
        write_aside(path, b"new, and longer", keep=tmp_path / "kept")
    assert error.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


# Housekeeping.


def test_a_survey_says_how_far_each_run_is(tmp_path: Path) -> None:
    done, begun = finished(tmp_path, errors=4), interrupted(tmp_path, STUDENT, {SPEC.name: "aa"})
    (tmp_path / "exp" / "baseline" / "0-0000000000").mkdir(parents=True)
    (tmp_path / "exp" / "report").mkdir()
    found = {listed.run: listed for listed in survey(tmp_path)}
    assert [(found[run.name].status, found[run.name].errors) for run in (done, begun)] == [
        ("completed", 4),
        ("interrupted", None),
    ]
    assert (found[begun.name].epoch, found[begun.name].epochs, found[begun.name].parents) == (1, 2, [done.name])
    assert found["exp/baseline/0-0000000000"].status == "missing"
    assert len(found) == 3
    assert found[done.name].bytes == sum(file.stat().st_size for file in done.path.iterdir())
    assert 0 <= found[done.name].age_s < 60
    assert dependents(list(found.values()), [done.name]) == [begun.name]
    assert dependents(list(found.values()), [done.name, begun.name]) == []


def test_removal_takes_all_or_nothing(tmp_path: Path) -> None:
    one, other = finished(tmp_path), interrupted(tmp_path, STUDENT)
    folders = [find_folder(tmp_path, name) for name in (one.name, one.name[:-3], str(other.path))]
    assert folders == [one.path, one.path, other.path]
    folders = folders[1:]
    with (other.path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the kd that trains it does
        with pytest.raises(BadInput, match="is being written by a kd: stop that first; nothing was removed"):
            remove(folders)
    assert one.status() == "completed"
    remove(folders)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["exp", "exp/train-teacher", "exp/report", "..", "/", "nothing", "", "linked"])
def test_only_whole_runs_are_removed(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "runs")
    (tmp_path / "runs" / "exp" / "report").mkdir()
    if name == "linked":
        name = "exp/train-teacher/0-linked"
        (tmp_path / "runs" / name).symlink_to(run.path)
    with pytest.raises(BadInput, match=r"there is no such run|lies outside the runs folder|is a group of runs"):
        find_folder(tmp_path / "runs", name)


def test_differences_name_the_key_and_both_values() -> None:
    other = changed(seed=1, train=Train(epochs=5, lr=0.1), distill=Distill(T=4, lambda1=0.9, lambda2=0.1))
    found = differences(settings(SPEC), settings(other))
    distill = "{'T': 4.0, 'lambda1': 0.9, 'lambda2': 0.1, 'loss': 'kd', 'standardize': False, 'warmup': 0.0, "
    distill += "'t_squared': True, 'half': False}"
    assert found == [f"distill {distill} instead of none", "train.epochs 5 instead of 2"]
    assert differences({"seed": 0, "a": 1}, {"seed": 1}) == ["no a instead of 1", "seed 1 instead of 0"]
    renamed = changed(dataset=FACTS.model_copy(update={"fingerprint": "22"}))
    assert differences(settings(SPEC), settings(renamed)) == ["other images or classes"]
