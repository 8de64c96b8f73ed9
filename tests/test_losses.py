import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcli import losses
from kdcli.config import Average, Distill

TEMPERATURES = [0.01, 0.1, 0.5, 1, 2.5, 4, 20, 100, 1000, 1e4]


class Wanted(NamedTuple):
    """What section 2 says, and the gradient of the total by hand."""

    total: float
    cross_entropy: float  # the paper's L_KD
    entropy: float  # of the soft targets: what L_KD has more than KL
    hard: float
    gradient: Any


def oracle(z: Any, y: Any, v: Any, distill: Distill) -> Wanted:
    """The formulas, independently of kd: in numpy, and in more digits than float64 has."""
    z, v = (np.asarray(logits, dtype=np.longdouble) for logits in (z, v))
    n, T, rows = len(z), distill.T or 1.0, np.arange(len(z))

    def log_softmax(a: Any) -> Any:
        a = a - a.max(1, keepdims=True)
        return a - np.log(np.exp(a).sum(1, keepdims=True))

    log_p, log_q, log_hard = log_softmax(v / T), log_softmax(z / T), log_softmax(z)
    p = np.exp(log_p)
    factor = T**2 if distill.t_squared else 1.0
    soft, entropy, hard = -(p * log_q).sum() / n, -(p * log_p).sum() / n, -log_hard[rows, y].sum() / n
    gradient = distill.lambda1 * factor * (np.exp(log_q) - p) / (n * T)
    gradient += distill.lambda2 * (np.exp(log_hard) - np.eye(z.shape[1])[y]) / n
    total = distill.lambda1 * factor * (soft - entropy) + distill.lambda2 * hard
    return Wanted(float(total), float(soft), float(entropy), float(hard), gradient.astype(np.float64))


def loss_of(T: float, lambda1: float = 1.0, lambda2: float = 0.0, t_squared: bool = True) -> Distill:
    return Distill(T=T, lambda1=lambda1, lambda2=lambda2, t_squared=t_squared)


def objective(z: Tensor, y: Tensor, v: Tensor, distill: Distill) -> tuple[losses.Loss, Tensor]:
    """The loss with one teacher, and its gradient in the student's logits."""
    z = z.clone().requires_grad_()
    loss = losses.objective(z, y, v[None], distill)
    (gradient,) = torch.autograd.grad(loss.total, z)
    return losses.Loss(*(part.detach() for part in loss)), gradient


def draw(seed: int, scale: float = 1.0, n: int = 17, classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, labels, teacher's logits."""
    draws = torch.Generator().manual_seed(seed)
    z, v = (scale * torch.randn(n, classes, generator=draws) for _ in range(2))
    return z, torch.randint(classes, (n,), generator=draws), v


def test_softened_softmax_by_hand() -> None:
    """Logits 0 and ln 9 at T = 1 give 0.1 and 0.9; at T = 2, where ln 9 halves to ln 3, 0.25 and 0.75."""
    z = torch.tensor([0.0, math.log(9)], dtype=torch.float64)
    assert losses.soften(z, 1).exp().tolist() == pytest.approx([0.1, 0.9])
    assert losses.soften(z, 2).exp().tolist() == pytest.approx([0.25, 0.75])


def test_loss_by_hand() -> None:
    """Two classes, T = 2: soft targets (1/4, 3/4), student (1/2, 1/2), label 0.

    KL = ln 2 - H(1/4, 3/4) = 3/4 ln 3 - ln 2, L_CE = ln 2; the gradient of the first logit is
    0.9 * 4 * (1/2 - 1/4) / 2 + 0.1 * (1/2 - 1) = 0.4.
    """
    z, y, v = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.0, math.log(9)]])
    kl = 0.75 * math.log(3) - math.log(2)
    loss, gradient = objective(z, y, v, loss_of(2, 0.9, 0.1))
    assert float(loss.total) == pytest.approx(0.9 * 4 * kl + 0.1 * math.log(2))
    assert float(loss.hard) == pytest.approx(math.log(2))
    assert float(loss.t2_kl) == pytest.approx(4 * kl)
    assert gradient[0].tolist() == pytest.approx([0.4, -0.4])
    loss, gradient = objective(z, y, v, loss_of(2, 0.9, 0.1, t_squared=False))
    assert float(loss.total) == pytest.approx(0.9 * kl + 0.1 * math.log(2))
    assert float(loss.t2_kl) == pytest.approx(4 * kl)  # what is logged can be compared with the other
    assert gradient[0].tolist() == pytest.approx([0.0625, -0.0625])


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("scale", [0.1, 5, 100])
def test_loss_and_gradient_match_the_oracle(T: float, scale: float) -> None:
    """At T = 0.1 and scale 100 most targets underflow to 0: their terms must be 0, not NaN. KL is the paper's
    cross-entropy L_KD less the entropy of the targets, with the same gradient."""
    z, y, v = draw(int(T * 100 + scale), scale)
    resolved = T**2 * 1e-14  # a few units in the last place of log p
    for distill in (loss_of(T, 0.9, 0.1), loss_of(T), loss_of(T, 0.5, 2.0, t_squared=False)):
        loss, gradient = objective(z, y, v, distill)
        wanted = oracle(z, y.numpy(), v, distill)
        assert float(loss.total) == pytest.approx(wanted.total, rel=1e-6, abs=resolved)
        assert float(loss.hard) == pytest.approx(wanted.hard, rel=1e-6)
        paper = T**2 * (wanted.cross_entropy - wanted.entropy)
        assert float(loss.t2_kl) == pytest.approx(paper, rel=1e-6, abs=resolved)
        bound = 1e-5 * np.abs(wanted.gradient).max()
        np.testing.assert_allclose(gradient, wanted.gradient, rtol=1e-5, atol=bound)


