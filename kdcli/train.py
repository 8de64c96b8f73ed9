"""`fit`, the one training loop that teachers, ensemble members, baselines and students share."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli.config import Distill, Train
from kdcli.core import MLP, Loss, distillation_loss, generator
from kdcli.data import Jittered, Split

Teacher = Callable[[Tensor, Tensor], Tensor]  # (index [B], inputs [B, D]) -> soft targets [B, C]


class Epoch(NamedTuple):
    """The state after one epoch: `model` is the one to evaluate and keep (averaged weights where `ema` is set)."""

    metrics: dict[str, float]
    model: MLP


def fit(
    model: MLP, transfer_set: Split, train: Train, seed: int, distill: tuple[Distill, Teacher] | None = None
) -> Iterator[Epoch]:
    """Train `model` in place, yielding after every epoch; on hard labels, or on `distill`'s soft targets too.

    The transfer set lies on the model's device. Batches, shifts and dropout depend on (seed, epoch) alone.
    """
    device, n = transfer_set.labels.device, len(transfer_set)
    jittered = Jittered(transfer_set, train.jitter) if train.jitter else None
    optimizer = make_optimizer(model, train)
    averaged = copy.deepcopy(model) if train.ema else model
    steps = math.ceil(n / train.batch_size)

    for epoch in range(train.epochs):
        model.train()
        order = torch.randperm(n, generator=generator(seed, "order", epoch)).to(device)
        shifts = torch.randint(2 * train.jitter + 1, (2, n), generator=generator(seed, "jitter", epoch)).to(device)
        draws = generator(seed, "dropout", epoch, device)
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # of loss, T^2 KL, L_CE, errors; read once an epoch

        for step, index in enumerate(torch.split(order, train.batch_size)):
            labels = transfer_set.labels[index]
            if jittered:
                x = jittered.inputs(index, shifts[:, step * train.batch_size :][:, : len(index)])
            else:
                x = transfer_set.inputs(index)
            logits = model(x, draws)
            loss = _loss(logits, labels, index, x, distill)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, epoch * steps + step, steps)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            if train.max_norm:
                model.constrain(train.max_norm)
            with torch.no_grad():
                if train.ema:  # with a decay that starts low, so that the average forgets the random start
                    decay = min(train.ema, (1 + epoch * steps + step) / (10 + epoch * steps + step))
                    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
                errors = (logits.argmax(1) != labels).sum()
                sums += torch.stack([loss.total * len(index), loss.soft * len(index), loss.hard * len(index), errors])

        total, soft, hard, errors = sums.tolist()
        metrics = {"epoch": epoch + 1, "loss": total / n, "hard_loss": hard / n, "train_errors": int(errors)}
        if distill:
            metrics["t2_kl"] = soft / n
        yield Epoch(metrics, averaged)


def _loss(logits: Tensor, labels: Tensor, index: Tensor, x: Tensor, distill: tuple[Distill, Teacher] | None) -> Loss:
    if distill is None:
        hard = F.cross_entropy(logits.double(), labels)
        return Loss(hard, torch.zeros_like(hard), hard)
    settings, teacher = distill
    return distillation_loss(
        logits,
        labels,
        teacher(index, x),
        T=settings.T,
        lambda1=settings.lambda1,
        lambda2=settings.lambda2,
        t_squared=settings.t_squared,
    )


def make_optimizer(model: MLP, train: Train) -> torch.optim.Optimizer:
    """The optimizer of a `train` section, in its fused form."""
    parameters, lr, decay = list(model.parameters()), train.lr, train.weight_decay
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=train.momentum or 0.0, weight_decay=decay, fused=True)
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay, fused=True)


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The rate of a step counted from 0 over the whole training, with `steps` to an epoch: linear warm-up, then the
    schedule, which would reach zero one step after the last."""
    warmup = round(train.warmup * steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    done = (step - warmup) / (train.epochs * steps - warmup)
    match train.schedule:
        case "linear":
            return train.lr * (1 - done)
        case "cosine":
            return train.lr * (1 + math.cos(math.pi * done)) / 2
    return train.lr


@torch.inference_mode()
def predict(model: MLP, split: Split, batch_size: int = 2_000) -> Tensor:
    """Logits [N, C] of a split's images as they are, in eval mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    logits = [
        model(split.inputs(index)) for index in torch.arange(len(split)).to(split.labels.device).split(batch_size)
    ]
    model.train(was_training)
    return torch.cat(logits)
