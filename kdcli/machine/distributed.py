"""One training by several processes, which torchrun starts: each computes every WORLD-th row of a batch, and all of
them the loss of the whole batch, so that what is trained is what one process trains, up to the order of sums.

Without torchrun all that is here does nothing.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Function
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from kdcli.nets.models import dropped

STARTED = dist.is_torchelastic_launched()
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (
    int(os.environ[name]) if STARTED else alone
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)
OWN = slice(RANK, None, WORLD)  # the rows of a batch that are this process's
Logits = Callable[[Tensor, Tensor], Tensor]  # of a teacher
TIMEOUT = timedelta(days=1)  # a process that dies is noticed at once: its connections close
DRAWING: set[Callable[..., Tensor]] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
DRAWING |= {F.alpha_dropout, F.feature_alpha_dropout}
DRAWING |= {Tensor.bernoulli_, dropped}  # torchvision's and timm's stochastic depth; the perceptron's dropout
T = TypeVar("T")


@contextmanager
def alone() -> Iterator[None]:
    """As if this process were the only one: the others wait for what it finds."""
    global RANK, WORLD, OWN
    before, (RANK, WORLD, OWN) = (RANK, WORLD, OWN), (0, 1, slice(None))
    try:
        yield
    finally:
        RANK, WORLD, OWN = before


def same(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them."""
    if WORLD == 1:
        return find()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, store=_store(), rank=RANK, world_size=WORLD)
    told: list[Any] = [find() if RANK == 0 else None]
    dist.broadcast_object_list(told)
    found: T = told[0]
    return found


def _store() -> Store:
    """torchrun's store under a name that the first process makes up: after a restart the store still leads to processes
    that died, and which restart it is not all of them know (pytorch issues 108158 and 135712)."""
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    own = name = uuid4().hex
    if RANK == 0:
        store.set("name", name)
        for rank in range(1, WORLD):
            store.set(f"{name}/{store.get(f'{name}/{rank}').decode()}", "")
        return PrefixStore(name, store)
    while not store.check([f"{name}/{own}"]):  # until it is answered the name may be that of a process that died
        name = store.get("name").decode()
        store.set(f"{name}/{RANK}", own)
        time.sleep(0.01)
    return PrefixStore(name, store)


def wrapped(net: nn.Module) -> nn.Module:
    """The net, its gradients averaged over the processes; it begins with the first one's weights."""
    return net if WORLD == 1 else DistributedDataParallel(net, static_graph=True)  # some weights may be idle


def whole(forward: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """The logits [rows, C] of a batch, of which this process has its own, `x`."""
    if WORLD == 1:
        return forward(x)
    with _Shared(rows):
        own = forward(x)
    return gathered(own, rows)


def sharded(kept: Tensor, device: torch.device) -> Logits:
    """A teacher's kept logits [M, N, C], of which each process holds its own rows, by their index [B] -> [M, B, C]."""
    own = kept[:, OWN].to(device)

    def look_up(index: Tensor, _: Tensor) -> Tensor:
        found, mine = own.new_zeros(len(own), len(index), own.shape[2]), index % WORLD == RANK
        found[:, mine] = own[:, index[mine] // WORLD]
        dist.all_reduce(found)
        return found

    return (lambda index, _: own.index_select(1, index)) if WORLD == 1 else look_up


def asked(logits: Logits) -> Logits:
    """What a live teacher says of a batch, when each process asks it about its own rows."""
    if WORLD == 1:
        return logits
    return lambda index, x: gathered(logits(index, x).transpose(0, 1), len(index)).transpose(0, 1)


def gathered(own: Tensor, rows: int) -> Tensor:
    """A tensor [rows, ...] of which each process has its own rows."""
    placed = own.new_zeros(rows, *own.shape[1:])
    placed[OWN] = own
    found: Tensor = _Sum.apply(placed)
    return found


class _Sum(Function):
    """The sum of a tensor over the processes. The gradient of the whole batch's loss, which every process has, comes
    back times WORLD: DDP's mean over the processes is then the sum over the rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        found = own.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class _Shared(TorchFunctionMode):
    """What a net computes over a whole batch, as it is shared: the statistics of BatchNorm, and random draws, of which
    each process takes its own rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.own = rows, len(range(rows)[OWN])

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs["training"]:
            return batch_norm(*args, **kwargs)
        if function not in DRAWING or len(args[0]) != self.own:
            return function(*args, **kwargs)
        x, *more = args
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format  # the order in which torch draws
        batch = torch.empty(self.rows, *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        batch[OWN] = x
        own = function(batch, *more, **kwargs)[OWN]
        return x.copy_(own) if function is Tensor.bernoulli_ else own


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch's `batch_norm` in training, over the rows of all processes (its SyncBatchNorm is for GPUs alone)."""
    own, channels = x.float(), (1, -1, *[1] * (x.dim() - 2))
    over = [d for d in range(x.dim()) if d != 1]
    sums = _Sum.apply(torch.cat([own.sum(over), own.new_tensor([x.numel() // x.shape[1]])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = own - mean.view(channels)
    var = _Sum.apply(centred.square().sum(over)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    scale = ((var + eps).rsqrt() * (1 if weight is None else weight)).view(channels)
    return (centred * scale if bias is None else torch.addcmul(bias.view(channels), centred, scale)).to(x.dtype)
