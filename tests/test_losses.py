import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, losses
from kdcli.config import LOSSES, Average, Distill

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


# The losses of the field: by hand, then against oracles.

HALF, QUARTERS, THIRDS = math.log(2), math.log(4), math.log(16)


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def value(loss: str, z: Tensor, v: Tensor, y: Tensor, **parameters: float) -> float:
    found: Tensor = getattr(losses, loss)(z, v, y, **parameters)
    assert found.shape == ()
    assert found.dtype == torch.float64
    return float(found.detach())


def test_kd_and_dkd_by_hand() -> None:
    """At T = 2 the teacher says p = (1/2, 1/4, 1/4), the student q = (1/4, 1/4, 1/2), the label is 0.

    With or without the label: KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3. The others:
    KL((1/2, 1/2) || (1/3, 2/3)) = 1/2 ln 3/2 + 1/2 ln 3/4 = 1/2 ln 9/8. So DKD = 4 (1/2 ln 4/3 + 8 * 1/2 ln 9/8), and
    KD, which weighs the second by 1 - p_y (the paper's eq. 5), = 4 (1/2 ln 4/3 + 1/2 * 1/2 ln 9/8) = ln 2.
    """
    v, z, y = logits([2 * HALF, 0, 0]), logits([0, 0, 2 * HALF]), torch.tensor([0])
    target, others = 0.5 * math.log(4 / 3), 0.5 * math.log(9 / 8)
    assert value("dkd", z, v, y, T=2, alpha=1, beta=8) == pytest.approx(4 * (target + 8 * others))
    assert value("dkd", z, v, y, T=2, alpha=3, beta=0) == pytest.approx(12 * target)
    assert value("dkd", z, v, y, T=2, alpha=1, beta=0.5) == pytest.approx(math.log(2))
    assert value("kd", z, v, y, T=2) == pytest.approx(math.log(2))
    twice = (torch.cat([z, v]), torch.cat([v, v]), torch.tensor([0, 0]))  # a second sample that matches
    assert value("dkd", *twice, T=2, alpha=1, beta=8) == pytest.approx(2 * (target + 8 * others))


def test_mse_by_hand() -> None:
    """1 + 4 + 9 = 14, of two samples one of which matches 7; neither halved nor divided by the classes."""
    z, v, y = logits([1, 2, 3], [5, 5, 5]), logits([0, 0, 0], [5, 5, 5]), torch.tensor([0, 1])
    assert value("mse", z, v, y) == 7


def test_mse_is_what_kd_tends_to_for_large_temperatures_times_two_classes() -> None:
    """Of zero-meaned logits: T^2 KL -> |z - v|^2 / (2 C)."""
    z, y, v = (t.double() if t.is_floating_point() else t for t in draw(2))
    z, v = (t - t.mean(1, keepdim=True) for t in (z, v))
    assert 2 * 10 * value("kd", z, v, y, T=1e4) == pytest.approx(value("mse", z, v, y), rel=1e-3)


def test_dist_by_hand() -> None:
    """T = 2; q = (1/2, 1/4, 1/4), (1/4, 1/2, 1/4); p = (1/2, 1/4, 1/4), (1/4, 1/4, 1/2).

    Rows: the first are the same, rho 1; of the second, less 1/3, in twelfths: (-1, 2, -1) and (-1, -1, 2), rho =
    -3 / 6: the mean is 1/4. Columns: the first are the same, rho 1; of the others one is constant, rho 0: the mean is
    1/3. So beta = 1 and gamma = 2 give 4 (3/4 + 2 * 2/3) = 25/3.
    """
    z, v = logits([2 * HALF, 0, 0], [0, 2 * HALF, 0]), logits([2 * HALF, 0, 0], [0, 0, 2 * HALF])
    y = torch.tensor([0, 1])
    assert value("dist", z, v, y, T=2, beta=1, gamma=2) == pytest.approx(25 / 3)
    assert value("dist", z, v, y, T=2, beta=1, gamma=0) == pytest.approx(3)
    assert value("dist", v, v, y, T=2, beta=1, gamma=0) == pytest.approx(0, abs=1e-12)


