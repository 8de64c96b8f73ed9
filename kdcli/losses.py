"""The losses on logits, and the ensemble average. Where no other paper is named, section and equation numbers are those
of Hinton, Vinyals and Dean, arXiv:1503.02531.

Each loss takes student_logits [N, C], teacher_logits [N, C] and labels [N], and returns a mean over the samples, a
scalar, float64, before lambda1. All are computed in log space: a probability may be 0 or 1 in float64, its logarithm is
finite.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, code
from kdcli.config import Average, Distill

Soft = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student_logits, teacher_logits and labels


def soften(logits: Tensor, T: float) -> Tensor:
    """The logarithm of the softened softmax p_i = exp(z_i / T) / sum_j exp(z_j / T) (eq. 1), float64, over the last
    dimension."""
    return torch.log_softmax(logits.double() / T, -1)


def average(members: Tensor, T: float, how: Average, weights: Sequence[float] = ()) -> Tensor:
    """Log-probabilities [N, C], float64, of an ensemble with logits [M, N, C] (section 2); a lone teacher has M = 1.

    `arithmetic`: each member is softened first, then the probabilities are averaged. `geometric`: the logits are
    averaged, then softened, which is the renormalised geometric mean of the members' distributions. `weights` [M] are
    those of the members, relative to each other; without them all weigh the same.
    """
    if how == "geometric":
        return soften(_mean(members, weights), T)
    log_p = soften(members, T)
    if weights:
        shares = log_p.new_tensor(weights).view(-1, 1, 1)
        return (log_p + (shares / shares.sum()).log()).logsumexp(0)
    return log_p[0] if len(members) == 1 else log_p.logsumexp(0) - math.log(len(members))


def _mean(members: Tensor, weights: Sequence[float]) -> Tensor:
    if not weights:
        return members.double().mean(0)
    shares = members.new_tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    return (members.double() * shares).sum(0) / shares.sum()


def logits_of(members: Tensor, how: Average, weights: Sequence[float] = ()) -> Tensor:
    """The logits [N, C], float64, of a teacher whose members have [M, N, C]: of a lone one its own, of a geometric
    average their mean. An arithmetic average has none: log p of it at T = 1 stands for them."""
    return _mean(members, weights) if len(members) == 1 or how == "geometric" else average(members, 1.0, how, weights)


class Loss(NamedTuple):
    """Means over the samples, scalars, float64."""

    total: Tensor  # what is minimised
    hard: Tensor  # L_CE, the cross-entropy with the labels at T = 1
    t2_kl: Tensor  # T^2 KL(teacher || student), both softened by T, 1 where the loss has none; 0 without a teacher
    soft: Tensor  # the value of the student's loss: T^2 KL unless it has another; 0 without a teacher


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q), the mean over the samples, of logarithms [N, C]."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _t2_kl(student_logits: Tensor, teacher_log_p: Tensor, T: float) -> Tensor:
    return T**2 * _kl(soften(student_logits, T), teacher_log_p)


def kd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, T: float) -> Tensor:
    """T^2 KL(p || q): p the teacher's and q the student's distribution, softened by T.

    KL is the paper's cross-entropy L_KD (section 2) less the entropy of p, which is constant: the gradients are the
    same, and a perfect match is 0. T^2 undoes the 1/T^2 by which the gradient shrinks. The labels have no part in it.
    """
    return _t2_kl(student_logits, soften(teacher_logits, T), T)


def standardize(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) of each row of [N, C], float64, std with C - 1 (Sun et al., arXiv:2403.01427,
    algorithm 1): what `kd` and `dkd` are given of both nets. Raises BadInput for two classes, of which nothing but the
    order would be left."""
    _needs_three(logits, "standardize", "remove it")
    z = logits.double()
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def mse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance of the logits, summed over classes (Kim et al., arXiv:2105.08919, their L_MSE): the constant
    is 1, neither 1/2 nor 1/C. Of zero-meaned logits it is 2 C times what T^2 KL tends to for large T."""
    return (student_logits.double() - teacher_logits.double()).square().sum(1).mean()


def dkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, T: float, alpha: float, beta: float) -> Tensor:
    """alpha T^2 KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta T^2 KL(p^ || q^) (Zhao et al., arXiv:2203.08679, eq. 7),
    p^ and q^ the softened softmax without the label y; T^2 is on both, as in their code. Raises BadInput for two
    classes, of which only one would be left."""
    _needs_three(student_logits, "dkd", "use another loss")
    target, rest = zip(*(_split(soften(z, T), labels) for z in (student_logits, teacher_logits)), strict=True)
    hats = [log.log_softmax(1) for log in rest]
    return T**2 * (alpha * _kl(*target) + beta * _kl(*hats))


def dist(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, T: float, beta: float, gamma: float) -> Tensor:
    """T^2 [beta (1 - mean over rows of rho(q, p)) + gamma (1 - mean over columns of rho(q, p))] (Huang et al.,
    arXiv:2205.10536, section 3; T^2 from their code), rho Pearson's correlation, of a constant row or column 0. The
    columns make it a function of the batch, not a mean of its samples."""
    log_q, log_p = soften(student_logits, T), soften(teacher_logits, T)
    rows, columns = (1 - (_unit(log_q, dim) * _unit(log_p, dim)).sum(dim).mean() for dim in (1, 0))
    return T**2 * (beta * rows + gamma * columns)


def ttm(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """KL(p^gamma / sum p^gamma || q), p and q at T = 1, without T^2 (Zheng and Yang, arXiv:2402.11148, section 3):
    gamma is their 1 / T of the teacher alone."""
    return _kl(soften(student_logits, 1), (gamma * teacher_logits.double()).log_softmax(1))


def wttm(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """`ttm` with each sample weighed by sum p^gamma (Zheng and Yang, arXiv:2402.11148, section 4), p at T = 1: the
    samples of which the teacher is unsure count for more."""
    powers = gamma * soften(teacher_logits, 1)
    log_q, log_p = soften(student_logits, 1), powers.log_softmax(1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    return (powers.logsumexp(1).exp() * kl).mean()


def nkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, T: float, gamma: float) -> Tensor:
    """-p_y log q_y at T = 1 - gamma T^2 sum p^ log q^ (Yang et al., arXiv:2303.13005, section 3), p^ and q^ the softmax
    at T without the label y: two cross-entropies, so a perfect match is not 0. Of two classes the second is 0."""
    log_q, log_p = (soften(z, 1).gather(1, labels[:, None]) for z in (student_logits, teacher_logits))
    hat_q, hat_p = (_split(soften(z, T), labels)[1].log_softmax(1) for z in (student_logits, teacher_logits))
    return -(log_p.exp() * log_q).mean() - gamma * T**2 * (hat_p.exp() * hat_q).sum(1).mean()


def _split(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log [p_y, 1 - p_y], [N, 2], and log p of the other classes, [N, C - 1]."""
    others = torch.arange(log_p.shape[1] - 1, device=log_p.device)
    rest = log_p.gather(1, others + (others >= labels[:, None]))
    return torch.cat([log_p.gather(1, labels[:, None]), rest.logsumexp(1, keepdim=True)], 1), rest


