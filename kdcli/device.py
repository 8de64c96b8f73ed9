"""Where a net is trained, and random draws that repeat."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import BadInput

COMPILED_FROM = 20_000  # steps: compiling takes 10 to 18 s and spares 0.5 to 1 ms a step (H200, make gpu)


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
    """The net on a device, laid out as its convolutions run fastest there."""
    return net.to(device).to(memory_format=torch.channels_last) if device.type == "cuda" else net


def forward_of(net: nn.Module, device: torch.device, steps: int) -> Callable[[Tensor], Tensor]:
    """How a net is asked while it is trained for so many steps: on a CPU as it is, on a GPU as `make gpu` found best.

    There a step of a perceptron waits for launches, and neither bfloat16 nor compiling gains. Convolutions gain from
    bfloat16 and, where there are steps enough, from being compiled: then they repeat to float tolerance, not bit for
    bit.
    """
    if device.type != "cuda" or all(p.dim() < 4 for p in net.parameters()):
        return net
    asked: Callable[[Tensor], Tensor] = torch.compile(net, mode="reduce-overhead") if steps >= COMPILED_FROM else net

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return asked(x)

    return forward
