"""Where a net is trained, and random draws that repeat."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

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
        raise BadInput(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0")
    torch.set_float32_matmul_precision("high")  # TF32: products of 10-bit mantissas, summed in float32
    torch.backends.cudnn.deterministic = True  # else convolutions do not repeat from their seed
    return torch.device("cuda", int(number or 0))


def stream(seed: int, purpose: str, epoch: int = 0) -> int:
    """What seeds every random draw: one number for each (seed, purpose, epoch), so that a draw depends on nothing drawn
    before it and a resumed run repeats it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A source of random draws on the CPU, seeded with `stream`."""
    return torch.Generator().manual_seed(stream(seed, purpose, epoch))


@contextlib.contextmanager
def seeded(seed: int, purpose: str, epoch: int = 0) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, which somebody's own modules draw from, and put them back
    as they were."""
    start, of_python, of_numpy = stream(seed, purpose, epoch), random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start % 2**32)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def place(net: nn.Module, device: torch.device) -> nn.Module:
    """The net on a device, laid out as its convolutions run fastest: on two CPUs a step of resnet20 takes 0.8 x as long
    (tools/bench_images.py)."""
    return net.to(device).to(memory_format=torch.channels_last)


def forward_of(net: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """How a net is asked while it is trained: as it is or, convolutions on a GPU, in bfloat16.

    Measured on an H200 (make gpu): a step of a perceptron waits for launches, and bfloat16 makes it slower; wide
    convolutions take 0.7 x the time and half the memory. torch.compile would take 0.8 x of that again from 20,000 steps
    on, but what it trains does not repeat from its seed, so that no training could be resumed bit for bit.
    """
    if device.type != "cuda" or all(p.dim() < 4 for p in net.parameters()):
        return net

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits: Tensor = net(x)
        return logits

    return forward
