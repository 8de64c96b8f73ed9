import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, core


def numpy_loss(
    z: Any, y: Any, v: Any, T: float, lambda1: float, lambda2: float, squared: bool = True
) -> dict[str, Any]:
    """The independent oracle: the formulas of section 2 in plain float64 numpy, with the gradient by hand."""
    z, v = np.asarray(z, dtype=np.float64), np.asarray(v, dtype=np.float64)
    n = len(z)

    def log_softmax(a: Any) -> Any:
        a = a - a.max(1, keepdims=True)
        return a - np.log(np.exp(a).sum(1, keepdims=True))

    log_p, log_q, log_hard = log_softmax(v / T), log_softmax(z / T), log_softmax(z)
    p = np.exp(log_p)
    factor = T**2 if squared else 1.0
    kd = -(p * log_q).sum() / n
    ce = -log_hard[np.arange(n), y].sum() / n
    gradient = lambda1 * factor * (np.exp(log_q) - p) / (n * T)
    gradient += lambda2 * (np.exp(log_hard) - np.eye(z.shape[1])[y]) / n
    return {
        "total": lambda1 * factor * kd + lambda2 * ce,
        "gradient": gradient,
        "soft": kd,
        "entropy": -np.where(p > 0, p * log_p, 0).sum() / n,
    }


def torch_loss(z: Tensor, y: Tensor, v: Tensor, T: float, lambda1: float, lambda2: float, squared: bool = True) -> Any:
    z = z.clone().requires_grad_()
    targets = core.average(v[None], T, "arithmetic").exp()
    loss = core.distillation_loss(z, y, targets, T=T, lambda1=lambda1, lambda2=lambda2, t_squared=squared)
    (gradient,) = torch.autograd.grad(loss.total, z)
    return core.Loss(*(part.detach() for part in loss)), gradient


def test_softened_softmax_by_hand() -> None:
    """Logits 0 and ln 9 at T = 1 give 0.1 and 0.9; at T = 2, where ln 9 halves to ln 3, 0.25 and 0.75."""
    z = torch.tensor([0.0, math.log(9)], dtype=torch.float64)
    assert core.soften(z, 1).exp().tolist() == pytest.approx([0.1, 0.9])
    assert core.soften(z, 2).exp().tolist() == pytest.approx([0.25, 0.75])


def test_loss_by_hand() -> None:
    """Two classes, T = 2: soft targets (1/4, 3/4), student (1/2, 1/2), label 0.

    L_KD = ln 2, L_CE = ln 2; 0.9 * 4 * ln 2 + 0.1 * ln 2 = 3.7 ln 2.
    """
    v = torch.tensor([[0.0, math.log(9)]])
    loss, _ = torch_loss(torch.zeros(1, 2), torch.tensor([0]), v, 2, 0.9, 0.1)
    assert float(loss.total) == pytest.approx(3.7 * math.log(2))
    assert float(loss.hard) == pytest.approx(math.log(2))
    assert float(loss.soft) == pytest.approx(math.log(2))
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert float(core.entropy(torch.tensor([[0.25, 0.75]], dtype=torch.float64))) == pytest.approx(entropy)
    talk, _ = torch_loss(torch.zeros(1, 2), torch.tensor([0]), v, 2, 0.9, 0.1, squared=False)
    assert float(talk.total) == pytest.approx(math.log(2))


@pytest.mark.parametrize("T", [0.1, 0.5, 1, 2.5, 4, 20, 100, 1000])
@pytest.mark.parametrize("scale", [0.1, 5, 100])
def test_loss_and_gradient_match_the_oracle(T: float, scale: float) -> None:
    """At T = 0.1 and scale 100 most targets underflow to 0: their terms must be 0, not NaN."""
    draws = torch.Generator().manual_seed(int(T * 10 + scale))
    z, v = (scale * torch.randn(17, 10, generator=draws) for _ in range(2))
    y = torch.randint(10, (17,), generator=draws)
    for lambda1, lambda2, squared in ((0.9, 0.1, True), (1.0, 0.0, True), (0.5, 2.0, False)):
        loss, gradient = torch_loss(z, y, v, T, lambda1, lambda2, squared)
        wanted = numpy_loss(z, y.numpy(), v, T, lambda1, lambda2, squared)
        assert float(loss.total) == pytest.approx(wanted["total"], rel=1e-6)
        assert float(loss.soft) == pytest.approx(wanted["soft"], rel=1e-6)
        entropy = core.entropy(core.average(v[None], T, "arithmetic").exp())
        assert float(entropy) == pytest.approx(wanted["entropy"], rel=1e-6, abs=1e-12)
        np.testing.assert_allclose(
            gradient, wanted["gradient"], rtol=1e-4, atol=1e-4 * np.abs(wanted["gradient"]).max()
        )


