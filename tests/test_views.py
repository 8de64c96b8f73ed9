"""Fixed views of each image, and a teacher that is asked about them once: against lists by hand and the live teacher."""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Shell, kd_here
from test_resume import Forked
from torch import Tensor, nn

from kdcli import BadInput
from kdcli.config import Distill, Model, Train
from kdcli.data.augment import Fixed, Views
from kdcli.data.dataset import Dataset, Split, open_dataset
from kdcli.machine.device import seeded
from kdcli.nets.models import MLP
from kdcli.plan import Job, plan
from kdcli.runs.directory import Places, Run, State, open_run
from kdcli.runs.spec import Spec
from kdcli.teachers import kept
from kdcli.teachers.kept import kept_views
from kdcli.teachers.teacher import Teacher, nets
from kdcli.training import estimate, train
from kdcli.training.fit import fit
from kdcli.yamlfile import load, parse_set

CPU, K, N = torch.device("cpu"), 3, 1297
SHIFTED = ["--set", "student.train.jitter=1", "--set", f"distill.views={K}"]
LOSS = Distill(T=4, lambda1=0.9, lambda2=0.1)
CROPPED = "student.train={epochs: 2, batch_size: 16, lr: 0.01, jitter: 1, flip: true, crop: 0.7, cutout: 2}"


def recipe(**more: object) -> Train:
    return Train.model_validate({"epochs": 4, "lr": 0.1, "batch_size": 50, **more})


def fixed(most: int, size: int = 40, **views: object) -> Fixed:
    return Fixed(recipe(**views), most, size, torch.arange(size))


# The views.

BY_1_PIXEL = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def seen(views: Fixed, i: int) -> list[tuple[int, ...]]:
    """What each view does to image i: its shift and, where images are mirrored, whether it is."""
    found = []
    for k in range(views.count):
        drawn = views.draw(k)
        mirrored = [int(drawn["flip"][i, 0] < 0.5)] if "flip" in drawn else []
        found.append((*drawn["jitter"][i].tolist(), *mirrored) if "jitter" in drawn else tuple(mirrored))
    return found


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"jitter": 1}, BY_1_PIXEL),
        ({"flip": True}, [(0,), (1,)]),
        ({"jitter": 1, "flip": True}, [(*shift, mirrored) for shift in BY_1_PIXEL for mirrored in (0, 1)]),
    ],
)
def test_where_there_are_few_views_each_image_has_all_of_them_once(how: dict[str, Any], wanted: list[Any]) -> None:
    views = fixed(100, **how)
    assert views.count == len(wanted)
    for i in range(views.size):
        assert sorted(seen(views, i)) == wanted


def test_shifts_by_up_to_2_pixels_are_25_views_and_crops_are_countless() -> None:
    assert fixed(1_000, jitter=2).count == 25
    assert fixed(24, jitter=2).count == 24
    assert fixed(1_000, jitter=2, cutout=1).count == fixed(1_000, elastic=1).count == 1_000


def test_fewer_views_differ_within_an_image_and_are_all_equally_likely() -> None:
    from scipy.stats import chisquare

    views = fixed(4, size=9_000, jitter=1)
    codes = torch.stack([views.draw(k)["jitter"] @ torch.tensor([3, 1]) for k in range(4)])
    assert all(len(set(column)) == 4 for column in codes.T.tolist())
    for one in codes:
        assert chisquare(torch.bincount(one, minlength=9).numpy()).pvalue > 0.001


def test_views_of_crops_differ_by_image_and_by_number() -> None:
    crops = torch.cat([fixed(3, crop=0.5).draw(k)["crop"] for k in range(3)])
    assert len(crops.unique(dim=0)) == 3 * 40


