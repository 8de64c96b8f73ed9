"""`distill.loss` from the experiment file to the run, what is logged of it and what `kd evaluate` says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Done, Shell, kd_here
from test_unlabelled import write_images
from torch.nn import functional as F

from kdcli import losses, yamlfile
from kdcli.config import LOSSES, Data, Distill, Train
from kdcli.data.dataset import open_dataset
from kdcli.evidence.results import about_run
from kdcli.nets.models import MLP
from kdcli.plan import plan
from kdcli.runs.directory import Run, State, open_run
from kdcli.teachers.teacher import Teacher, kept_logits
from kdcli.training import fit, train

SHORT = ("--jobs", "1", "--no-baseline", "--json")
OWN_LOSS = """\
from torch.nn import functional as F


def mine(student_logits, teacher_logits, labels, T):
    print("said aloud")
    return T * F.l1_loss(student_logits, teacher_logits)


def raises(student_logits, teacher_logits, labels, T):
    return {}["no such key"]


def a_sample(student_logits, teacher_logits, labels, T):
    return (student_logits - teacher_logits).square().sum(1)


def a_number(student_logits, teacher_logits, labels, T):
    return 3.0


def constant(student_logits, teacher_logits, labels, T):
    return teacher_logits.square().mean()


def nan(student_logits, teacher_logits, labels, T):
    return student_logits.sum() * float("nan")


def steep(student_logits, teacher_logits, labels, T):
    return (student_logits - student_logits.detach()).square().sum().sqrt()


def of_labels(student_logits, teacher_logits, labels, T):
    return F.cross_entropy(student_logits, labels) * (labels.min() >= 0) / (labels.min() >= 0)


def of_three(student_logits, teacher_logits, labels):
    return F.l1_loss(student_logits, teacher_logits)


def of_shares(student_logits, teacher_logits, labels, T):
    return -(labels * student_logits.log_softmax(1)).sum(1).mean()