@pytest.mark.parametrize("T", [0.001, 0.01, 1, 1e4])
@pytest.mark.parametrize("size", [0, 1, 1e4, 1e30])
@pytest.mark.parametrize("t_squared", [True, False])
def test_loss_and_gradient_are_finite(T: float, size: float, t_squared: bool) -> None:
    """Where student and teacher contradict each other, where they agree, and with labels that are wrong."""
    z = size * torch.tensor([[1.0, -1, 0], [1, -1, 0], [1, 1, 1]])
    v = size * torch.tensor([[-1.0, 1, 0], [1, -1, 0], [0, 0, 0]])
    loss, gradient = objective(z, torch.tensor([1, 1, 0]), v, loss_of(T, 0.9, 0.1, t_squared))
    assert all(math.isfinite(part) and part >= 0 for part in loss)
    assert gradient.isfinite().all()


def test_underflow_is_reached() -> None:
    v = torch.tensor([[0.0, 100.0]])
    assert losses.soften(v, 0.1).exp().tolist() == [[0.0, 1.0]]
    found = losses.kd(torch.tensor([[100.0, 0.0]]), v, torch.tensor([0]), 0.1)
    assert float(found) == pytest.approx(0.01 * 1000)  # T^2 (100 - 0) / T


@pytest.mark.parametrize("T", TEMPERATURES)
def test_a_perfect_match_is_zero(T: float) -> None:
    z, y, _ = draw(0, 5)
    loss, gradient = objective(z, y, z, loss_of(T))
    assert (float(loss.total), float(loss.t2_kl)) == (0, 0)
    assert float(gradient.abs().max()) < 1e-12


def test_loss_is_summed_over_classes_and_averaged_over_samples() -> None:
    z, y, v = draw(1)
    once, _ = objective(z, y, v, loss_of(3, 0.7, 0.3))
    twice, _ = objective(z.repeat(2, 1), y.repeat(2), v.repeat(2, 1), loss_of(3, 0.7, 0.3))
    assert float(once.total) == pytest.approx(float(twice.total))
    soft = F.kl_div((z / 3).log_softmax(1), (v / 3).softmax(1), reduction="sum") / len(z)
    assert float(once.total) == pytest.approx(float(0.7 * 9 * soft + 0.3 * F.cross_entropy(z, y)), rel=1e-5)


def test_t_squared_keeps_the_soft_gradient_in_place_and_tends_to_logit_matching() -> None:
    """For large T and zero-meaned logits the soft gradient tends to (z - v) / N (eq. 4), with lambda2 = 0 too."""
    z, y, v = draw(2, n=6)
    z, v = (logits.double() - logits.double().mean(1, keepdim=True) for logits in (z, v))
    wanted = (z - v) / 10 / 6  # / classes, / samples
    for T, tolerance in ((20.0, 0.1), (1000.0, 2e-3), (1e4, 2e-4)):
        _, gradient = objective(z, y, v, loss_of(T))
        assert float((gradient - wanted).norm() / wanted.norm()) < tolerance
    _, shrunk = objective(z, y, v, loss_of(1000, t_squared=False))
    assert float(shrunk.norm() * 1e6 / wanted.norm()) == pytest.approx(1, rel=1e-2)


def test_without_a_teacher_the_loss_is_the_cross_entropy() -> None:
    z, y, v = draw(3)
    for loss in (losses.objective(z, y, None, None), losses.objective(z, y, v[None], None)):
        assert float(loss.total) == float(loss.hard) == pytest.approx(float(F.cross_entropy(z, y)))
        assert float(loss.t2_kl) == 0


@pytest.mark.parametrize("how", ["arithmetic", "geometric"])
def test_an_ensemble_teaches_by_its_average(how: Average) -> None:
    z, y, _ = draw(4)
    members = torch.stack([draw(seed, 5)[2] for seed in (5, 6, 7)])
    loss = losses.objective(z, y, members, loss_of(4), how)
    softened = (members.double() / 4).softmax(-1)
    p = softened.mean(0) if how == "arithmetic" else softened.log().mean(0).softmax(-1)
    wanted = 16 * F.kl_div((z.double() / 4).log_softmax(1), p, reduction="batchmean")
    assert float(loss.t2_kl) == pytest.approx(float(wanted))