def test_underflow_is_reached() -> None:
    targets = core.average(torch.tensor([[[0.0, 100.0]]]), 0.1, "arithmetic").exp()
    assert targets.tolist() == [[0.0, 1.0]]
    loss = core.distillation_loss(torch.tensor([[100.0, 0.0]]), torch.tensor([0]), targets, T=0.1, lambda1=1, lambda2=0)
    assert float(loss.total) == pytest.approx(0.01 * 1000)  # T^2 * (100 - 0) / T


def test_a_perfect_match_has_zero_kl() -> None:
    z = torch.randn(5, 10)
    for T in (0.1, 1.0, 20.0, 1000.0):
        loss, gradient = torch_loss(z, torch.zeros(5, dtype=torch.long), z, T, 1.0, 0.0)
        entropy = core.entropy(core.average(z[None], T, "arithmetic").exp())
        assert abs(float(loss.soft) - float(entropy)) < 1e-8
        assert float(gradient.abs().max()) < 1e-8


def test_loss_is_a_mean_over_samples_not_over_classes() -> None:
    z, v, y = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
    once, _ = torch_loss(z, y, v, 3, 0.7, 0.3)
    twice, _ = torch_loss(z.repeat(2, 1), y.repeat(2), v.repeat(2, 1), 3, 0.7, 0.3)
    assert float(once.total) == pytest.approx(float(twice.total))
    reference = 0.7 * 9 * F.cross_entropy(z / 3, (v / 3).softmax(1)) + 0.3 * F.cross_entropy(z, y)
    assert float(once.total) == pytest.approx(float(reference), rel=1e-5)


def test_t_squared_keeps_the_soft_gradient_in_place_and_tends_to_logit_matching() -> None:
    """For large T and zero-meaned logits the soft gradient tends to (z - v) / N (eq. 4), with lambda2 = 0 too."""
    z, v = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    y = torch.zeros(6, dtype=torch.long)
    wanted = (z - v) / 10 / 6  # / classes, / samples
    for T, tolerance in ((20.0, 0.1), (1000.0, 2e-3)):
        _, gradient = torch_loss(z, y, v, T, 1.0, 0.0)
        assert float((gradient - wanted).norm() / wanted.norm()) < tolerance
    _, shrunk = torch_loss(z, y, v, 1000.0, 1.0, 0.0, squared=False)
    assert float(shrunk.norm() * 1e6 / wanted.norm()) == pytest.approx(1, rel=1e-2)


@given(st.floats(0.1, 1000), st.integers(1, 5), st.sampled_from(["arithmetic", "geometric"]), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_averages_are_distributions_and_equal_members_change_nothing(T: float, m: int, how: str, seed: int) -> None:
    logits = 20 * torch.randn(m, 3, 10, generator=torch.Generator().manual_seed(seed))
    p = core.average(logits, T, how).exp()
    assert torch.allclose(p.sum(1), torch.ones(3, dtype=torch.float64))
    same = core.average(logits[:1].expand(m, -1, -1), T, how)
    assert torch.allclose(same, core.soften(logits[0], T), atol=1e-9)


def test_the_two_averages_by_hand() -> None:
    """Members (0.9, 0.1) and (0.5, 0.5): arithmetic (0.7, 0.3); geometric sqrt(0.45) : sqrt(0.05) = 3 : 1."""
    members = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64).log()
    assert core.average(members, 1, "arithmetic").exp().tolist()[0] == pytest.approx([0.7, 0.3])
    assert core.average(members, 1, "geometric").exp().tolist()[0] == pytest.approx([0.75, 0.25])


