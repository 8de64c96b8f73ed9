import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli import core, data
from kdcli.config import Data, Distill, Train
from kdcli.train import fit, learning_rate, make_optimizer, predict

DIGITS = data.load(Data(name="digits", heldout=200))


def train(**settings: Any) -> Train:
    return Train.model_validate({"epochs": 2, "batch_size": 50, "optimizer": "sgd", "lr": 0.1} | settings)


def net(seed: int = 0, **options: Any) -> core.MLP:
    return core.MLP(64, [20], 10, init=core.generator(seed, "init"), **options)


def trained(settings: Train, seed: int = 0, **options: Any) -> core.MLP:
    for epoch in fit([net(**options)], DIGITS.train, settings, [seed]):
        (result,) = epoch.models
    return result


def weights(model: core.MLP) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_step_is_the_optimizers_step_by_hand() -> None:
    """Plain SGD on the whole set for one epoch: w - lr * gradient of the mean cross-entropy."""
    settings = train(epochs=1, batch_size=1297, momentum=0, schedule="constant")
    start = net()
    loss = torch.nn.functional.cross_entropy(start(DIGITS.train.inputs()), DIGITS.train.labels)
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    wanted = torch.cat([(p - 0.1 * g).detach().flatten() for p, g in zip(start.parameters(), gradients, strict=True)])
    assert torch.allclose(weights(trained(settings)), wanted, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"jitter": 1, "max_norm": 2.0}, {"optimizer": "adam", "lr": 1e-3, "ema": 0.9}])
def test_a_seed_gives_the_same_weights_and_another_does_not(options: dict[str, Any]) -> None:
    settings = train(**options)
    one, same, other = (weights(trained(settings, seed, dropout=0.5)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_global_random_state_plays_no_part() -> None:
    torch.manual_seed(1)
    one = weights(trained(train(jitter=1), dropout=0.2))
    torch.manual_seed(2)
    assert torch.equal(one, weights(trained(train(jitter=1), dropout=0.2)))


def test_every_sample_counts_once_an_epoch_the_last_batch_too() -> None:
    """At a learning rate that moves nothing, the epoch's means are those of the untouched net over all 1,297."""
    settings = train(epochs=1, batch_size=500, lr=1e-30, momentum=0)
    (epoch,) = fit([net()], DIGITS.train, settings, [0])
    (metrics,) = epoch.metrics
    logits = net()(DIGITS.train.inputs()).detach()
    assert metrics["train_errors"] == int((logits.argmax(1) != DIGITS.train.labels).sum())
    loss = torch.nn.functional.cross_entropy(logits, DIGITS.train.labels)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_model_trains_in_train_mode_after_an_evaluation() -> None:
    model = net(dropout=0.5)
    for _ in fit([model], DIGITS.train, train(), [0]):
        assert model.training
        predict(model, DIGITS.test)
        assert model.training
        model.eval()  # even a caller who forgets it trains on with dropout
    assert torch.equal(weights(model), weights(trained(train(), dropout=0.5)))


def test_predict_asks_for_logits_without_dropout_in_order() -> None:
    model = net(dropout=0.5, input_dropout=0.5)
    logits = predict(model, DIGITS.test, batch_size=77)
    model.eval()
    assert torch.allclose(logits, model(DIGITS.test.inputs()), atol=1e-5)


def test_max_norm_holds_after_every_epoch() -> None:
    for epoch in fit([net()], DIGITS.train, train(max_norm=0.8), [0]):
        assert float(epoch.models[0].linears()[0].weight.detach().norm(dim=1).max()) <= 0.8 + 1e-5


def test_ema_is_the_exponential_average_of_the_weights() -> None:
    """After one step the decay is (1 + 0) / (10 + 0): a tenth of the start and nine of the stepped weights."""
    settings = train(epochs=1, batch_size=1297, momentum=0, schedule="constant")
    averaged = trained(settings.model_copy(update={"ema": 0.75}))
    wanted = 0.1 * weights(net()) + 0.9 * weights(trained(settings))
    assert torch.allclose(weights(averaged), wanted, atol=1e-6)


def test_a_long_ema_does_not_keep_the_random_start() -> None:
    model = trained(train(epochs=20, ema=0.99999))
    assert int((predict(model, DIGITS.test).argmax(1) != DIGITS.test.labels).sum()) < 50


def test_students_learn_the_teachers_logits_and_ignore_labels_when_lambda2_is_0() -> None:
    teacher = trained(train(epochs=20))
    targets = core.average(predict(teacher, DIGITS.train)[None], 4, "arithmetic").exp()
    wrong = data.Split(DIGITS.train.images, torch.zeros_like(DIGITS.train.labels), DIGITS.train.white)
    distill = Distill(T=4, lambda1=1.0, lambda2=0.0)
    student = net(1)
    epochs = [e.metrics[0] for e in fit([student], wrong, train(epochs=20), [0], (distill, lambda i, _: targets[i]))]
    assert epochs[-1]["t2_kl"] < 0.05 * epochs[0]["t2_kl"]
    agreement = predict(student, DIGITS.test).argmax(1) == predict(teacher, DIGITS.test).argmax(1)
    assert float(agreement.double().mean()) > 0.95


def test_lambda1_0_is_the_baseline() -> None:
    settings, targets = train(), torch.full((1297, 10), 0.1, dtype=torch.float64)
    hard = Distill(T=20, lambda1=0.0, lambda2=1.0)
    for epoch in fit([net()], DIGITS.train, settings, [0], (hard, lambda i, _: targets[i])):
        (student,) = epoch.models
    assert torch.allclose(weights(student), weights(trained(settings)), atol=1e-6)


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
    warm = [learning_rate(train(epochs=10, lr=1.0, warmup=2.0), i, 10) for i in range(100)]
    assert warm[0] == pytest.approx(0.05)
    assert warm[19] == 1
    assert warm[20] == 1
    assert warm[60] == pytest.approx(0.5)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_move_as_torchs_own_classes_do(name: str) -> None:
    settings = train(optimizer=name, weight_decay=0.01, momentum=0.9 if name == "sgd" else None)
    ours, theirs = net(), net()
    rate = torch.zeros(())
    _, step = make_optimizer(ours, settings, rate)
    kind, options = OPTIMIZERS[name]
    optimizer = kind(theirs.parameters(), lr=1.0, weight_decay=0.01, **options)
    for i, lr in enumerate((0.1, 0.05, 0.02)):
        x, y = DIGITS.train.inputs()[100 * i : 100 * i + 100], DIGITS.train.labels[100 * i : 100 * i + 100]
        for model in (ours, theirs):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x.clone()), y).backward()
        rate.fill_(lr)
        with torch.no_grad():
            step()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)