word = "mine"
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a teacher, an ensemble and a baseline; tests train students of their own in it."""
    shell = Shell(tmp_path_factory.mktemp("taught"))
    (shell.folder / "tiny.yaml").write_text(TINY.partition("omit_classes")[0].replace("epochs: 6", "epochs: 2"))
    (shell.folder / "mine.py").write_text(OWN_LOSS)
    for command in ("ensemble", "distill"):
        done = kd_here(shell.folder, command, "tiny.yaml", "--jobs", "1")
        assert done.code == 0, done.err
    return shell


def distil(shell: Shell, section: dict[str, Any], *more: str) -> Done:
    return kd_here(shell.folder, "distill", "tiny.yaml", "--set", f"distill={section}", *SHORT, *more)


def run_in(folder: Path, done: Done) -> Run:
    assert done.code == 0, done.err
    return open_run(folder / "runs", done.json["run"])


def section(loss: str, **more: Any) -> dict[str, Any]:
    return {"loss": loss, "lambda1": 1.0, **({"T": 2} if LOSSES[loss].T else {})} | more


OF_TWO = [
    ("loss: dkd, T: 4, ", "distill.loss: dkd has no meaning for two classes: use another loss"),
    ("T: 4, standardize: true, ", "distill.standardize: standardize has no meaning for two classes: remove it"),
]
CASES = [(section(loss), "teacher") for loss in LOSSES]
CASES += [(section(loss, standardize=True), of) for loss in ("kd", "dkd") for of in ("teacher", "ensemble")]
CASES.append((section("mse"), "ensemble"))


@pytest.mark.parametrize(("given", "teacher"), CASES, ids=str)
def test_each_loss_trains_a_student_and_is_reported(taught: Shell, given: dict[str, Any], teacher: str) -> None:
    """The epochs' and the progress line's value is the loss; `kd evaluate` has it of the kept logits."""
    done = distil(taught, {**given, "teacher": teacher})
    run, plain = run_in(taught.folder, done), given["loss"] == "kd" and not given.get("standardize")
    distill = Distill.model_validate(given)
    assert len({e.t2_kl for e in run.metrics()}) == 2  # it is logged of all
    first, last = (e.soft for e in run.metrics())
    if plain:
        assert first is last is None
        assert "soft" not in (run.path / "metrics.jsonl").read_text()
        assert "T²KL" in done.err
        return
    assert first is not None
    assert last is not None
    assert last < first  # lambda2 is 0: nothing else moved the student
    assert f"soft {last:.3g}" in done.err
    assert run.metrics()[-1].loss == pytest.approx(last)
    z, v = kept_logits(run, "test", 500)[0], kept_logits(open_run(run.root, run.spec.parents[0]), "test", 500)
    v = v.double().softmax(-1).mean(0).log() if teacher == "ensemble" else v[0]
    y = open_dataset(run.spec.data).test.labels
    own = [losses.standardize(t) for t in (z, v)] if distill.standardize else [z, v]
    wanted = float(getattr(losses, distill.loss)(*own, y, **distill.parameters))
    assert done.json["teacher"]["soft"] == pytest.approx(wanted, rel=1e-9)
    shown = kd_here(taught.folder, "evaluate", "tiny.yaml", "--run", run.name).out
    assert f"{wanted:.3g}" in shown


def test_runs_of_the_paper_s_loss_keep_their_names(kd: Shell) -> None:
    """Whatever is said that is so anyway; and no other loss shares them."""
    (kd.folder / "mine.py").write_text(OWN_LOSS)
    dataset = open_dataset(Data(name="digits", heldout=200))

    def name(*sets: str) -> str:
        loaded = yamlfile.load(str(kd.folder / "tiny.yaml"), [yamlfile.parse_set(text) for text in sets])
        return next(job.spec.name for job in plan([loaded.experiment], dataset) if job.row.name == "student")

    assert name() == "tiny/distill/0-a94b626bbc"  # as it was when there was no other loss
    assert name("distill={T: 4, lambda1: 0.9, loss: kd, standardize: false, warmup: 0}") == name()
    others = ["loss=dkd", "loss=dist", "loss=nkd", "standardize=true", "warmup=2", "loss=mine.py:mine"]
    assert len({name(), *(name(f"distill.{other}") for other in others)}) == 1 + len(others)


def test_warmup_raises_lambda1_step_by_step_and_across_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 epochs of 4 steps 1.5 warm up, 6 steps: sixths. What is logged of the loss has no part in it."""
    shares, real = list[float](), losses.objective

    def spy(*given: Any) -> losses.Loss:
        shares.append(given[8])
        found = real(*given)
        total, hard, _, soft = (float(part.detach()) for part in found)
        assert total == pytest.approx(given[8] * 2 * soft + 0.5 * hard)
        return found

    monkeypatch.setattr(fit, "objective", spy)
    images = open_dataset(Data(name="digits")).train.at(torch.arange(40))
    how = Train(epochs=3, batch_size=10, lr=0.1)
    teacher = Teacher(lambda index, _: torch.zeros(1, len(index), 10))
    distill = Distill(loss="ttm", lambda1=2, lambda2=0.5, warmup=1.5)
    nets = [MLP(64, [8], 10) for _ in range(2)]
    for fitted in fit.fit(nets[0], images, how, 0, teacher=teacher, distill=distill):
        if fitted.epoch == 1:
            state = State(1, {name: tensor.clone() for name, tensor in fitted.state().items()})
    wanted = [min((i + 1) / 6, 1) for i in range(12)]
    assert shares == pytest.approx(wanted)
    shares.clear()
    list(fit.fit(nets[1], images, how, 0, teacher=teacher, distill=distill, start=state))
    assert shares == pytest.approx(wanted[4:])


# Of one's own.


def own(function: str = "mine", **more: Any) -> dict[str, Any]:
    return {"loss": f"mine.py:{function}", "T": 2, "lambda1": 1.0} | more


