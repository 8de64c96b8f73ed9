"""The soft-target loss and the ensemble average, on logits. Section and equation numbers are those of Hinton, Vinyals
and Dean, arXiv:1503.02531."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli.config import Average, Distill


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
    shares = members.new_tensor(weights or [1.0] * len(members), dtype=torch.float64).view(-1, 1, 1)
    if how == "geometric":
        return soften((members.double() * shares).sum(0) / shares.sum() if weights else members.double().mean(0), T)
    log_p = soften(members, T)
    if weights:
        return (log_p + (shares / shares.sum()).log()).logsumexp(0)
    return log_p[0] if len(members) == 1 else log_p.logsumexp(0) - math.log(len(members))


class Loss(NamedTuple):
    """Means over the samples, scalars, float64."""

    total: Tensor  # what is minimised
    hard: Tensor  # L_CE, the cross-entropy with the labels at T = 1
    t2_kl: Tensor  # T^2 KL(teacher || student), both softened by T; 0 without a teacher


def kd(student_logits: Tensor, teacher_log_p: Tensor, T: float) -> Tensor:
    """T^2 KL(p || q), averaged over the samples: p the teacher's and q the student's distribution, softened by T.

    student_logits [N, C]; teacher_log_p [N, C], log p. KL is the paper's cross-entropy L_KD (section 2) less the
    entropy of p, which is constant: the gradients are the same, and a perfect match is 0. T^2 undoes the 1/T^2 by which
    the gradient shrinks.
    """
    return T**2 * F.kl_div(soften(student_logits, T), teacher_log_p, reduction="batchmean", log_target=True)


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
) -> Loss:
    """The loss of a net, logits [N, C], with labels [N] or shares of the classes [N, C]: the cross-entropy alone, or of
    a student lambda1 T^2 KL + lambda2 L_CE (section 2), `teacher_logits` [M, N, C] those of its teacher's members. KL
    is the mean over all samples, L_CE over those that are `known` [N], left out all (`labelled`). T enters here, and
    only here.

    Computed in float64, where ten numbers a sample cost little: at high T the two distributions differ by less than
    float32 resolves.
    """
    hard = cross_entropy(logits, labels, label_smoothing, known)
    if distill is None or teacher_logits is None:
        return Loss(hard, hard, torch.zeros_like(hard))
    t2_kl = kd(logits, average(teacher_logits, distill.T, how, weights), distill.T)
    soft = t2_kl if distill.t_squared else t2_kl / distill.T**2
    return Loss(distill.lambda1 * soft + distill.lambda2 * hard, hard, t2_kl)