def test_ttm_and_wttm_by_hand() -> None:
    """p = (16, 1, 1) / 18, to the power of 1/4 (2, 1, 1) / 18^(1/4), so (1/2, 1/4, 1/4); q = (1/4, 1/4, 1/2): KL =
    1/2 ln 2 - 1/4 ln 2. WTTM weighs it by 4 / 18^(1/4). The second sample matches."""
    v, z, y = logits([THIRDS, 0, 0]), logits([0, 0, HALF]), torch.tensor([0])
    assert value("ttm", z, v, y, gamma=0.25) == pytest.approx(HALF / 4)
    assert value("wttm", z, v, y, gamma=0.25) == pytest.approx(4 / 18**0.25 * HALF / 4)
    z, v, y = torch.cat([z, logits([HALF, 0, 0])]), torch.cat([v, v]), torch.tensor([0, 0])
    assert value("ttm", z, v, y, gamma=0.25) == pytest.approx(HALF / 8)
    assert value("wttm", z, v, y, gamma=0.25) == pytest.approx(4 / 18**0.25 * HALF / 8)


def test_nkd_by_hand() -> None:
    """The teacher says (1/2, 1/4, 1/4) at T = 1, the student (1, 1, 4) / 6, the label is 0: 1/2 ln 6. At T = 2 the
    others are (1/2, 1/2) of the teacher and (1/3, 2/3) of the student: -1/2 ln 2/9, times 1.5 * 4."""
    v, z, y = logits([HALF, 0, 0]), logits([0, 0, QUARTERS]), torch.tensor([0])
    assert value("nkd", z, v, y, T=2, gamma=1.5) == pytest.approx(0.5 * math.log(6) + 6 * 0.5 * math.log(9 / 2))
    assert value("nkd", z, v, y, T=2, gamma=0) == pytest.approx(0.5 * math.log(6))


def test_standardised_logits_by_hand() -> None:
    """(1, 2, 3) has mean 2 and, with C - 1, std 1; a constant row becomes 0; a scale and a shift change nothing."""
    found = losses.standardize(logits([1, 2, 3], [7, 7, 7], [-10, 0, 10]))
    assert found[0].tolist() == pytest.approx([-1, 0, 1], rel=2e-7)
    assert found[1].tolist() == [0, 0, 0]
    assert found[2].tolist() == pytest.approx([-1, 0, 1], rel=2e-7)


def softmax(a: Any) -> Any:
    e = np.exp(a - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def published(
    loss: str, z: Any, v: Any, y: Any, T: float = 1, alpha: float = 0, beta: float = 0, gamma: float = 0
) -> Any:
    """The papers' formulas on probabilities, sample by sample, in more digits than float64 has; not one in log space."""

    def without(p: Any, label: int) -> Any:
        rest = np.delete(p, label)
        return rest / rest.sum()

    def kl(p: Any, q: Any) -> Any:
        return (p * np.log(p / q)).sum()

    def rho(a: Any, b: Any) -> Any:
        return ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())

    (q, p), (q1, p1) = ([softmax(a / t) for a in (z, v)] for t in (T, 1))
    found = []
    for s, t, s1, t1, label, i in zip(q, p, q1, p1, y, range(len(y)), strict=True):
        match loss:
            case "kd":
                found.append(T**2 * kl(t, s))
            case "mse":
                found.append(sum((a - b) ** 2 for a, b in zip(z[i], v[i], strict=True)))
            case "dkd":
                pairs = (np.array([a[label], 1 - a[label]]) for a in (t, s))
                found.append(T**2 * (alpha * kl(*pairs) + beta * kl(without(t, label), without(s, label))))
            case "dist":
                columns = np.mean([rho(q[:, c], p[:, c]) for c in range(q.shape[1])])
                found.append(T**2 * (beta * (1 - rho(s, t)) + gamma * (1 - columns)))
            case "ttm" | "wttm":
                powers = t1**gamma
                found.append(kl(powers / powers.sum(), s1) * (powers.sum() if loss == "wttm" else 1))
            case "nkd":
                others = (without(t, label) * np.log(without(s, label))).sum()
                found.append(-t1[label] * np.log(s1[label]) - gamma * T**2 * others)
    return np.mean(found)


PARAMETERS = {loss: {"T": 0.0} | known.parameters if known.T else known.parameters for loss, known in LOSSES.items()}
CASES = [(loss, T) for loss, p in PARAMETERS.items() for T in ((0.5, 1, 4, 20, 1e4) if "T" in p else (0,))]