temperatures = st.floats(0.01, 1e4)
seeds = st.integers(0, 2**31)


@given(temperatures, seeds, st.floats(0.01, 100), st.integers(2, 200))
@settings(max_examples=100, deadline=None)
def test_kl_is_a_divergence_of_any_logits(T: float, seed: int, scale: float, classes: int) -> None:
    """Never negative; blind to a constant added to all logits and to the order of the classes; its gradient moves
    no logit without another."""
    z, y, v = (t.double() if t.is_floating_point() else t for t in draw(seed, scale, n=3, classes=classes))
    loss, gradient = objective(z, y, v, loss_of(T))
    resolved = T**2 * 1e-14 + 1e-9 * float(loss.t2_kl)
    assert float(loss.t2_kl) >= -resolved
    assert float(gradient.sum(1).abs().max()) < 1e-9 * max(1, T)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    for same, teacher in ((z + 7, v - 3), (z[:, order], v[:, order])):
        assert abs(float(objective(same, y, teacher, loss_of(T))[0].t2_kl) - float(loss.t2_kl)) <= resolved + 1e-9 * T


@given(st.floats(0.1, 1000), st.integers(1, 5), st.sampled_from(["arithmetic", "geometric"]), seeds)
@settings(max_examples=50, deadline=None)
def test_averages_are_distributions_and_equal_members_change_nothing(T: float, m: int, how: Average, seed: int) -> None:
    logits = 20 * torch.randn(m, 3, 10, generator=torch.Generator().manual_seed(seed))
    p = losses.average(logits, T, how).exp()
    assert torch.allclose(p.sum(1), torch.ones(3, dtype=torch.float64))
    same = losses.average(logits[:1].expand(m, -1, -1), T, how)
    assert torch.allclose(same, losses.soften(logits[0], T), atol=1e-9)


def test_the_two_averages_by_hand() -> None:
    """Members (0.9, 0.1) and (0.5, 0.5): arithmetic (0.7, 0.3); geometric sqrt(0.45) : sqrt(0.05) = 3 : 1."""
    members = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64).log()
    assert losses.average(members, 1, "arithmetic").exp().tolist()[0] == pytest.approx([0.7, 0.3])
    assert losses.average(members, 1, "geometric").exp().tolist()[0] == pytest.approx([0.75, 0.25])


def test_an_ensemble_softens_each_member_before_averaging() -> None:
    members = torch.tensor([[[8.0, 0.0]], [[0.0, 0.0]]])
    softened_first = (torch.softmax(members / 4, -1)).mean(0)
    assert torch.allclose(losses.average(members, 4, "arithmetic").exp().float(), softened_first)
    averaged_first = losses.average(members, 1, "arithmetic")
    assert not torch.allclose(torch.softmax(averaged_first / 4, -1).float(), softened_first, atol=0.01)


# Samples without a label.


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shares", [False, True])
def test_the_hard_term_is_the_mean_over_the_labelled_samples_alone(shares: bool, smoothing: float) -> None:
    """Against the loss and the gradients of the labelled samples by themselves, and of all of them."""
    z, y, v = draw(3, n=18)
    z.requires_grad_()
    labels: Tensor = y.where(torch.arange(18) % 3 > 0, -1)
    if shares:  # each blended with the next: of two labelled samples, the shares sum to 1
        rows = F.one_hot(labels + 1, 11)[:, 1:].double()
        labels = 0.3 * rows + 0.7 * rows.roll(-1, 0)
    known = losses.labelled(labels)
    wanted = torch.tensor([i % 3 == 1 if shares else i % 3 > 0 for i in range(18)])
    assert known.tolist() == wanted.tolist()
    distill = loss_of(4, 0.7, 0.2)
    found = losses.objective(z, labels, v[None], distill, "arithmetic", (), smoothing, known)
    hard = F.cross_entropy(z[wanted].double(), labels[wanted], label_smoothing=smoothing)
    soft = losses.kd(z, v, labels, 4)
    assert float(found.hard.detach()) == pytest.approx(float(hard.detach()), rel=1e-12)
    assert float(found.total.detach()) == pytest.approx(float((0.7 * soft + 0.2 * hard).detach()), rel=1e-12)
    one, other = (torch.autograd.grad(loss, z)[0] for loss in (found.total, 0.7 * soft + 0.2 * hard))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


def test_a_batch_without_a_label_has_no_hard_loss_and_no_gradient_of_one() -> None:
    z, _, v = draw(0)
    z.requires_grad_()
    nobody = torch.full((17,), -1)
    found = losses.objective(z, nobody, v[None], loss_of(4, 0.5, 0.5), "arithmetic", (), 0.1, losses.labelled(nobody))
    (gradient,) = torch.autograd.grad(found.total, z)
    (wanted,) = torch.autograd.grad(0.5 * losses.kd(z, v, nobody, 4), z)
    assert float(found.hard.detach()) == 0
    assert torch.equal(gradient, wanted)
