"""The training loop, and the teachers that it asks: against steps by hand and loops of plain torch."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shell, kd_here
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdcli import BadInput
from kdcli.config import Data, Distill, Model, Train
from kdcli.data import augment
from kdcli.data.dataset import Split, open_dataset
from kdcli.machine.device import generator, place, seeded
from kdcli.nets.models import MLP, Normalised
from kdcli.runs.directory import Run, State, open_run
from kdcli.runs.spec import Epoch, Spec
from kdcli.teachers import teacher
from kdcli.teachers.teacher import Teacher, cached, kept_logits, live, predict
from kdcli.training import train as training
from kdcli.training.fit import Fitted, fit, learning_rate, make_optimizer

DIGITS = open_dataset(Data(name="digits", heldout=200))
CPU, STEPS = torch.device("cpu"), 26  # an epoch of the 1,297 images in batches of 50
HARD = Distill(T=20, lambda1=0.0, lambda2=1.0)


def train(**settings: Any) -> Train:
    return Train.model_validate({"epochs": 2, "batch_size": 50, "optimizer": "sgd", "lr": 0.1} | settings)


def net(**options: Any) -> MLP:
    with seeded(0, "init"):
        return MLP(64, [20], 10, **options)


def droppy() -> MLP:
    return net(dropout=0.5, input_dropout=0.2)


def conv(dropout: float = 0.3) -> nn.Module:
    """A net as somebody else would write it: its buffers move, and it draws from the global generator."""
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def last(model: nn.Module, settings: Train, seed: int = 0, images: Split = DIGITS.train, **how: Any) -> Fitted:
    *_, fitted = fit(model, images, settings, seed, **how)
    return fitted


def trained(settings: Train, seed: int = 0, make: Callable[[], nn.Module] = net, **how: Any) -> nn.Module:
    return last(make(), settings, seed, **how).net


def weights(model: nn.Module) -> Tensor:
    """All parameters and buffers."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])


def distilling(logits: Tensor, **settings: float) -> dict[str, Any]:
    """How to distil from logits [M, N, C] of the training images."""
    return {"teacher": Teacher(lambda index, _: logits[:, index]), "distill": Distill.model_validate(settings)}


def errors(model: nn.Module) -> int:
    return int((predict(model, DIGITS.test).argmax(1) != DIGITS.test.labels).sum())


# A step.


@pytest.mark.parametrize("distilled", [False, True])
def test_one_step_is_the_optimizers_step_by_hand(distilled: bool) -> None:
    """Plain SGD on the whole set for one epoch: w - lr * gradient of the mean loss."""
    settings = train(epochs=1, batch_size=1297, momentum=0, schedule="constant")
    start, taught = net(), 5 * torch.rand(1297, 10, generator=generator(0, "taught"))
    logits = start(DIGITS.train.inputs(torch.arange(len(DIGITS.train))))
    loss, how = F.cross_entropy(logits, DIGITS.train.labels), dict[str, Any]()
    if distilled:
        p, log_q = (taught / 4).softmax(1), (logits / 4).log_softmax(1)
        loss = 0.7 * 16 * F.kl_div(log_q, p, reduction="batchmean") + 0.2 * loss
        how = distilling(taught[None], T=4, lambda1=0.7, lambda2=0.2)
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    wanted = [(p - 0.1 * g).detach().flatten() for p, g in zip(start.parameters(), gradients, strict=True)]
    assert torch.allclose(weights(trained(settings, **how)), torch.cat(wanted).double(), atol=1e-6)


PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("make", [net, lambda: conv(dropout=0)])
def test_training_is_that_of_a_plain_torch_loop(name: str, make: Callable[[], nn.Module]) -> None:
    settings = train(optimizer=name, lr=0.01, weight_decay=0.01, warmup=0.5)
    theirs = make()
    optimizer = PLAIN[name](theirs.parameters(), lr=1.0, weight_decay=0.01, fused=False, foreach=False)
    for epoch in range(2):
        order = torch.randperm(1297, generator=generator(3, "order", epoch))
        for i, index in enumerate(order.split(50)):
            step = STEPS * epoch + i
            optimizer.param_groups[0]["lr"] = 0.01 * ((step + 1) / 13 if step < 13 else (52 - step) / 39)
            optimizer.zero_grad()
            F.cross_entropy(theirs(DIGITS.train.inputs(index)), DIGITS.train.labels[index]).backward()
            optimizer.step()
    assert torch.allclose(weights(trained(settings, 3, make)), weights(theirs), atol=1e-4)


def test_schedules_by_hand() -> None:
    """10 epochs of 10 steps at lr 1, from step 0 to 99; the rate would be 0 at step 100."""
    kinds = ("constant", "linear", "cosine")
    rates = {s: [learning_rate(train(epochs=10, lr=1.0, schedule=s), i, 10) for i in range(100)] for s in kinds}
    assert set(rates["constant"]) == {1.0}
    assert rates["linear"][0] == 1
    assert rates["linear"][50] == 0.5
    assert rates["linear"][99] == pytest.approx(0.01)
    assert rates["cosine"][0] == 1
    assert rates["cosine"][50] == pytest.approx(0.5)
    assert rates["cosine"][25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    rising = [learning_rate(train(epochs=3, lr=1.0, warmup=2.9), i, 3) for i in range(10)]  # to one step past the end
    assert rising[8:] == [1, 1]
    warm = [learning_rate(train(epochs=10, lr=1.0, warmup=2.0), i, 10) for i in range(100)]
    assert warm[0] == pytest.approx(0.05)
    assert warm[19] == 1
    assert warm[20] == 1
    assert warm[60] == pytest.approx(0.5)


@pytest.mark.parametrize("done", [0, 2])
def test_every_step_has_the_rate_of_its_number_after_a_resume_too(done: int) -> None:
    settings, rates = train(epochs=3, batch_size=500, lr=0.5, warmup=1.5, schedule="cosine"), list[float]()
    start = list(fit(net(), DIGITS.train, settings.model_copy(update={"epochs": 2}), 0))[-1].state()
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        last(net(), settings, start=State(done, start if done else {}))
    finally:
        hook.remove()
    assert rates == pytest.approx([learning_rate(settings, i, 3) for i in range(3 * done, 9)])


def test_max_norm_holds_after_every_epoch() -> None:
    for epoch in fit(net(), DIGITS.train, train(max_norm=0.8), 0):
        assert isinstance(epoch.net, MLP)
        assert float(epoch.net.linears()[0].weight.detach().norm(dim=1).max()) <= 0.8 + 1e-5


# An epoch.


def test_every_sample_counts_once_an_epoch_the_last_batch_too() -> None:
    """At a learning rate that moves nothing, the epoch's means are those of the untouched net over all 1,297."""
    settings, taught = train(epochs=1, batch_size=500, lr=1e-30, momentum=0), torch.rand(1, 1297, 10)
    logits = net()(DIGITS.train.inputs(torch.arange(len(DIGITS.train)))).detach()
    hard = float(F.cross_entropy(logits, DIGITS.train.labels))
    wrong = int((logits.argmax(1) != DIGITS.train.labels).sum())
    alone = last(net(), settings)
    assert (alone.epoch, alone.train_errors, alone.t2_kl) == (1, wrong, None)
    assert (alone.loss, alone.hard_loss) == pytest.approx((hard, hard), rel=1e-5)
    student = last(net(), settings, **distilling(taught, T=4, lambda1=0.7, lambda2=0.2))
    kl = F.kl_div((logits / 4).log_softmax(1), (taught[0] / 4).log_softmax(1), reduction="batchmean", log_target=True)
    assert student.train_errors == wrong
    assert student.hard_loss == pytest.approx(hard, rel=1e-5)
    assert student.t2_kl == pytest.approx(16 * float(kl), rel=1e-4)
    assert student.loss == pytest.approx(0.7 * 16 * float(kl) + 0.2 * hard, rel=1e-4)


def test_the_first_step_without_a_finite_loss_is_named() -> None:
    asked = list[int]()

    def logits(index: Tensor, _: Tensor) -> Tensor:
        asked.append(len(index))
        return torch.full((1, len(index), 10), math.nan if len(asked) > 30 else 0.0)

    found = fit(net(), DIGITS.train, train(epochs=3), 0, teacher=Teacher(logits), distill=HARD)
    assert [fitted.diverged_at for fitted in found] == [None, 30, 2 * STEPS]


def test_a_net_trains_in_train_mode_whatever_was_done_between_the_epochs() -> None:
    model = droppy()
    for fitted in fit(model, DIGITS.train, train(), 0):
        assert fitted.net is model
        assert model.training
        predict(model, DIGITS.test)
        assert model.training
        model.eval()  # even a caller who forgets it trains on with dropout
    assert torch.equal(weights(model), weights(trained(train(), make=droppy)))


def test_predict_asks_for_logits_without_dropout_in_order() -> None:
    model = net(dropout=0.5, input_dropout=0.5)
    logits = predict(model, DIGITS.test)
    model.eval()
    assert torch.allclose(logits, model(DIGITS.test.inputs(torch.arange(len(DIGITS.test)))), atol=1e-5)


# Random draws.


OPTIONS: list[dict[str, Any]] = [{}, {"jitter": 1}, {"optimizer": "adam", "lr": 1e-3, "ema": 0.9}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", [droppy, conv])
def test_a_seed_gives_the_same_weights_and_another_does_not(
    options: dict[str, Any], make: Callable[[], nn.Module]
) -> None:
    images = DIGITS.train.store.clone()
    one, same, other = (weights(trained(train(**options), seed, make)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(images, DIGITS.train.store)


@pytest.mark.parametrize("make", [droppy, conv])
def test_the_global_generators_play_no_part_and_are_left_alone(make: Callable[[], nn.Module]) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]

    found = []
    for draw in (1, 2):
        torch.manual_seed(draw)
        model, before = make(), states()
        for _ in fit(model, DIGITS.train, train(jitter=1), 0):
            assert states() == before
            torch.rand(draw)
            before = states()
        found.append(weights(model))
    assert torch.equal(*found)


# Averaged weights.


@pytest.mark.parametrize("make", [net, conv])
def test_ema_is_the_exponential_average_of_weights_and_buffers(make: Callable[[], nn.Module]) -> None:
    """The whole set a step: after the first the average is the stepped net, then its decay is 2/11, 0.22 in place of
    3/12, and 0.22. What counts batches is copied."""
    settings, model = train(epochs=4, batch_size=1297, ema=0.22), make()
    averages, stepped = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
    for fitted in fit(model, DIGITS.train, settings, 0):
        assert fitted.net is not model
        averages.append({name: t.clone() for name, t in fitted.net.state_dict().items()})
        stepped.append({name: t.clone() for name, t in model.state_dict().items()})
    wanted = stepped[0]
    for average, now, decay in zip(averages, stepped, [0, 2 / 11, 0.22, 0.22], strict=True):
        for name, tensor in now.items():
            moves = tensor.is_floating_point()
            wanted[name] = decay * wanted[name] + (1 - decay) * tensor if moves else tensor
        assert average.keys() == wanted.keys()
        assert all(torch.allclose(average[name], wanted[name], atol=1e-6) for name in wanted)
    assert not torch.allclose(weights(fitted.net), weights(model), atol=1e-3)


def test_averaging_does_not_change_what_is_trained() -> None:
    model = conv()
    last(model, train(ema=0.9))
    assert torch.equal(weights(model), weights(trained(train(), make=conv)))


def test_a_long_ema_does_not_keep_the_random_start() -> None:
    assert errors(trained(train(epochs=20, ema=0.99999))) < 50


# Resuming.


RECIPES: list[dict[str, Any]] = [
    {},
    {"max_norm": 1.0, "schedule": "cosine", "warmup": 1.5},
    {"ema": 0.9},
    {"optimizer": "adam", "lr": 1e-3},
    {"optimizer": "adam", "lr": 1e-3, "ema": 0.9},
    {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    {"optimizer": "adamw", "lr": 1e-3, "ema": 0.9},
]


def kept(folder: Path, settings: Train, fitted: Fitted) -> State:
    """A state after it was written to a run directory and read again."""
    about: dict[str, Any] = {"experiment": "e", "command": "train-teacher", "dataset": DIGITS.facts, "train": settings}
    run = Run(folder, Spec(seed=0, data=Data(name="digits"), model=Model(hidden=[20]), **about))
    run.path.mkdir(parents=True)
    for i in range(fitted.epoch):
        run.log(Epoch(epoch=i + 1, loss=1, hard_loss=1, train_errors=1, test_errors=1, seconds=1, images_per_s=1))
    run.save_state(State(fitted.epoch, fitted.state()))
    return run.load_state(pytest.fail)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("make", [droppy, conv])
def test_resumed_is_uninterrupted_bit_for_bit(
    make: Callable[[], nn.Module], recipe: dict[str, Any], tmp_path: Path
) -> None:
    settings = train(epochs=3, jitter=1, **recipe)
    whole = fit(make(), DIGITS.train, settings, 0)
    state = kept(tmp_path, settings, next(whole))
    *_, wanted = whole
    found = last(make(), settings, start=state)
    assert found[:-2] == wanted[:-2]  # the counts of the last epoch
    states = found.state(), wanted.state()
    for one, other in [(found.net.state_dict(), wanted.net.state_dict()), states]:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "other", [({"ema": 0.9}, net), ({}, conv), ({}, lambda: MLP(64, [21], 10)), ({"optimizer": "adam"}, net)]
)
def test_a_state_of_another_training_is_refused(other: tuple[dict[str, Any], Callable[[], nn.Module]]) -> None:
    recipe, make = other
    state = State(1, next(fit(net(), DIGITS.train, train(), 0)).state())
    with pytest.raises(BadInput, match="the saved training state does not belong to this net and optimizer"):
        next(fit(make(), DIGITS.train, train(**recipe), 0, start=state))


# Teachers.


def test_students_learn_the_teachers_logits_and_ignore_labels_when_lambda2_is_0() -> None:
    master = trained(train(epochs=20))
    logits = predict(master, DIGITS.train)
    wrong = Split(DIGITS.train.store, torch.zeros_like(DIGITS.train.labels), DIGITS.train.white)
    how = distilling(logits[None], T=4, lambda1=1.0, lambda2=0.0)
    with seeded(1, "init"):
        student = MLP(64, [20], 10)
    first, *_, end = (e.t2_kl for e in fit(student, wrong, train(epochs=20), 0, **how))
    assert first
    assert end
    assert end < 0.05 * first
    agreement = predict(student, DIGITS.test).argmax(1) == predict(master, DIGITS.test).argmax(1)
    assert float(agreement.double().mean()) > 0.95


def test_lambda1_0_is_the_baseline() -> None:
    student = trained(train(), teacher=Teacher(lambda i, _: torch.rand(1, len(i), 10)), distill=HARD)
    assert torch.allclose(weights(student), weights(trained(train())), atol=1e-6)


@pytest.mark.parametrize("jitter", [0, 1])
def test_a_teacher_sees_what_its_student_sees_before_dropout(jitter: int) -> None:
    seen = list[tuple[Tensor, Tensor]]()

    def logits(index: Tensor, x: Tensor) -> Tensor:
        seen.append((index, x.clone()))
        return torch.zeros(1, len(index), 10)

    student, met = net(input_dropout=0.5), list[Tensor]()
    student.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].clone()))
    last(student, train(epochs=1, jitter=jitter), teacher=Teacher(logits), distill=HARD)
    assert torch.cat([index for index, _ in seen]).sort()[0].equal(torch.arange(1297))
    assert all(torch.equal(x, own) for (_, x), own in zip(seen, met, strict=True))
    shifted = [index for index, x in seen if not torch.equal(x, DIGITS.train.inputs(index))]
    assert len(shifted) == (STEPS if jitter else 0)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two teachers with BatchNorm and nn.Dropout were trained, on images of somebody's own."""
    folder = Shell(tmp_path_factory.mktemp("own")).folder
    done = kd_here(folder, "ensemble", "own.yaml", "--jobs", "1")
    assert done.code == 0, done.err
    return folder