@pytest.mark.parametrize(("loss", "T"), CASES)
@pytest.mark.parametrize("scale", [0.1, 3])
def test_each_loss_and_its_gradient_match_the_paper(loss: str, T: float, scale: float) -> None:
    """The gradient against central differences of the oracle."""
    z, y, v = (t.double() if t.is_floating_point() else t for t in draw(int(10 * scale), scale, n=4, classes=5))
    parameters = PARAMETERS[loss] | ({"T": T} if T else {})
    z.requires_grad_()
    found = getattr(losses, loss)(z, v, y, **parameters)
    (gradient,) = torch.autograd.grad(found, z)
    wide, teacher = (t.detach().numpy().astype(np.longdouble) for t in (z, v))
    wanted, step = np.zeros((4, 5)), np.longdouble(1e-4)
    for i in np.ndindex(4, 5):
        ends = [wide.copy(), wide.copy()]
        ends[0][i] -= step
        ends[1][i] += step
        low, high = (published(loss, end, teacher, y.numpy(), **parameters) for end in ends)
        wanted[i] = (high - low) / (2 * step)
    expected = float(published(loss, wide, teacher, y.numpy(), **parameters))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_kd_is_to_the_bit_what_it_was_when_it_was_the_only_loss() -> None:
    """Against the lines that computed it then, for a lone teacher and both averages, weighted or not."""
    z, y, v = draw(4)
    members = torch.stack([v, *(draw(seed, 5)[2] for seed in (5, 6))])
    for T, m, how, weights in (
        *((T, 1, "arithmetic", ()) for T in TEMPERATURES),
        *((4.0, 3, how, w) for how in ("arithmetic", "geometric") for w in ((), (1.0, 2.0, 0.5))),
    ):
        some, shares = members[:m].double(), torch.tensor(weights or [1.0] * m, dtype=torch.float64).view(-1, 1, 1)
        if how == "geometric":
            log_p = torch.log_softmax(((some * shares).sum(0) / shares.sum() if weights else some.mean(0)) / T, -1)
        elif weights:
            log_p = (torch.log_softmax(some / T, -1) + (shares / shares.sum()).log()).logsumexp(0)
        else:
            log_p = torch.log_softmax(some / T, -1)
            log_p = log_p[0] if m == 1 else log_p.logsumexp(0) - math.log(m)
        log_q = torch.log_softmax(z.double() / T, -1)
        was = T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        found = losses.objective(z, y, members[:m], loss_of(T, 0.9, 0.1), how, weights)  # type: ignore[arg-type]
        assert torch.equal(found.t2_kl, was)
        assert torch.equal(found.soft, was)
        assert torch.equal(found.total, 0.9 * was + 0.1 * F.cross_entropy(z.double(), y))
        if m == 1:
            assert torch.equal(losses.kd(z, v, y, T), was)


SIGNS = st.lists(st.lists(st.sampled_from([-1.0, 0, 0.5, 1]), min_size=4, max_size=4), min_size=1, max_size=4)


@given(st.data(), st.sampled_from(list(LOSSES)), st.booleans(), st.floats(-2, 4), st.floats(-12, 4))
@settings(max_examples=400, deadline=None)
def test_every_gradient_is_finite(data: st.DataObject, loss: str, standardized: bool, T: float, size: float) -> None:
    """From T = 0.01 to 1e4, for logits to 1e4 in size, with ties, constant rows and columns, and probabilities that are
    0 and 1 in float64."""
    rows = data.draw(SIGNS)
    z, v = (10**size * torch.tensor(part, dtype=torch.float64) for part in (rows, data.draw(st.permutations(rows))))
    classes = data.draw(st.integers(3 if loss == "dkd" or standardized else 2, 4))
    z, v, y = z[:, :classes].requires_grad_(), v[:, :classes], torch.arange(len(rows)) % classes
    parameters = PARAMETERS[loss] | ({"T": 10**T} if "T" in PARAMETERS[loss] else {})
    given_z, given_v = (losses.standardize(t) for t in (z, v)) if standardized and loss in ("kd", "dkd") else (z, v)
    found = getattr(losses, loss)(given_z, given_v, y, **parameters)
    (gradient,) = torch.autograd.grad(found, z)
    assert found.isfinite()
    assert gradient.isfinite().all()
    assert float(found.detach()) >= -1e-14 * parameters.get("T", 1) ** 2  # no loss is below 0 but for rounding


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("T", [0.01, 1, 1e4])
@pytest.mark.parametrize("right", [True, False])
def test_certain_teachers_and_students_give_finite_gradients(loss: str, T: float, right: bool) -> None:
    """p_y is 1, or 0, in float64, of both nets, or of one; then p_y log q_y, and hats of nothing, must not be NaN."""
    sure, other = (1e4 * F.one_hot(torch.tensor([c]), 4).double() for c in (0 if right else 1, 2))
    for z, v in ((sure, sure), (sure, other), (other, sure), (0 * sure, sure), (sure, 0 * sure)):
        z = z.clone().requires_grad_()
        found = getattr(losses, loss)(
            z, v, torch.tensor([0]), **PARAMETERS[loss] | ({"T": T} if LOSSES[loss].T else {})
        )
        (gradient,) = torch.autograd.grad(found, z)
        assert found.isfinite()
        assert gradient.isfinite().all()


