"""`fit`, the one training loop: batch, objective, optimizer, schedule, averaged weights, state."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from kdcli import BadInput
from kdcli.config import Distill, Train
from kdcli.data.augment import Views, blend
from kdcli.data.dataset import Split
from kdcli.losses import Loss, labelled, objective, shares, soft_loss
from kdcli.machine import distributed
from kdcli.machine.device import forward_of, seeded
from kdcli.nets.models import MLP
from kdcli.runs.directory import State
from kdcli.teachers.teacher import Teacher

Tensors = tuple[Tensor, ...] | list[Tensor]
Soft = tuple[Teacher | None, Distill | None]


class Fitted(NamedTuple):
    """What there is after an epoch: means over the samples as they were seen, the net to evaluate and to keep, and what
    gives the tensors to continue from, which change with the next step."""

    epoch: int  # from 1
    loss: float
    hard_loss: float  # over the labelled samples
    t2_kl: float | None
    soft: float | None  # of a student whose loss is not T^2 KL
    train_errors: int  # of the labelled samples too
    diverged_at: int | None  # the first step whose loss was not finite, from 0 over the whole training
    net: nn.Module  # with averaged weights where `ema` is set
    state: Callable[[], dict[str, Tensor]]


NOTHING = State(0, {})


def fit(
    net: nn.Module,
    transfer_set: Split,
    train: Train,
    seed: int,
    *,
    teacher: Teacher | None = None,
    distill: Distill | None = None,
    start: State = NOTHING,
) -> Iterator[Fitted]:
    """Train a net in place, yielding after every epoch; on hard labels or, with a teacher, on its soft targets too.

    The net and the transfer set lie on one device. Order, views and dropout depend on (seed, epoch) alone: continued
    from a state, training goes on as if it had never stopped. Raises BadInput when the state is of another training.
    """
    n, device = len(transfer_set), transfer_set.labels.device
    steps = train.steps(n)
    views = Views(transfer_set, train, seed, teacher.views if teacher else None)
    loop = _Loop(net, views, (teacher, distill), start, steps)
    for epoch in range(start.epochs, train.epochs):
        _in_training(net)
        order = views.order(epoch).to(device)
        drawn, ends = views.draw(epoch), [*range(train.batch_size, n, train.batch_size)][: steps - 1]
        with seeded(seed, "dropout", epoch):
            batches = [slice(start, end) for start, end in pairwise([0, *ends, n])]
            found = [loop.step(order[rows], {name: draws[rows] for name, draws in drawn.items()}) for rows in batches]
        sums, errors, counts = zip(*found, strict=True)
        loss = Loss(*(torch.stack(part) for part in zip(*sums, strict=True)))  # on the device, read once an epoch
        finite = loss.total.isfinite()
        yield Fitted(
            epoch=epoch + 1,
            loss=float(loss.total.sum()) / n,
            hard_loss=float(loss.hard.sum()) / max(int(sum(counts)), 1),
            t2_kl=float(loss.t2_kl.sum()) / n if teacher else None,
            soft=float(loss.soft.sum()) / n if teacher and distill and not distill.plain else None,
            train_errors=int(torch.stack(errors).sum()),
            diverged_at=None if finite.all() else epoch * steps + int(finite.int().argmin()),
            net=loop.average.module if loop.average else net,
            state=loop.tensors,
        )


def _in_training(net: nn.Module) -> None:
    """Put a net in train mode, but its frozen parts: their BatchNorm must not learn from what their weights do not."""
    net.train()
    learning = [part for part in net.modules() if any(w.requires_grad for w in part.parameters(recurse=False))]
    of_head = len(learning) == 1 and not all(weight.requires_grad for weight in net.parameters())
    for part in net.modules():
        weights = list(part.parameters())
        counting = of_head and getattr(part, "running_mean", None) is not None  # a BatchNorm without weights
        if (weights or counting) and not any(weight.requires_grad for weight in weights):
            part.eval()


class _Loop:
    """A net in training, and what moves it."""

    def __init__(self, net: nn.Module, views: Views, soft: Soft, start: State, steps: int) -> None:
        self.net, self.views, self.train, (self.teacher, self.distill) = net, views, views.train, soft
        train = self.train
        self.optimizer = make_optimizer(net, train)
        self.average = averaged(net, train.ema) if train.ema else None
        if start.epochs:
            self._restore(start.tensors)
        done = start.epochs * steps - 1
        self.rate = LambdaLR(self.optimizer, lambda i: learning_rate(train, i, steps) / train.lr, done)
        self.function = soft_loss(self.distill) if self.distill else None
        self.warmup = round(self.distill.warmup * steps) if self.distill else 0
        self.forward = forward_of(distributed.wrapped(net), views.images.labels.device)
        self.partly = bool((views.images.labels < 0).any())  # only then does a step ask which are labelled
        self.bounded = [part for part in net.modules() if isinstance(part, MLP)] if train.max_norm else []

    def step(self, index: Tensor, drawn: dict[str, Tensor]) -> tuple[Loss, Tensor, Tensor | int]:
        """One step on the samples at `index` [B], seen as `drawn` says: the sums of their losses, and of the labelled
        ones the errors and the number."""
        x, y = self.views.view(index, drawn, distributed.OWN), self.views.images.labels[index]
        taught = self.teacher.logits(drawn.get("kept", index), x) if self.teacher else None
        logits = distributed.whole(self.forward, x, len(index))
        if "mixup" in drawn:
            classes, labels = logits.shape[1], self.views.images.labels
            other = shares(labels[drawn["partner"]], classes) if "partner" in drawn else None
            y = blend(shares(y, classes), drawn["mixup"], other)
        known = labelled(y) if self.partly else None
        how, weights = (self.teacher.average, self.teacher.weights) if self.teacher else ("arithmetic", ())
        share = min((self.rate.last_epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0  # last_epoch: steps so far
        smoothing = self.train.label_smoothing
        loss = objective(logits, y, taught, self.distill, how, weights, smoothing, known, share, self.function)
        self.optimizer.zero_grad()
        loss.total.backward()
        if self.train.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.train.clip)
        self.optimizer.step()
        self.rate.step()
        for part in self.bounded:
            part.constrain(self.train.max_norm or 0)
        if self.average:
            self.average.update_parameters(self.net)
        wrong, n = logits.detach().argmax(1) != (y if y.dim() == 1 else y.argmax(1)), len(index)
        wrong, count = (wrong, n) if known is None else (wrong & known, known.sum())
        total, hard, t2_kl, soft = (part.detach() for part in loss)
        return Loss(total * n, hard * count, t2_kl * n, soft * n), wrong.sum(), count

    def tensors(self) -> dict[str, Tensor]:
        """All that training continues from, by name: the net's buffers, the optimizer and the averages included."""
        found = {f"net/{name}": tensor for name, tensor in self.net.state_dict().items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{i}/{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
        averages = self.average.state_dict() if self.average else {}
        return found | {f"average/{name}": tensor for name, tensor in averages.items()}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        kept: dict[int, dict[str, Tensor]] = {}
        weights = self.optimizer.param_groups[0]["params"]
        for name, tensor in part("optimizer/").items():
            i, _, key = name.partition("/")
            weight = weights[int(i)]  # whose layout the fused step asks of what it keeps
            alike = tensor.shape == weight.shape
            kept.setdefault(int(i), {})[key] = torch.empty_like(weight).copy_(tensor) if alike else tensor
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.net.load_state_dict(part("net/"))
            self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
            if self.average:
                self.average.load_state_dict(part("average/"))
        except (RuntimeError, ValueError, KeyError):
            message = "the saved training state does not belong to this net and optimizer: remove the run, kd runs rm"
            raise BadInput(message) from None


def make_optimizer(net: nn.Module, train: Train) -> Optimizer:
    """torch's optimizer of a `train` section, in its fused form: the others cost 16 % of a step more (make bench)."""
    weights = [{"params": [p for p in net.parameters() if p.requires_grad], "initial_lr": train.lr}]
    decay = train.weight_decay
    match train.optimizer:
        case "sgd":
            found = SGD(weights, train.lr, train.momentum or 0, 0, decay, nesterov=train.nesterov, fused=True)
            for weight in found.param_groups[0]["params"] if train.momentum else ():
                # the fused form fails without it where a weight has its first gradient after step one
                found.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
            return found
        case "adam":
            return Adam(weights, train.lr, weight_decay=decay, fused=True)
    return AdamW(weights, train.lr, weight_decay=decay, fused=True)


def averaged(net: nn.Module, most: float) -> AveragedModel:
    """A copy of the net that holds the exponential average of its weights and buffers. The decay starts low and rises
    to `most`, so that the average forgets the random start."""

    def update(averages: Tensors, current: Tensors, seen: Tensor | int) -> None:
        decay = min(most, (1 + int(seen)) / (10 + int(seen)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, 1 - decay)
        else:  # counts, such as those of batches that BatchNorm has seen
            torch._foreach_copy_(averages, current)

    return AveragedModel(net, multi_avg_fn=update, use_buffers=True)


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The rate of a step counted from 0 over the whole training, with `steps` to an epoch: linear warm-up, then the
    schedule, of which linear and cosine would reach zero one step after the last."""
    warmup = round(train.warmup * steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    done = (step - warmup) / max(train.epochs * steps - warmup, 1)
    match train.schedule:
        case "linear":
            return train.lr * (1 - done)
        case "cosine":
            return train.lr * (1 + math.cos(math.pi * done)) / 2
        case "step":
            return float(train.lr * (train.gamma or 0.1) ** sum(step >= m * steps for m in train.milestones or []))
    return train.lr