STACKED: list[dict[str, Any]] = [
    {},
    {"jitter": 1, "max_norm": 1.0, "weight_decay": 0.01},
    {"optimizer": "adam", "lr": 1e-3, "ema": 0.9},
    {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", STACKED)
@pytest.mark.parametrize("distilled", [False, True])
def test_stacked_equals_separate_for_every_member(options: dict[str, Any], distilled: bool) -> None:
    """Nets trained in one stack are, to float tolerance, the nets trained alone: order, shifts, dropout, teacher."""
    seeds, settings = [3, 8, 5], train(**options)
    targets = core.soften(5 * torch.rand(3, 1297, 10, generator=core.generator(0, "targets")), 2).exp()
    distill = Distill(T=2, lambda1=0.7, lambda2=0.3)

    def fitted(which: list[int]) -> tuple[list[dict[str, float]], list[Tensor]]:
        member = torch.tensor(which)[:, None]
        teach = (distill, lambda index, _: targets[member, index]) if distilled else None
        models = [net(seeds[i], dropout=0.5, input_dropout=0.2) for i in which]
        *_, last = fit(models, DIGITS.train, settings, [seeds[i] for i in which], teach)
        return last.metrics, [weights(model) for model in last.models]

    metrics, together = fitted([0, 1, 2])
    for i in range(3):
        (alone_metrics,), (alone,) = fitted([i])
        assert torch.allclose(together[i], alone, atol=1e-5)
        assert metrics[i] == pytest.approx(alone_metrics, rel=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_to_the_errors_of_the_cpu() -> None:
    errors = {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        digits = DIGITS.to(device)
        for epoch in fit([net().to(device)], digits.train, train(epochs=20, jitter=1), [0]):
            (model,) = epoch.models
        errors[device.type] = int((predict(model, digits.test).argmax(1) != digits.test.labels).sum())
    assert abs(errors["cpu"] - errors["cuda"]) <= 10