def test_small_probabilities_count_in_a_column_of_dist() -> None:
    """Probabilities of 1e-200, whose squares are 0 in float64, correlate as any others: rho has no scale."""
    z = logits([500, 500, 1.0], [500, 500, 0], [500, 500, 0.5])
    found = value("dist", z, z, torch.zeros(3, dtype=torch.int64), T=1, beta=0, gamma=1)
    assert found == pytest.approx(2 / 3)  # the first two columns are constant, rho 0; the third is its own


def test_rounding_does_not_correlate_in_dist() -> None:
    """Logits of 1e-11 at T = 1e4: probabilities that differ by rounding are constant, rho 0, and move nothing."""
    z = (1e-11 * logits([1, 0, -1], [0, 2, -1])).requires_grad_()
    found = losses.dist(z, logits([5, 0, -5], [1, 2, 3]), torch.tensor([0, 1]), T=1e4, beta=1, gamma=1)
    (gradient,) = torch.autograd.grad(found, z)
    assert float(found.detach()) == 2e8
    assert not gradient.any()


@pytest.mark.parametrize("loss", ["dkd", "standardize"])
def test_two_classes_are_refused_where_nothing_would_be_left(loss: str) -> None:
    z, y, v = draw(0, classes=2)
    with pytest.raises(BadInput, match=rf"^{loss} has no meaning for two classes: "):
        losses.standardize(z) if loss == "standardize" else losses.dkd(z, v, y, T=4, alpha=1, beta=8)


def section(loss: str, **more: Any) -> Distill:
    temperature = {"T": 4.0} if LOSSES[loss].T else {}
    return Distill.model_validate({"loss": loss, "lambda1": 2.0, "lambda2": 0.5} | temperature | more)


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_is_lambda1_times_the_loss_and_lambda2_times_the_hard_one(loss: str, standardized: bool) -> None:
    if standardized and not LOSSES[loss].standardize:
        return
    z, y, v = draw(3)
    distill = section(loss, standardize=standardized)
    found = losses.objective(z, y, v[None], distill, share=0.25)
    given = [losses.standardize(t) for t in (z, v)] if standardized else [z, v]
    wanted = getattr(losses, loss)(*given, y, **distill.parameters)
    assert torch.equal(found.soft, wanted)
    assert torch.equal(found.t2_kl, losses.kd(z, v, y, distill.T or 1.0))  # of the logits as they are
    assert float(found.total) == pytest.approx(0.25 * 2 * float(wanted) + 0.5 * float(F.cross_entropy(z.double(), y)))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "kd"])
def test_an_ensemble_gives_other_losses_its_logits_or_log_p_of_its_average(loss: str) -> None:
    """An arithmetic average is softened from T = 1, whatever the T of the loss; a geometric one has mean logits."""
    z, y, _ = draw(4)
    members, distill = torch.stack([draw(seed, 5)[2] for seed in (5, 6, 7)]).double(), section(loss)
    p = members.softmax(-1).mean(0).log()
    weighted = (members[0] + 3 * members[1] + 2 * members[2]) / 6
    for how, weights, v in (
        ("arithmetic", (), p),
        ("geometric", (), members.mean(0)),
        ("geometric", (1, 3, 2), weighted),
    ):
        found = losses.objective(z, y, members, distill, how, weights)  # type: ignore[arg-type]
        assert float(found.soft) == pytest.approx(float(getattr(losses, loss)(z, v, y, **distill.parameters)), rel=1e-9)


@pytest.mark.parametrize("loss", [loss for loss, known in LOSSES.items() if not known.labels])
def test_losses_without_labels_take_unlabelled_and_blended_samples(loss: str) -> None:
    z, y, v = draw(3)
    whole = losses.objective(z, y, v[None], section(loss)).soft
    for labels in (y.where(y > 3, -1), 0.5 * F.one_hot(y, 10).double() + 0.05):
        found = losses.objective(z, labels, v[None], section(loss), known=losses.labelled(labels))
        assert torch.equal(found.soft, whole)