def test_an_ensemble_softens_each_member_before_averaging() -> None:
    members = torch.tensor([[[8.0, 0.0]], [[0.0, 0.0]]])
    softened_first = (torch.softmax(members / 4, -1)).mean(0)
    assert torch.allclose(core.average(members, 4, "arithmetic").exp().float(), softened_first)
    averaged_first = core.average(members, 1, "arithmetic")
    assert not torch.allclose(torch.softmax(averaged_first / 4, -1).float(), softened_first, atol=0.01)


def test_mlp_is_the_papers_net() -> None:
    net = core.MLP(784, [800, 800], 10)
    assert [(layer.in_features, layer.out_features) for layer in net.linears()] == [(784, 800), (800, 800), (800, 10)]
    assert sum(p.numel() for p in net.parameters()) == 784 * 800 + 800 + 800 * 800 + 800 + 800 * 10 + 10
    x = torch.rand(3, 784)
    a, b, c = net.linears()
    assert torch.allclose(net(x), c(torch.relu(b(torch.relu(a(x))))))


def test_initialisation_follows_its_generator_and_he() -> None:
    one, same, other = (core.MLP(784, [800], 10, init=core.generator(seed, "init")) for seed in (1, 1, 2))
    assert torch.equal(one.linears()[0].weight, same.linears()[0].weight)
    assert not torch.equal(one.linears()[0].weight, other.linears()[0].weight)
    assert float(one.linears()[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / 784), rel=0.01)
    assert float(one.linears()[1].weight.detach().std()) == pytest.approx(math.sqrt(1 / 800), rel=0.05)


@pytest.mark.parametrize("p", [1 / 256, 0.1, 0.2, 0.5, 0.9])
def test_byte_mask_drops_with_probability_round_256p_over_256(p: float) -> None:
    """Every byte of a word alike: an int64 drawn without its sign bit would bias each eighth one."""
    k = round(256 * p)
    mask = core.byte_mask(torch.Size([400_000, 8]), p, [core.generator(0, "mask")], torch.device("cpu"))
    assert mask.unique().tolist() == pytest.approx([0, 256 / (256 - k)])
    dropped = (mask == 0).double().mean(0)
    sigma = math.sqrt(k / 256 * (1 - k / 256) / 400_000)
    assert float((dropped - k / 256).abs().max()) < 5 * sigma


def test_dropout_acts_in_train_mode_alone_and_keeps_the_mean() -> None:
    net = core.MLP(1, [4000], 1, dropout=0.5, input_dropout=0.0)
    x = torch.ones(1, 1)
    net.eval()
    still = net(x).item()
    assert still == net(x, [core.generator(0, "dropout")]).item()
    net.train()
    values = torch.stack([net(x.clone(), [core.generator(0, "dropout", i)]) for i in range(200)])
    assert float(values.std()) > 0
    assert float(values.mean()) == pytest.approx(still, abs=5 * float(values.std()) / math.sqrt(200))


def test_max_norm_bounds_the_weights_into_hidden_units_alone() -> None:
    net = core.MLP(50, [30, 20], 10)
    with torch.no_grad():
        for layer in net.linears():
            layer.weight.mul_(10)
        net.linears()[0].weight[0] *= 1e-3
    small, output = net.linears()[0].weight[0].clone(), net.linears()[2].weight.clone()
    net.constrain(1.5)
    for layer in net.linears()[:2]:
        assert float(layer.weight.norm(dim=1).max()) <= 1.5 + 1e-5
    assert torch.equal(net.linears()[0].weight[0], small)
    assert torch.equal(net.linears()[2].weight, output)


def test_generators_differ_by_seed_purpose_and_epoch() -> None:
    draws = {
        tuple(torch.rand(2, generator=core.generator(*key)).tolist())
        for key in ((0, "order", 0), (1, "order", 0), (0, "jitter", 0), (0, "order", 1))
    }
    assert len(draws) == 4
    assert torch.equal(
        torch.rand(3, generator=core.generator(5, "x", 7)), torch.rand(3, generator=core.generator(5, "x", 7))
    )


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_device_selection(name: str) -> None:
    wanted = "cuda" if name == "auto" and torch.cuda.is_available() else "cpu"
    assert core.select_device(name).type == wanted


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "cuda:", "", "cuda:99"])
def test_unusable_devices_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="--device"):
        core.select_device(name)
