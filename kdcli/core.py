"""The shared core: the models, the soft-target loss, the ensemble average and the device. Knows no file and no screen.

Section and equation numbers are those of Hinton, Vinyals and Dean, arXiv:1503.02531.
"""

import copy
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
    torch.set_float32_matmul_precision("high")  # TF32: products of 10-bit mantissas, summed in float32
    return torch.device("cuda", int(number or 0))


def stream(seed: int, purpose: str, epoch: int = 0) -> int:
    """What seeds the generator of every random draw: one for each (seed, purpose, epoch), so that a draw depends on
    nothing drawn before it and a resumed run repeats it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A source of random draws on the CPU, seeded with `stream`."""
    return torch.Generator().manual_seed(stream(seed, purpose, epoch))


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

    def forward(self, x: Tensor, draws: Sequence[torch.Generator] = ()) -> Tensor:
        """Logits [N, classes] of inputs [N, inputs], which dropout changes in place in train mode.

        Of a stack of M nets: [M, N, classes] of [M, N, inputs]. `draws`: where dropout takes the masks of each of the
        M from, in train mode.
        """
        *hidden, output = self.linears()
        self._drop(x, self.input_dropout, draws)
        for layer in hidden:
            x = F.relu_(self._drop(_affine(x, layer), self.dropout, draws))
        return _affine(x, output)

    def _drop(self, x: Tensor, p: float, draws: Sequence[torch.Generator]) -> Tensor:
        return x.mul_(byte_mask(x.shape, p, draws, x.device)) if self.training and p > 0 else x

    @torch.no_grad()
    def constrain(self, max_norm: float) -> None:
        """Scale down, in place, the weights into any hidden unit whose Euclidean norm is over `max_norm`."""
        for layer in self.linears()[:-1]:
            layer.weight.flatten(0, -2).renorm_(2, 0, max_norm)


def _affine(x: Tensor, layer: nn.Linear) -> Tensor:
    if layer.weight.dim() == 2:
        return F.linear(x, layer.weight, layer.bias)
    return torch.baddbmm(layer.bias.unsqueeze(1), x, layer.weight.mT)


def stack(models: Sequence[MLP]) -> MLP:
    """One net that computes M nets of one shape at once: each of its parameters has one dimension more, the member.

    The parameters of `models` become views of the stack's, so that to train it trains them. A lone net is itself.
    """
    if len(models) == 1:
        return models[0]
    stacked = copy.deepcopy(models[0])
    for name, parameter in stacked.named_parameters():
        own = [model.get_parameter(name) for model in models]
        parameter.data = torch.stack([p.data for p in own])
        for p, view in zip(own, parameter.data, strict=True):
            p.data = view
    return stacked


def byte_mask(shape: torch.Size, p: float, draws: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """A dropout mask: 0 with probability k/256, k = round(256 p), else 256 / (256 - k), one random byte an element.

    The first dimension is shared out among the generators in `draws`.
    """
    count, k = shape.numel() // len(draws), round(256 * p)
    words = torch.empty(len(draws), (count + 7) // 8, dtype=torch.int64, device=device)
    for row, source in zip(words, draws, strict=True):
        # From -2^63 on, because random_() leaves the sign bit of an int64 zero and biases every eighth byte.
        row.random_(-(2**63), None, generator=source)
    kept = words.view(torch.uint8)[:, :count].ge_(k)  # in place: still bytes, which become floats fastest
    return kept.reshape(shape).to(torch.float32).mul_(256 / (256 - k))


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
    """Means over the samples, float64: scalars, or [M] of M nets at once."""

    total: Tensor  # lambda1 * T^2 * L_KD + lambda2 * L_CE: what is minimised
    soft: Tensor  # L_KD, the cross-entropy between the two softened distributions
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
    All may have one dimension before these, the member. T^2 undoes the 1/T^2 by which the gradient of L_KD shrinks;
    `t_squared=False` leaves it out. Computed in float64, where ten numbers a sample cost nothing: at high T the two
    distributions differ by less than float32 resolves.
    """
    soft = -(soft_targets * soften(logits, T)).sum(-1).mean(-1)
    hard = cross_entropy(logits, labels)
    return Loss(lambda1 * (T**2 if t_squared else 1.0) * soft + lambda2 * hard, soft, hard)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE of logits [N, C] with labels [N], averaged over the samples, float64; [M] of [M, N, C] and [M, N]."""
    return F.cross_entropy(logits.double().flatten(0, -2), labels.flatten(), reduction="none").view_as(labels).mean(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """The mean entropy, in nats, of distributions [N, C]; [M] of [M, N, C]. Taken from L_KD it leaves
    KL(teacher || student)."""
    return -torch.xlogy(probabilities, probabilities).sum(-1).mean(-1)