def taught_by(folder: Path, kind: str) -> Run:
    (path,) = (folder / "runs" / "own" / kind).glob("0-*")
    return open_run(folder / "runs", str(path))


@pytest.mark.parametrize("kind", ["train-teacher", "ensemble"])
def test_a_cached_teacher_and_a_live_one_say_the_same_of_images_as_they_are(kind: str, own: Path) -> None:
    run = taught_by(own, kind)
    dataset = open_dataset(run.spec.data)
    images, transfer = dataset.train, dataset.transfer_set(["dog"], None)
    index = torch.tensor([5, 0, 40, 5])
    asked, x = live(run, CPU), images.inputs(transfer[index])
    before = x.clone()
    found = asked.logits(index, x)
    assert found.shape == (2 if kind == "ensemble" else 1, 4, 3)
    assert torch.equal(x, before)
    said = cached(run, transfer, len(images), CPU)
    assert torch.equal(said.logits(index, x), kept_logits(run, "train", len(images))[:, transfer[index]])
    assert torch.allclose(said.logits(index, x), found, atol=1e-4)
    shift = torch.tensor([[0, 2], [2, 2], [0, 0], [2, 1]])
    moved = images.scaled(augment.shift(images.images(transfer[index]), shift, 1))
    of_moved = asked.logits(index, moved)
    assert not torch.allclose(of_moved, found, atol=0.01)
    assert not torch.allclose(of_moved[:, 0], of_moved[:, 3], atol=0.01)  # one image, shifted twice
    assert torch.equal(said.logits(index, moved), said.logits(index, x))