def _unit(log_p: Tensor, dim: int) -> Tensor:
    """The probabilities without their mean along `dim`, scaled to norm 1: of two, the sum of the products is Pearson's
    correlation, which no scale changes. So they are divided by their largest first, since squares of small ones would
    underflow. What is constant to within rounding is 0, without a gradient."""
    x = (log_p - log_p.detach().amax(dim, keepdim=True)).exp()
    x = x - x.mean(dim, keepdim=True)
    square = x.square().sum(dim, keepdim=True)
    constant = square < 1e-24
    return x.masked_fill(constant, 0) / square.masked_fill(constant, 1).sqrt()


def _needs_three(logits: Tensor, name: str, remedy: str) -> None:
    if logits.shape[1] < 3:
        raise BadInput(f"{name} has no meaning for two classes: {remedy}")


def soft_loss(distill: Distill) -> Soft:
    """The loss that a `distill` section names, with its parameters. Raises BadInput where somebody's own file has none;
    calling it does, with the line, where that fails or returns no scalar."""
    if distill.file:
        return partial(_own, distill, code.function(distill.loss))
    found = partial(globals()[distill.loss], **distill.parameters)
    return (lambda z, v, labels: found(standardize(z), standardize(v), labels)) if distill.standardize else found


def _own(distill: Distill, function: Callable[..., object], z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    with code.blaming(distill.file, distill.loss):
        value = function(z.double(), v.double(), labels, distill.T)
    if not isinstance(value, Tensor) or value.dim():
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BadInput(f"{distill.loss}: must return a scalar tensor, not {found}")
    return value.double()


@code.quiet()
def try_loss(distill: Distill, classes: int, unlabelled: bool = False, mixup: bool = False) -> None:
    """Raise BadInput unless the loss of a `distill` section can be computed for so many classes, with the `unlabelled`
    images and the `mixup` that the training has, and moves a student."""
    draws = torch.Generator().manual_seed(0)
    z, v = (torch.randn(4, classes, generator=draws) for _ in range(2))
    labels = torch.arange(4) % classes
    if unlabelled:
        labels[-1] = -1
    value = soft_loss(distill)(z.requires_grad_(), v, shares(labels, classes) if mixup else labels)
    if not value.requires_grad:
        raise BadInput(f"{distill.loss}: does not depend on student_logits: nothing could be learned from it")
    with code.blaming(distill.file):
        value.backward()
    if not value.isfinite() or (z.grad is not None and not z.grad.isfinite().all()):
        what = f"is {value.item():g}" if not value.isfinite() else "has a gradient that is not finite"
        raise BadInput(f"{distill.loss}: {what} for logits drawn from a normal distribution: it must be finite")


def shares(labels: Tensor, classes: int) -> Tensor:
    """Labels [N] as shares of the classes [N, C], float64; of label -1 none."""
    return F.one_hot(labels + 1, classes + 1)[:, 1:].double()


def labelled(labels: Tensor) -> Tensor:
    """Which of N samples have a label, [N], bool: not those of label -1 or, of shares [N, C], those whose shares sum to
    less than 1."""
    return labels >= 0 if labels.dim() == 1 else labels.sum(1) > 1 - 1e-6


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, known: Tensor | None) -> Tensor:
    """The mean cross-entropy, a scalar, float64, over the `known` [N] samples, if there are others: 0 where all are
    others. It waits for no GPU."""
    if known is None:
        return F.cross_entropy(logits.double(), labels, label_smoothing=label_smoothing)
    classes = logits.shape[1]
    shares = F.one_hot(labels.clamp_min(0), classes).double() if labels.dim() == 1 else labels
    shares = (shares * (1 - label_smoothing) + label_smoothing / classes) * known[:, None]
    return F.cross_entropy(logits.double(), shares) * len(labels) / known.sum().clamp_min(1)