def test_an_epoch_sees_each_sample_in_one_of_its_own_views() -> None:
    how = recipe(jitter=1, flip=True, crop=0.5, elastic=2, cutout=2)
    transfer = torch.tensor([7, 3, 19, 0, 11] * 40)
    views = Views(Split(torch.zeros(200), torch.zeros(200), 255), how, 5, Fixed(how, 6, 20, transfer))
    drawn, order, numbers = views.draw(2), views.order(2), list[int]()
    for j in range(200):
        k, position = divmod(int(drawn["kept"][j]), 20)
        assert position == transfer[order[j]]
        one = views.fixed.draw(k) if views.fixed else {}
        assert list(one) == ["jitter", "flip", "crop", "elastic", "cutout"]
        assert all(torch.equal(draws[position], drawn[name][j]) for name, draws in one.items())
        numbers.append(k)
    assert all(15 < numbers.count(k) < 60 for k in range(6))  # of 33 on average
    assert torch.equal(views.draw(2)["kept"], drawn["kept"])
    for other in (views.draw(3), Views(views.images, how, 6, views.fixed).draw(2)):
        assert not torch.equal(other["kept"] // 20, drawn["kept"] // 20)


# The logits.


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of the digits, and of somebody's own images two convolutional ones."""
    folder = Shell(tmp_path_factory.mktemp("views")).folder
    for words in (["train-teacher", "tiny.yaml"], ["ensemble", "own.yaml", "--jobs", "1"]):
        done = kd_here(folder, *words)
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def folder(taught: Path, tmp_path: Path) -> Path:
    return shutil.copytree(taught, tmp_path / "copy")


def teacher_run(folder: Path, kind: str = "tiny/train-teacher") -> Run:
    (path,) = (folder / "runs" / kind).glob("0-*")
    return open_run(folder / "runs", str(path))


def distil(folder: Path, *words: str, command: str = "distill", experiment: str = "tiny.yaml") -> str:
    """Train students; what was said on the way."""
    done = kd_here(folder, command, experiment, "--jobs", "1", *words)
    assert done.code == 0, done.err
    return done.err


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("views-*.npy"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images teachers are asked about for views that are kept, by batch."""
    found = list[int]()

    def counted(run: Run, device: torch.device) -> list[nn.Module]:
        made = nets(run, device)
        for net in made:
            net.register_forward_pre_hook(lambda _, inputs: found.append(len(inputs[0])))
        return made

    monkeypatch.setattr(kept, "nets", counted)
    return found


class Answer(NamedTuple):
    rows: Tensor
    x: Tensor
    logits: Tensor


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """What students saw, and what their teacher said of it."""
    found = list[Answer]()

    def heard(*given: Any) -> Teacher:
        teacher = kept_views(*given)

        def logits(rows: Tensor, x: Tensor) -> Tensor:
            found.append(Answer(rows, x.clone(), teacher.logits(rows, x)))
            return found[-1].logits

        return Teacher(logits, teacher.average, teacher.weights, teacher.views)

    monkeypatch.setattr(train, "kept_views", heard)
    return found


def check_answers(answers: list[Answer], run: Run) -> None:
    """Against the nets themselves, asked about the very images that the student saw."""
    asked = nets(run, CPU)
    for rows, x, logits in answers:
        assert logits.shape == (len(asked), len(rows), len(run.spec.dataset.classes))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, torch.stack([net(x) for net in asked]), atol=1e-4, rtol=1e-4)


def test_kept_logits_are_those_of_the_views_that_students_see(folder: Path, answers: list[Answer]) -> None:
    said = distil(folder, *SHIFTED)
    assert (
        f"is asked about {K} views of each of 1,297 images, once for all epochs and all students that see these\n"
        in said
    )
    assert len(answers) == 6 * 26
    check_answers(answers, teacher_run(folder))
    one, other = (torch.cat([a.rows for a in answers[i : i + 26]]) for i in (0, 26))
    assert torch.equal((one % N).sort()[0], torch.arange(N))
    assert not torch.equal(one.sort()[0], other.sort()[0])  # an epoch sees other views than the one before


def test_kept_logits_of_an_ensemble_lie_with_its_members(folder: Path, answers: list[Answer]) -> None:
    more = ["--set", CROPPED, "--set", "distill.views=2", "--set", "distill.teacher=ensemble"]
    distil(folder, *more, experiment="own.yaml")
    run = teacher_run(folder, "own/ensemble")
    assert sorted(file.parent.name for file in files(folder)) == sorted(Path(n).name for n in run.spec.parents)
    assert [np.load(file).shape for file in files(folder)] == [(2, 120, 3)] * 2
    check_answers(answers, run)
    assert not torch.allclose(answers[0].logits[0], answers[0].logits[1], atol=1e-2)


MIXED = ["--set", "student.train.mixup=0.4", "--set", "student.train.flip=true", "--set", f"distill.views={K}"]


def test_kept_logits_of_blended_images_are_those_of_the_blends_that_students_see(
    folder: Path, asked: list[int], answers: list[Answer]
) -> None:
    distil(folder, *MIXED, "--no-baseline")
    distil(folder, *MIXED, "--no-baseline", "--T", "2")
    assert sum(asked) == K * N
    assert len(answers) == 2 * 6 * 26
    check_answers(answers, teacher_run(folder))


def test_a_student_of_fewer_classes_sees_no_blend_with_another(
    folder: Path, asked: list[int], answers: list[Answer]
) -> None:
    """The blends of its own transfer set are asked for, in files of their own."""
    distil(folder, *MIXED, "--no-baseline")
    distil(folder, *MIXED, command="omit-classes")
    spec = teacher_run(folder, "tiny/omit-classes").spec
    left = open_dataset(spec.data).seen(spec).labels
    assert 3 not in left
    shapes = [np.load(file).shape for file in files(folder)]
    assert sorted(shapes) == [(K, len(left), 10), (K, N, 10)]
    assert sum(asked) == K * (N + len(left))
    check_answers(answers, teacher_run(folder))


def test_blends_of_images_that_nobody_labelled_are_kept_too(folder: Path) -> None:
    images = Split(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1), torch.tensor([0, 1, 2, 1, 0, -1, -1, -1]), 1)
    how = recipe(mixup=0.5, batch_size=8)
    kept_blends = Fixed(how, 2, 8, torch.arange(8))
    for k in range(2):
        drawn = kept_blends.draw(k)
        assert sorted(drawn["partner"].tolist()) == list(range(8))
        assert not (drawn["partner"] == torch.arange(8)).any()  # none is blended with itself
    views = Views(images, how, 0, kept_blends)
    order, drawn = views.order(0), views.draw(0)
    x, share = views.view(order, drawn), drawn["mixup"]
    torch.testing.assert_close(x.flatten(), share * order + (1 - share) * drawn["partner"])
    assert torch.equal(views.view(order, drawn, slice(1, None, 2)), x[1::2])  # what one of two processes computes


def test_each_image_of_a_kept_blend_is_augmented_by_draws_of_its_own() -> None:
    stored = torch.randint(1, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, all_of_them = Split(stored, torch.zeros(6, dtype=torch.long), 255), torch.arange(6)
    both = recipe(mixup=0.5, cutout=4, jitter=1, flip=True, batch_size=6)
    for k in range(3):
        drawn = Fixed(both, 3, 6, all_of_them).draw(k)
        alone = {name: drawn[name] for name in ("cutout", "jitter", "flip")}  # of a view of each image, unblended
        augmented, share = Views(images, both, 0).view(all_of_them, alone), drawn["mixup"].view(6, 1, 1, 1)
        blended = Views(images, both, 0).view(all_of_them, drawn)
        torch.testing.assert_close(blended, share * augmented + (1 - share) * augmented[drawn["partner"]])


def test_students_seeds_and_losses_share_what_was_asked_once(
    folder: Path, asked: list[int], answers: list[Answer]
) -> None:
    name = teacher_run(folder).name
    distil(folder, *SHIFTED, "--teacher", name, "--seeds", "0,1")
    assert sum(asked) == K * N
    assert len(answers) == 2 * 6 * 26
    said = distil(folder, *SHIFTED, "--T", "2") + distil(folder, *SHIFTED, command="omit-classes")
    assert "is asked about" not in said
    assert sum(asked) == K * N
    assert len(files(folder)) == 1
    omitted = answers[3 * 6 * 26 :]
    assert len(omitted) == 6 * 20  # without 3 and the held-out images 982 are left
    check_answers(answers, teacher_run(folder))
    other = distil(folder, "--set", "student.train.jitter=1", "--set", "distill.views=50")
    assert (
        "9 views of each of 1,297 images, once for all epochs and all students that see these, all that there are: "
        in other
    )
    assert sum(asked) == (K + 9) * N


def kept_of(run: Run, half: bool = False, key: str = "digits", most: int = K, **views: object) -> Teacher:
    images = open_dataset(run.spec.data).train
    how = fixed(most, len(images), **views or {"jitter": 1})
    return kept_views(run, images, key, how, half, CPU, lambda _: None)


def test_the_file_is_named_by_all_that_it_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = teacher_run(folder)
    kept_of(run)
    kept_of(run)
    assert len(files(folder)) == 1
    for i, more in enumerate([{"most": 4}, {"half": True}, {"key": "others"}, {"flip": True}, {"cutout": 2}]):
        kept_of(run, **more)  # type: ignore[arg-type]
        assert len(files(folder)) == 2 + i
    monkeypatch.setattr(kept, "weights_checksum", lambda _: "of other weights")
    kept_of(run)
    assert len(files(folder)) == 7


def test_float16_halves_the_file_and_is_used_as_float32(folder: Path) -> None:
    run = teacher_run(folder)
    whole, rows, x = kept_of(run), torch.arange(K * N), torch.empty(0)
    (exact,) = files(folder)
    half = kept_of(run, half=True)
    (rounded,) = {*files(folder)} - {exact}
    assert np.load(rounded).dtype == np.float16
    assert exact.stat().st_size - rounded.stat().st_size == 2 * K * N * 10
    assert half.logits(rows, x).dtype == torch.float32
    assert torch.equal(half.logits(rows, x), whole.logits(rows, x).half().float())
    assert np.array_equal(np.load(exact).reshape(1, -1, 10), whole.logits(rows, x))


def test_logits_beyond_float16_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "nets", lambda *_: [lambda x: torch.full((len(x), 10), 7e4)])
    with pytest.raises(BadInput, match=r"^distill\.half: float16 does not hold the teacher's logits: remove it$"):
        kept_of(teacher_run(folder), half=True)


@pytest.mark.parametrize("damage", ["cut short", "another header", "a byte of view 1", "a checksum"])
def test_a_damaged_file_is_noticed_and_made_again(folder: Path, asked: list[int], damage: str) -> None:
    kept_of(teacher_run(folder))
    (file,) = files(folder)
    content = file.read_bytes()
    of_view_1 = len(content) - (K - 1) * 4 * 10 * N + 99
    broken, sums = file.with_suffix(".done") if damage == "a checksum" else file, file.with_suffix(".done").read_bytes()
    places = {"another header": 60, "a byte of view 1": of_view_1, "a checksum": len(sums) - 1}
    changed = bytearray(broken.read_bytes())
    if damage in places:
        changed[places[damage]] ^= 1
    broken.write_bytes(changed[:-1] if damage == "cut short" else changed)
    asked.clear()
    kept_of(teacher_run(folder))
    assert (file.read_bytes(), file.with_suffix(".done").read_bytes()) == (content, sums)
    assert sum(asked) == N * (1 if damage in ("a byte of view 1", "a checksum") else K)


def test_a_resumed_training_is_bit_for_bit_the_same(folder: Path) -> None:
    teacher, images = kept_of(teacher_run(folder)), open_dataset(teacher_run(folder).spec.data).train

    def tensors(begun: State, epochs: int) -> dict[str, Tensor]:
        with seeded(0, "init"):
            net = MLP(64, [8], 10)
        trained = fit(net, images, recipe(jitter=1), 3, teacher=teacher, distill=LOSS, start=begun)
        return next({n: t.clone() for n, t in e.state().items()} for e in trained if e.epoch == epochs)

    whole, half = tensors(State(0, {}), 4), tensors(State(0, {}), 2)
    resumed = tensors(State(2, half), 4)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not any(torch.equal(tensor, half[name]) for name, tensor in whole.items() if name.startswith("net/"))


# Processes.


def logged(patch: pytest.MonkeyPatch, dies: bool = False) -> None:
    """Write down which views are asked for; take a moment for each, or die in the middle of the second."""
    ask = kept._answers

    def slowly(net: nn.Module, images: Split, fixed: Fixed, k: int, device: torch.device) -> Iterator[Tensor]:
        with Path("asked").open("a") as file:
            file.write(f"{k}\n")
        for i, part in enumerate(ask(net, images, fixed, k, device)):
            if dies and k == 1 and i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
            yield part

    patch.setattr(kept, "_answers", slowly)


def dying(patch: pytest.MonkeyPatch) -> None:
    logged(patch, dies=True)


def words(*more: str) -> list[str]:
    return ["distill", "tiny.yaml", "--no-baseline", *SHIFTED, "--epochs", "1", *more]


def test_killed_while_asking_what_was_finished_is_not_asked_again(folder: Path, asked: list[int]) -> None:
    with Forked(folder, words(), dying) as process:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert (folder / "asked").read_text().split() == ["0", "1"]
    done = kd_here(folder, *words())
    assert done.code == 0, done.err
    assert f"is asked about 2 of {K} views of each of 1,297 images" in done.err
    assert sum(asked) == 2 * N
    (file,) = files(folder)
    content = file.read_bytes()
    file.unlink()
    kept_of(teacher_run(folder), key=f"{teacher_run(folder).spec.dataset.fingerprint} None")
    assert files(folder)[0].read_bytes() == content


def test_of_two_processes_at_once_one_asks_and_the_other_waits(folder: Path, tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("a", "b")]
    for other in others:
        other.mkdir()
        for name in ("tiny.yaml", "runs"):
            (other / name).symlink_to(folder / name)
        (other / "asked").symlink_to(folder / "asked")
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(Forked(other, words("--T", str(T)), logged))
            for other, T in zip(others, (2, 3), strict=True)
        ]
        said = [process.communicate()[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    assert (folder / "asked").read_text().split() == [str(k) for k in range(K)]
    assert sum("is asked about" in text for text in said) == 1


def test_kd_runs_counts_the_bytes_and_removes_the_file(folder: Path) -> None:
    def size() -> int:
        listed = kd_here(folder, "runs", "--json").json["runs"]
        return int(next(run["bytes"] for run in listed if run["run"] == name))

    name = teacher_run(folder).name
    before = size()
    distil(folder, *SHIFTED)
    (file,) = files(folder)
    assert size() == before + file.stat().st_size + file.with_suffix(".done").stat().st_size
    assert "finished before" in distil(folder, *SHIFTED)
    assert kd_here(folder, "runs", "rm", name, "--force", "--yes").code == 0
    assert not files(folder)


# What is said beforehand.


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        ("distill.views=3", "has no use, since no student's train is augmented: remove it"),
        ("distill.half=true", "belongs to views: remove it"),
    ],
)
def test_views_without_use_are_refused(folder: Path, sets: str, wanted: str) -> None:
    done = kd_here(folder, "distill", "tiny.yaml", "--set", sets)
    assert done.code == 2
    assert wanted in done.err
    assert len(done.err.splitlines()) == 1


def all_planned(folder: Path, *sets: str) -> tuple[list[Job], Dataset]:
    experiment = load(str(folder / "tiny.yaml"), [parse_set(text) for text in sets]).experiment
    dataset = open_dataset(experiment.data)
    return plan([experiment], dataset), dataset


def planned(folder: Path, *sets: str) -> tuple[list[Spec], Dataset]:
    """The students of the tiny experiment."""
    jobs, dataset = all_planned(folder, *sets)
    return [job.spec for job in jobs if job.row.name == "student"], dataset


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        (
            ["student.train.flip=true", "student.train.epochs=4"],
            "4 passes; --set distill.views=2 would keep 2 views of each: 2 passes",
        ),
        (["student.train.flip=true", "student.train.epochs=3"], ""),
        (
            ["student.train.crop=0.8", "student.train.epochs=16"],
            "16 passes; --set distill.views=8 would keep 8 views of each: 8 passes",
        ),
        (["student.train.crop=0.8", "student.train.epochs=15"], ""),
        (
            ["student.train.crop=0.8", "student.train.epochs=16", "data.transfer=1000"],
            "",
        ),  # the views are of all images
        (["student.train.crop=0.8", "student.train.mixup=0.5", "student.train.epochs=16"], ""),
        (["student.train.flip=true", "student.train.epochs=4", "distill.views=2"], ""),
        (["student.train.epochs=9"], ""),
    ],
)
def test_a_hint_where_kept_views_would_ask_less(folder: Path, more: list[str], hint: str) -> None:
    specs, dataset = planned(folder, *more)
    said = estimate.cheaper(specs, dataset)
    assert said == (f"the teacher is asked about every image in every epoch, {hint}" if hint else "")


def test_a_hint_where_kept_views_ask_more(folder: Path) -> None:
    more = ["student.train.crop=0.8", "student.train.epochs=3"]
    said = "distill.views asks the teacher about 6 views of every image; without it, in 3 passes"
    assert estimate.cheaper(*planned(folder, *more, "distill.views=6")) == said
    assert estimate.cheaper(*planned(folder, *more, "distill.views=5")) == ""
    assert estimate.cheaper(*planned(folder, *more, "distill.views=6", "distill.teacher=ensemble", "seed=[0, 1]")) == ""


def test_the_hint_is_told_once_on_stderr(folder: Path) -> None:
    flip = ["--set", "student.train.flip=true", "--epochs", "4", "--jobs", "1"]
    done = kd_here(folder, "distill", "tiny.yaml", "--json", "--no-baseline", *flip)
    assert done.code == 0, done.err
    assert done.err.count("--set distill.views=2") == 1
    assert "set distill.views" not in done.out
    json.loads(done.out)


@pytest.mark.parametrize("view", ["jitter=1", "mixup=0.3"])
def test_an_estimate_counts_the_passes_once_for_each_teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    monkeypatch.setattr(estimate, "_timed", lambda *_: (1.0, 0.0, 0.01))
    sets = [f"student.train.{view}", "student.train.epochs=2", f"distill.views={K}", "distill.teacher=ensemble"]
    jobs, dataset = all_planned(folder, *sets, "seed=[0, 1]")
    specs = [job.spec for job in jobs if job.row.name == "student"]
    spent = estimate.seconds(specs, [job.spec for job in jobs], dataset, Places(folder / "runs"))
    assert [spent[spec.name] for spec in specs] == [pytest.approx(2 * 26 + K * N * 0.01), 2 * 26]


def test_an_estimate_counts_blends_of_other_images_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two omissions that leave as many images."""
    monkeypatch.setattr(estimate, "_timed", lambda *_: (0.0, 0.0, 1.0))
    more = [f"distill.views={K}", "data.heldout=200", "omit_classes=[{omit: [0]}, {omit: [2]}]"]
    for view, counted in (("mixup=0.3", [True, True]), ("jitter=1", [True, False])):
        jobs, dataset = all_planned(folder, f"student.train.{view}", *more)
        students = [job.spec for job in jobs if job.spec.omitted]
        spent = estimate.seconds(students, [job.spec for job in jobs], dataset, Places(folder / "runs"))
        assert [spent[spec.name] > 0 for spec in students] == counted


def test_an_estimate_knows_a_teacher_that_is_not_planned(folder: Path) -> None:
    """Of a run that was named, from another experiment."""
    name, asked = teacher_run(folder).name, list[Sequence[Spec]]()

    def timed(_: Spec, teachers: Sequence[Spec], *__: object) -> estimate.Times:
        asked.append(teachers)
        return 1.0, 0.0, 0.01

    specs, dataset = planned(folder, "student.train.jitter=1", f"distill.views={K}")
    (spec,) = (spec.model_copy(update={"parents": [name]}) for spec in specs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "_timed", timed)
        estimate.seconds([spec], [spec], dataset, Places(folder / "runs"))
    assert asked == [[teacher_run(folder).spec]]


def test_a_batch_larger_than_the_images_is_timed_as_it_is_trained(folder: Path) -> None:
    (spec,), dataset = planned(folder, "student.train.batch_size=100000")
    sizes = list[int]()

    def fitted(_: nn.Module, images: Split, *__: object, **___: object) -> Iterator[None]:
        sizes.append(len(images))
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "fit", fitted)
        estimate.seconds([spec], [spec], dataset, Places(folder / "runs"))
    assert set(sizes) == {N}


def test_kept_views_are_timed_apart_from_the_steps(folder: Path) -> None:
    """Of a teacher that takes many times as long as its student."""
    times = []
    for views in ([], [f"distill.views={K}"]):
        (spec,), dataset = planned(folder, "student.train.jitter=1", *views)
        teacher = spec.model_copy(update={"model": Model(hidden=[4_000, 4_000])})
        times.append(estimate._timed(spec, [teacher], dataset, CPU))
    (live, _, nothing), (step, _, view) = times
    assert 3 * step < live
    assert 3 * nothing * 50 < step < view * 50