def test_a_live_teacher_stays_frozen_and_in_eval_mode(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its BatchNorm would else learn from the student's images, and its dropout blur the soft targets."""
    asked, modes = list[nn.Module](), set[bool]()
    nets = teacher.nets

    def watched(*arguments: Any) -> list[nn.Module]:
        for one in nets(*arguments):
            one.register_forward_hook(lambda module, *_: modes.add(module.training))
            asked.append(one)
        return asked

    monkeypatch.setattr(teacher, "nets", watched)
    done = kd_here(own, "distill", "own.yaml", "--no-baseline", "--set", "student.train.jitter=1")
    assert done.code == 0, done.err
    (master,), kept = asked, taught_by(own, "train-teacher").load("weights")
    assert modes == {False}
    assert not any(p.requires_grad for p in master.parameters())
    assert master.state_dict().keys() == kept.keys()
    assert all(torch.equal(t, kept[name]) for name, t in master.state_dict().items())


@pytest.mark.parametrize("jitter", [0, 1])
def test_a_student_of_shifted_images_asks_its_teacher_live(
    jitter: int, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def told(way: Callable[..., Teacher], *arguments: Any) -> Teacher:
        asked.append(way.__name__)
        return way(*arguments)

    for way in (cached, live):
        monkeypatch.setattr(training, way.__name__, partial(told, way))
    words = ["--no-baseline", *["--set", "student.train.jitter=1"] * jitter, "--epochs", "1"]
    done = kd_here(own, "distill", "own.yaml", *words)
    assert done.code == 0, done.err
    assert asked == [("cached", "live")[jitter]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [net, conv])
def test_a_gpu_trains_to_the_errors_of_the_cpu(make: Callable[[], nn.Module]) -> None:
    counts = []
    for device in (CPU, torch.device("cuda")):
        images, test = DIGITS.train.to(device), DIGITS.test.to(device)
        found = last(place(make(), device), train(epochs=20, jitter=1), images=images)
        counts.append(int((predict(found.net, test).argmax(1) != test.labels).sum()))
    assert all(abs(one - other) <= 10 for one, other in pairwise(counts))


def test_a_last_batch_of_one_sample_joins_the_one_before() -> None:
    """BatchNorm cannot be trained on a lone sample, and every sample counts."""
    for samples, size, wanted in (
        (33, 16, [16, 17]),
        (34, 16, [16, 16, 2]),
        (32, 16, [16, 16]),
        (1, 16, [1]),
        (3, 1, [1, 1, 1]),
    ):
        images, sizes = DIGITS.train.at(torch.arange(samples)), list[int]()
        student = net()
        student.register_forward_pre_hook(lambda _, x, sizes=sizes: sizes.append(len(x[0])))
        last(student, train(epochs=1, batch_size=size), images=images)
        assert sizes == wanted
        assert train(batch_size=size).steps(samples) == len(wanted)


@pytest.mark.parametrize(
    ("epochs", "samples", "tested", "every"),
    [
        (1, 60_000, 10_000, 1),
        (39, 60_000, 10_000, 1),
        (40, 60_000, 10_000, 2),
        (60, 55_000, 10_000, 3),
        (6, 100, 500, 5),
        (6, 101, 500, 5),
        (6, 99, 500, 6),
        (200, 100, 500, 10),
        (25, 1_200, 0, 1),
    ],
)
def test_errors_are_counted_twenty_times_in_a_training_and_of_no_more_images_than_it_sees(
    epochs: int, samples: int, tested: int, every: int
) -> None:
    assert train(epochs=epochs).tested_every(samples, tested) == every


def test_max_norm_bounds_a_perceptron_whose_inputs_are_normalised_too() -> None:
    inner = net()
    last(Normalised(inner, [0.5], [0.25]), train(epochs=1, max_norm=0.1))
    assert float(inner.linears()[0].weight.detach().norm(dim=1).max()) <= 0.1 + 1e-6


# Images that nobody labelled.


def partly(labelled: int = 900) -> tuple[Split, Tensor]:
    """The training images as a transfer set of which so many are labelled, and a teacher's logits [1, N, C]."""
    store, labels = DIGITS.train.store, DIGITS.train.labels
    extra = Split(store[labelled:], torch.full((len(store) - labelled,), -1), DIGITS.train.white)
    images = Split(store[:labelled], labels[:labelled], DIGITS.train.white).followed_by(extra)
    return images, 5 * torch.rand(1, len(store), 10, generator=generator(0, "taught"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_step_on_partly_labelled_images_by_hand(smoothing: float) -> None:
    images, taught = partly()
    settings = train(epochs=1, batch_size=1297, momentum=0, schedule="constant", label_smoothing=smoothing)
    start = net()
    logits = start(DIGITS.train.inputs(torch.arange(1297)))
    soft = 16 * F.kl_div((logits / 4).log_softmax(1), (taught[0] / 4).softmax(1), reduction="batchmean")
    hard = F.cross_entropy(logits[:900], DIGITS.train.labels[:900], label_smoothing=smoothing)
    gradients = torch.autograd.grad(0.7 * soft + 0.2 * hard, list(start.parameters()))
    wanted = [(p - 0.1 * g).detach().flatten() for p, g in zip(start.parameters(), gradients, strict=True)]
    found = trained(settings, images=images, **distilling(taught, T=4, lambda1=0.7, lambda2=0.2))
    assert torch.allclose(weights(found), torch.cat(wanted).double(), atol=1e-6)


def test_errors_and_hard_loss_of_an_epoch_are_those_of_the_labelled_images() -> None:
    """At a learning rate that moves nothing; each of the last 500 images is in a batch of its own kind of mixture."""
    images, taught = partly()
    settings, how = train(epochs=1, batch_size=100, lr=1e-30, momentum=0), distilling(taught, T=4, lambda1=1, lambda2=0)
    logits, labels = net()(DIGITS.train.inputs(torch.arange(1297))).detach(), DIGITS.train.labels
    kl = F.kl_div((logits / 4).log_softmax(1), (taught[0] / 4).log_softmax(1), reduction="batchmean", log_target=True)
    found = last(net(), settings, images=images, **how)
    assert found.train_errors == int((logits[:900].argmax(1) != labels[:900]).sum())
    assert found.hard_loss == pytest.approx(float(F.cross_entropy(logits[:900], labels[:900])), rel=1e-5)
    assert found.t2_kl == pytest.approx(16 * float(kl), rel=1e-4)


@pytest.mark.parametrize("kept", [False, True])
def test_a_sample_that_is_blended_with_an_unlabelled_one_counts_no_hard_loss(kept: bool) -> None:
    """One epoch of one batch, blended by hand: what is labelled to one part in a million counts."""
    images, taught = partly()
    settings = train(epochs=1, batch_size=1297, lr=1e-30, momentum=0, mixup=0.3)
    how = distilling(taught, T=4, lambda1=0.7, lambda2=0.3)
    order = torch.randperm(1297, generator=generator(0, "order", 0))
    share, following = augment.Views(images, settings, 0).draw(0)["mixup"][:, None], order.roll(-1)
    if kept:
        fixed = augment.Fixed(settings, 1, 1297, torch.arange(1297))
        how["teacher"] = replace(how["teacher"], views=fixed)
        share, following = fixed.draw(0)["mixup"][order, None], fixed.draw(0)["partner"][order]
    x = share * DIGITS.train.inputs(order).flatten(1) + (1 - share) * DIGITS.train.inputs(following).flatten(1)
    known = share[:, 0] * (order < 900) + (1 - share[:, 0]) * (following < 900) > 1 - 1e-6
    log_p, rows = net()(x).double().log_softmax(1).detach(), torch.arange(1297)
    own, other = (-log_p[rows, DIGITS.train.labels[at]] for at in (order, following))
    wanted = (share[:, 0] * own + (1 - share[:, 0]) * other)[known].mean()
    found = last(net(), settings, images=images, **how)
    assert found.hard_loss == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("recipe", [{"jitter": 1}, {"mixup": 0.2, "label_smoothing": 0.1, "ema": 0.9}], ids=str)
def test_resumed_is_uninterrupted_bit_for_bit_on_partly_labelled_images(recipe: dict[str, Any], tmp_path: Path) -> None:
    settings, (images, taught) = train(epochs=3, **recipe), partly()
    how = distilling(taught, T=4, lambda1=0.7, lambda2=0.3)
    whole = fit(droppy(), images, settings, 0, **how)
    state = kept(tmp_path, settings, next(whole))
    *_, wanted = whole
    found = last(droppy(), settings, images=images, start=state, **how)
    assert found[:-2] == wanted[:-2]
    assert torch.equal(weights(found.net), weights(wanted.net))


def test_what_nobody_labelled_teaches_by_the_teacher_alone() -> None:
    """Of 60 labelled images and a teacher's logits of all, a student makes fewer errors than of the 60 alone."""
    images, _ = partly(60)
    logits = predict(trained(train(epochs=20)), DIGITS.train)[None]
    how = train(epochs=10, optimizer="adam", lr=0.01)
    taught, few = distilling(logits, T=4, lambda1=0.7, lambda2=0.3), DIGITS.train.at(torch.arange(60))
    assert errors(trained(how, images=images, **taught)) < errors(trained(how, images=few, **taught)) / 2


def test_a_weight_whose_first_gradient_comes_late_has_momentum_too() -> None:
    """As in torch's own form, which is not fused."""
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        how = train(optimizer="sgd", lr=0.1, momentum=0.9, epochs=1)
        optimizer = make_optimizer(model, how) if fused else torch.optim.SGD(model.parameters(), 0.1, 0.9)
        for step in range(4):
            model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2) if step else None
            optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)
