"""The nets: the paper's perceptron, and `build`, which makes the one that a model section describes for a dataset."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from kdcli import BadInput, code
from kdcli.config import Model, nearest
from kdcli.nets import resnets
from kdcli.runs.spec import Facts


class MLP(nn.Module):
    """The paper's net (section 3): ReLU hidden layers of any widths, dropout on the inputs and the hidden units.

    `dropout` and `input_dropout` are probabilities of dropping, realised in steps of 1/256.
    Initialised after He et al. 2015 (normal, variance 2 / inputs; 1 / inputs for the logits), biases zero.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], classes: int, dropout: float = 0.0, input_dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers = pairwise([inputs, *hidden, classes])
        with torch.random.fork_rng(devices=[]):  # what torch draws for them is overwritten
            self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in layers)
        self.dropout, self.input_dropout = dropout, input_dropout
        with torch.no_grad():
            for layer in self.linears():
                gain = 1.0 if layer is self.layers[-1] else 2.0
                layer.weight.normal_(0, math.sqrt(gain / layer.in_features))
                layer.bias.zero_()

    def linears(self) -> list[nn.Linear]:
        """The layers, input side first, the logits last."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, ...]; dropout changes the inputs in place in train mode."""
        *hidden, output = self.linears()
        x = self._drop(x.flatten(1), self.input_dropout)
        for layer in hidden:
            x = self._drop(layer(x), self.dropout).relu_()
        logits: Tensor = output(x)
        return logits

    def _drop(self, x: Tensor, p: float) -> Tensor:
        return dropped(x, p) if self.training and p else x

    @torch.no_grad()
    def constrain(self, max_norm: float) -> None:
        """Scale down, in place, the weights into any hidden unit whose Euclidean norm is over `max_norm`."""
        for layer in self.linears()[:-1]:
            layer.weight.renorm_(2, 0, max_norm)


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout of a batch [N, ...], in place on a CPU."""
    if has_torch_function_unary(x):  # several processes share the batch (kdcli.machine.distributed)
        shared: Tensor = handle_torch_function(dropped, (x,), x, p)
        return shared
    if x.is_cuda:
        return F.dropout(x, round(256 * p) / 256)
    return x.mul_(byte_mask(x.shape, p))  # nn.Dropout draws a number an element: 1.2 x a step (make bench)


def byte_mask(shape: torch.Size, p: float) -> Tensor:
    """A dropout mask: 0 with probability k/256, k = round(256 p), else 256 / (256 - k), one random byte an element."""
    count, k = shape.numel(), round(256 * p)
    # From -2^63 on, because random_() leaves the sign bit of an int64 zero and biases every eighth byte.
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.uint8)[:count].ge_(k)  # in place: still bytes, which become floats fastest
    return kept.view(shape).to(torch.float32).mul_(256 / (256 - k))


class Normalised(nn.Module):
    """A net that is given images in [0, 1] (or the rows of a table) and sees (x - mean) / std, channel by channel."""

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.mean = nn.Buffer(torch.tensor(mean).view(-1, 1, 1))
        self.scale = nn.Buffer(1 / torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W]."""
        logits: Tensor = self.net((x - self.mean) * self.scale)
        return logits


def build(model: Model, facts: Facts) -> nn.Module:
    """The net of a model section for the images of a dataset and its classes, initialised from the global generators.
    Raises BadInput where a library or somebody's own function has no such net, or makes none."""
    net = _named(model, facts.shape[0], len(facts.classes)) if model.name else _perceptron(model, facts)
    return Normalised(net, facts.mean, facts.std) if facts.normalises(model) else net


def _perceptron(model: Model, facts: Facts) -> MLP:
    widths = model.hidden or []
    return MLP(math.prod(facts.shape), widths, len(facts.classes), model.dropout, model.input_dropout)


def _named(model: Model, channels: int, classes: int) -> nn.Module:
    """A net by its name. Raises BadInput."""
    name, args = model.name or "", dict[str, Any](model.args)
    library, _, which = name.partition(":")
    if model.file:
        net = code.call(name, classes=classes, channels=channels, **args)
        if not isinstance(net, nn.Module):
            raise BadInput(f"{name}: must return a torch.nn.Module, not {type(net).__name__}")
        return net
    if library == "torchvision":
        from torchvision import models

        if which not in (known := models.list_models(models)):
            raise BadInput(f"{name}: torchvision has no such classifier{nearest(which, known)}")
        return _made(name, lambda: models.get_model(which, weights=None, num_classes=classes, **args))
    if library == "timm":
        timm = code.library("timm", "timm")
        if which.partition(".")[0] not in (known := timm.list_models()):  # behind the point: whose weights
            raise BadInput(f"{name}: timm has no such net{nearest(which, known)}")
        return _made(name, lambda: timm.create_model(which, num_classes=classes, in_chans=channels, **args))
    return resnets.build(name, channels, classes)


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        net: nn.Module = make()
    except Exception as error:  # of arguments that it does not take, or cannot use
        raise BadInput(f"{name}: cannot be made with its args: {' '.join(str(error).split())[:200]}") from None
    return net


@code.quiet()
def fits(net: nn.Module, model: Model, facts: Facts, trained: bool = True) -> None:
    """Raise BadInput unless a net of a model section, made to be tried, gives one logit a class, in training too if it
    is to be trained."""
    shape, classes, device = facts.shape, len(facts.classes), next(net.parameters(), torch.empty(0)).device
    with torch.no_grad(), code.blaming(model.file, f"model: does not take images {shape}"):
        for mode in (True, False) if trained else (False,):
            out = net.train(mode)(torch.zeros(2, *shape, device=device))
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            if found != [2, classes]:
                raise BadInput(f"model: must give [2, {classes}] logits for 2 images {shape}, not {found}")
            if bool((out >= 0).all()) and torch.allclose(out.sum(1), torch.ones(2, device=device)):
                raise BadInput("model: gives probabilities, and must give logits: remove the softmax at its end")
    if trained and not any(p.requires_grad for p in net.parameters()):
        raise BadInput("model: has no parameter that can be trained")


def multiply_adds(net: nn.Module, shape: Sequence[int]) -> int:
    """What it takes to classify one image, by torch's flop counter: products of layers, as the field counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training, device = net.training, next(net.parameters(), torch.empty(0)).device
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, *shape, device=device))
    net.train(was_training)
    return int(counter.get_total_flops()) // 2