def objective(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    distill: Distill | None,
    how: Average = "arithmetic",
    weights: Sequence[float] = (),
    label_smoothing: float = 0.0,
    known: Tensor | None = None,
    share: float = 1.0,
    function: Soft | None = None,
) -> Loss:
    """The loss of a net, logits [N, C], with labels [N] or shares of the classes [N, C]: the cross-entropy alone, or of
    a student share lambda1 soft + lambda2 L_CE, `teacher_logits` [M, N, C] those of its teacher's members. `soft` is
    T^2 KL (section 2) or, of another loss, its `function` (left out: it is looked up) of the two nets' logits
    (`logits_of`): the mean over all samples; L_CE is that over those that are `known` [N], left out all (`labelled`).
    T enters here, and only here; `share` is below 1 while the soft term warms up.

    Computed in float64, where ten numbers a sample cost little: at high T the two distributions differ by less than
    float32 resolves.
    """
    hard = cross_entropy(logits, labels, label_smoothing, known)
    if distill is None or teacher_logits is None:
        return Loss(hard, hard, torch.zeros_like(hard), torch.zeros_like(hard))
    T = distill.T or 1.0
    with torch.set_grad_enabled(distill.plain and torch.is_grad_enabled()):
        soft = t2_kl = _t2_kl(logits, average(teacher_logits, T, how, weights), T)
    if not distill.plain:
        soft = (function or soft_loss(distill))(logits, logits_of(teacher_logits, how, weights), labels)
    scaled = soft if distill.t_squared else soft / T**2
    return Loss(share * distill.lambda1 * scaled + distill.lambda2 * hard, hard, t2_kl, soft)