def test_a_loss_of_one_s_own_trains_is_reported_and_is_part_of_the_run(taught: Shell, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(taught.folder, here)
    words = ("distill", "tiny.yaml", "--set", f"distill={own()}", *SHORT)
    run = run_in(here, kd_here(here, *words))  # --json parses, whatever the loss prints
    first, last = (e.soft for e in run.metrics())
    assert first is not None
    assert last is not None
    assert last < first
    z, v = kept_logits(run, "test", 500)[0], kept_logits(open_run(run.root, run.spec.parents[0]), "test", 500)[0]
    evaluate = ("evaluate", "tiny.yaml", "--run", run.name, "--json")
    follows = kd_here(here, *evaluate).json["runs"][0]["teacher"]
    assert follows["soft"] == pytest.approx(2 * float((z - v).abs().mean()))
    # The file's content and the function count, not where the file lies.
    shutil.copytree(here, there)
    (planned,) = kd_here(there, *words, "--dry-run").json["runs"]
    assert (planned["run"], planned["status"]) == (run.name, "completed")
    (here / "mine.py").write_text(OWN_LOSS.replace("return T *", "return 2 * T *"))
    (planned,) = kd_here(here, *words, "--dry-run").json["runs"]
    assert (planned["run"] != run.name, planned["status"]) == (True, "missing")
    # What it was is no longer known: its value is left out, the rest stays.
    assert "soft" not in kd_here(here, *evaluate).json["runs"][0]["teacher"]
    (here / "mine.py").unlink()
    assert [job.row.name for job in about_run(run)[1]] == ["teacher", "baseline", "student"]


def test_a_changed_file_is_noticed_between_the_plan_and_the_training(
    taught: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> Any:
        (taught.folder / "mine.py").write_text(OWN_LOSS + "\n")
        return real(*_)

    real = Run
    monkeypatch.setattr(train, "Run", late)
    done = distil(taught, own(lambda1=0.7))
    (taught.folder / "mine.py").write_text(OWN_LOSS)
    assert done.code == 2
    assert "mine.py: has changed since tiny/distill/0-" in done.err


BROKEN = {
    "raises": "mine.py:10: KeyError: 'no such key'",
    "a_sample": "mine.py:a_sample: must return a scalar tensor, not a tensor of shape [4]",
    "a_number": "mine.py:a_number: must return a scalar tensor, not float",
    "constant": "mine.py:constant: does not depend on student_logits: nothing could be learned from it",
    "nan": "mine.py:nan: is nan for logits drawn from a normal distribution: it must be finite",
    "steep": "mine.py:steep: has a gradient that is not finite for logits drawn from a normal distribution: it must be finite",
    "absent": "mine.py: has no function absent",
    "word": "mine.py: has no function word",
    "of_three": "mine.py:of_three: of_three() takes 3 positional arguments but 4 were given",
}


@pytest.mark.parametrize("function", BROKEN)
def test_a_broken_loss_is_told_before_anything_is_trained(taught: Shell, function: str) -> None:
    done = distil(taught, own(function))
    assert (done.code, done.out) == (2, "")
    (line,) = [line for line in done.err.splitlines() if line != "said aloud"]
    assert line.startswith("--set distill={")
    assert line.endswith(BROKEN[function])
    assert ": distill.loss: " in line


def test_a_loss_that_fails_in_training_is_blamed_on_its_line(taught: Shell) -> None:
    (taught.folder / "late.py").write_text(
        "def mine(z, v, labels, T):\n    assert len(z) < 10, 'too many'\n    return (z - v).square().mean()\n"
    )
    done = distil(taught, own() | {"loss": "late.py:mine"})
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("late.py:2: AssertionError: too many")


def test_a_loss_that_cannot_do_with_unlabelled_or_blended_images_is_told_at_once(taught: Shell) -> None:
    write_images(taught.folder / "more")
    assert distil(taught, own("of_labels"), "--dry-run").code == 0
    done = distil(taught, own("of_labels"), "--set", "data.unlabelled=more", "--dry-run")
    assert done.code == 2
    assert "mine.py:34: " in done.err
    for key in ("data.unlabelled=more", "student.train.mixup=0.2"):
        assert distil(taught, own(), "--set", key, "--dry-run").code == 0


def test_a_loss_of_blended_labels_is_reported_too(taught: Shell) -> None:
    done = distil(taught, own("of_shares"), "--set", "student.train.mixup=0.2")
    run = run_in(taught.folder, done)
    z, y = kept_logits(run, "test", 500)[0], open_dataset(run.spec.data).test.labels
    assert done.json["teacher"]["soft"] == pytest.approx(float(F.cross_entropy(z.double(), y)))
    refused = distil(taught, own("of_shares"), "--dry-run")  # whose labels are numbers of classes
    assert (refused.code, "mine.py:" in refused.err) == (2, True)


# Refusals that need the data; notes.


@pytest.mark.parametrize(("given", "line"), OF_TWO)
def test_two_classes_are_refused_at_the_start(kd: Shell, given: str, line: str) -> None:
    text = (kd.folder / "own.yaml").read_text().partition("omit_classes")[0]
    text = text.replace("own_data.py:load", "own_data.py:two").replace("T: 4, ", given).replace(", mixup: 0.1", "")
    (kd.folder / "own_data.py").write_text(
        (kd.folder / "own_data.py").read_text() + "\n\ndef two():\n    return load(['cat', 'dog'])\n"
    )
    (kd.folder / "two.yaml").write_text(text)
    done = kd_here(kd.folder, "run", "two.yaml")
    assert done.code == 2
    assert done.err.splitlines()[-1] == f"two.yaml:11: {line}"
    (kd.folder / "two.yaml").write_text(text.replace(given, "loss: dist, T: 4, "))
    assert kd_here(kd.folder, "run", "two.yaml", "--dry-run").code == 0


SMOOTH = "which hurts its students (arXiv:1906.02629): better train it without"


def test_a_teacher_with_smoothed_labels_is_warned_of_before_its_student_trains(kd: Shell) -> None:
    """One note, of the teacher or of a member; none of a teacher alone, once nothing is to be trained, or where it is
    the student's own labels that are smoothed."""
    text = TINY.partition("omit_classes")[0].replace("epochs: 6", "epochs: 1")

    def said(text: str, command: str, *more: str) -> list[str]:
        (kd.folder / "tiny.yaml").write_text(text)
        done = kd_here(kd.folder, command, "tiny.yaml", "--jobs", "1", *more)
        assert done.code == 0, done.err
        return [line for line in done.err.splitlines() if SMOOTH in line or ": epoch 1/1" in line]

    smooth = text.replace("lr: 3e-3", "lr: 3e-3, label_smoothing: 0.1")
    assert not any(SMOOTH in line for line in said(smooth, "ensemble"))
    for more in ((), ("--set", "distill.teacher=ensemble")):
        first, *rest = said(smooth, "distill", "--no-baseline", *more)
        assert first.startswith("tiny/train-teacher/0-")
        assert first.endswith(f": is a teacher with a label_smoothing of 0.1, {SMOOTH}")
        assert len(rest) == 1  # the training itself
        assert said(smooth, "distill", "--no-baseline", *more) == []
    said(text, "train-teacher")
    assert len(said(text.replace("lr: 1e-2", "lr: 1e-2, label_smoothing: 0.1"), "distill", "--no-baseline")) == 1


def test_kd_losses_lists_what_the_experiment_file_takes(kd: Shell) -> None:
    shown, document = kd("losses"), kd_here(kd.folder, "losses", "--json").json
    assert shown.code == 0
    assert [row["loss"] for row in document["losses"]] == [*LOSSES, "standardize"]
    (dkd,) = [row for row in document["losses"] if row["loss"] == "dkd"]
    assert (dkd["T"], dkd["parameters"], dkd["lambda1"], dkd["lambda2"], dkd["warmup"]) == (
        4,
        {"alpha": 1, "beta": 8},
        1,
        1,
        20,
    )
    for row in document["losses"]:
        assert f"{row['loss']}: {row['formula']} ({row['source']})" in shown.out
        cells = next(line.split() for line in shown.out.splitlines() if line.split()[:1] == [row["loss"]])
        numbers = [row["T"], *row["parameters"].values(), row["lambda1"], row["lambda2"], row["warmup"] or None]
        assert cells[1:] == [f"{n:g}" for n in numbers if n is not None]
