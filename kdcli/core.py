"""The shared core: the models, the soft-target loss, the ensemble average and the device. Knows no file and no screen.

Section and equation numbers are those of Hinton, Vinyals and Dean, arXiv:1503.02531.
"""

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli import BadInput


def select_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises BadInput for a malformed or absent one."""
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in name and (kind != "cuda" or not number.isdecimal())):
        raise BadInput(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput(f"--device {name}: this machine has no usable CUDA device; use --device cpu or auto")
    if int(number or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s), numbered from 0")
    return torch.device("cuda", int(number or 0))


def generator(seed: int, purpose: str, epoch: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of every random draw: one generator for each (seed, purpose, epoch), so that a draw depends on
    nothing drawn before it and a resumed run repeats it."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class MLP(nn.Module):
    """The paper's net (section 3): ReLU hidden layers of any widths, dropout on the inputs and the hidden units.

    `dropout` and `input_dropout` are probabilities of dropping, realised in steps of 1/256.
    Initialised after He et al. 2015 (normal, variance 2 / inputs; 1 / inputs for the logits), biases zero.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        classes: int,
        *,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        init: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, classes]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
        self.dropout, self.input_dropout = dropout, input_dropout
        with torch.no_grad():
            for layer in self.linears():
                gain = 1.0 if layer is self.layers[-1] else 2.0
                layer.weight.normal_(0, math.sqrt(gain / layer.in_features), generator=init)
                layer.bias.zero_()

    def linears(self) -> list[nn.Linear]:
        """The layers, input side first, the logits last."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor, draws: torch.Generator | None = None) -> Tensor:
        """Logits [N, classes] of inputs [N, inputs]; in train mode `draws` is where dropout takes its masks from."""
        x = self._drop(x, self.input_dropout, draws)
        *hidden, output = self.layers
        for layer in hidden:
            x = self._drop(F.relu(layer(x)), self.dropout, draws)
        logits: Tensor = output(x)
        return logits

    def _drop(self, x: Tensor, p: float, draws: torch.Generator | None) -> Tensor:
        return x * byte_mask(x.shape, p, draws, x.device) if self.training and p > 0 else x

    @torch.no_grad()
    def constrain(self, max_norm: float) -> None:
        """Scale down, in place, the weights into any hidden unit whose Euclidean norm is over `max_norm`."""
        for layer in self.linears()[:-1]:
            layer.weight.renorm_(2, 0, max_norm)


def byte_mask(shape: torch.Size, p: float, draws: torch.Generator | None, device: torch.device) -> Tensor:
    """A dropout mask: 0 with probability k/256, k = round(256 p), else 256 / (256 - k), one random byte an element."""
    count, k = shape.numel(), round(256 * p)
    # From -2^63 on, because random_() leaves the sign bit of an int64 zero and biases every eighth byte.
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=device).random_(-(2**63), None, generator=draws)
    kept = words.view(torch.uint8)[:count].view(shape) >= k
    return kept.to(torch.float32).mul_(256 / (256 - k))


def soften(logits: Tensor, T: float) -> Tensor:
    """The logarithm of the softened softmax p_i = exp(z_i / T) / sum_j exp(z_j / T) (eq. 1), float64, over the last
    dimension."""
    return torch.log_softmax(logits.double() / T, -1)


def average(members: Tensor, T: float, how: str) -> Tensor:
    """Log-probabilities [N, C], float64, of an ensemble with logits [M, N, C] (section 2); a lone teacher has M = 1.

    `arithmetic`: each member is softened first, then the probabilities are averaged. `geometric`: the logits are
    averaged, then softened, which is the renormalised geometric mean of the members' distributions.
    """
    if how == "arithmetic":
        return soften(members, T).logsumexp(0) - math.log(len(members))
    return soften(members.double().mean(0), T)


class Loss(NamedTuple):
    """Means over a batch, float64 scalars."""

    total: Tensor  # lambda1 * T^2 * L_KD + lambda2 * L_CE: what is minimised
    soft: Tensor  # T^2 * KL(soft targets || student), 0 for a perfect match
    hard: Tensor  # L_CE, the cross-entropy with the labels at T = 1


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    soft_targets: Tensor,
    *,
    T: float,
    lambda1: float,
    lambda2: float,
    t_squared: bool = True,
) -> Loss:
    """lambda1 * T^2 * L_KD + lambda2 * L_CE, averaged over the samples (section 2).

    logits: the student's, [N, C]. labels: [N], integers. soft_targets: the teacher's probabilities at T, [N, C].
    L_KD is the cross-entropy between the two softened distributions. T^2 undoes the 1/T^2 by which its gradient
    shrinks; `t_squared=False` leaves it out. Computed in float64, where ten numbers a sample cost nothing: at high T
    the two distributions differ by less than float32 resolves.
    """
    z = logits.double()
    log_q = soften(z, T)
    cross_entropy = -(soft_targets * log_q).sum(-1).mean()
    entropy = -torch.xlogy(soft_targets, soft_targets).sum(-1).mean()
    hard = F.cross_entropy(z, labels)
    factor = T**2 if t_squared else 1.0
    return Loss(lambda1 * factor * cross_entropy + lambda2 * hard, T**2 * (cross_entropy - entropy).detach(), hard)
