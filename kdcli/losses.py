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


def objective(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    distill: Distill | None,
    how: Average = "arithmetic",
    weights: Sequence[float] = (),
    label_smoothing: float = 0.0,
) -> Loss:
    """The loss of a net, logits [N, C], with labels [N] or shares of the classes [N, C]: the cross-entropy alone, or of
    a student lambda1 T^2 KL + lambda2 L_CE (section 2), `teacher_logits` [M, N, C] those of its teacher's members. T
    enters here, and only here.

    Computed in float64, where ten numbers a sample cost little: at high T the two distributions differ by less than
    float32 resolves.
    """
    hard = F.cross_entropy(logits.double(), labels, label_smoothing=label_smoothing)
    if distill is None or teacher_logits is None:
        return Loss(hard, hard, torch.zeros_like(hard))
    t2_kl = kd(logits, average(teacher_logits, distill.T, how, weights), distill.T)
    soft = t2_kl if distill.t_squared else t2_kl / distill.T**2
    return Loss(distill.lambda1 * soft + distill.lambda2 * hard, hard, t2_kl)
