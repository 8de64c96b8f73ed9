"""`fit`, the one training loop that teachers, ensemble members, baselines and students share."""

import contextlib
import copy
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from kdcli import BadInput, core
from kdcli.config import Distill, Train
from kdcli.core import MLP, generator
from kdcli.data import Jittered, Split

Teacher = Callable[[Tensor, Tensor], Tensor]  # (index [M, B], inputs [M, B, D]) -> soft targets [M, B, C]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Epoch(NamedTuple):
    """What there is after one epoch, a list entry for each net: `models` are those to evaluate and keep (with averaged
    weights where `ema` is set), `states` the tensors to continue from, which change with the next step."""

    metrics: list[dict[str, float]]
    models: Sequence[MLP]
    states: Sequence[dict[str, Tensor]]


def fit(
    models: Sequence[MLP],
    transfer_set: Split,
    train: Train,
    seeds: Sequence[int],
    distill: tuple[Distill, Teacher] | None = None,
    done: int = 0,
    states: Sequence[dict[str, Tensor]] = (),
) -> Iterator[Epoch]:
    """Train nets of one shape in place, all at once, yielding after every epoch; on hard labels, or on `distill`'s
    soft targets too. Each sees its own order, shifts and dropout, which depend on its (seed, epoch) alone: from the
    `states` after `done` epochs it goes on as if it had never stopped.

    The transfer set lies on the models' device. On a GPU a step is one CUDA graph.
    """
    keep_freed_memory()
    device, n = transfer_set.labels.device, len(transfer_set)
    source = Jittered(transfer_set, train.jitter) if train.jitter else transfer_set
    averaged = [copy.deepcopy(model) for model in models] if train.ema else models
    net = core.stack(models)
    average = core.stack(averaged) if train.ema else net
    rate = torch.zeros((), device=device)
    state, optimize = make_optimizer(net, train, rate)
    if train.ema:
        state |= {f"{name}/ema": p.detach() for name, p in average.named_parameters()}
    own = _resumed(state, len(models), states)
    draws = [torch.Generator(device) for _ in seeds]
    steps = math.ceil(n / train.batch_size)

    step = _make_step(net, source, transfer_set.labels, train, draws, optimize, distill)
    if device.type == "cuda":
        net.train()
        sizes = {min(train.batch_size, n), n - (steps - 1) * train.batch_size}
        step = _captured(step, [(len(seeds), size) for size in sizes], draws, state)

    for epoch in range(done, train.epochs):
        net.train()
        order = torch.stack([torch.randperm(n, generator=generator(seed, "order", epoch)) for seed in seeds]).to(device)
        shifts = torch.stack([_shifts(train.jitter, n, seed, epoch) for seed in seeds], 1).to(device)
        for draw, seed in zip(draws, seeds, strict=True):
            draw.manual_seed(core.stream(seed, "dropout", epoch))
        seen = []  # what the nets said, on the device; read once an epoch

        for i, (index, shift) in enumerate(
            zip(order.split(train.batch_size, 1), shifts.split(train.batch_size, 2), strict=True)
        ):
            rate.fill_(learning_rate(train, epoch * steps + i, steps))
            seen.append([out.clone() for out in step(index, shift)])
            if train.ema:  # with a decay that starts low, so that the average forgets the random start
                decay = min(train.ema, (1 + epoch * steps + i) / (10 + epoch * steps + i))
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

        logits, soft_targets = (torch.cat(outs, 1) for outs in zip(*seen, strict=True))
        metrics = _metrics(logits, transfer_set.labels[order], soft_targets, distill)
        for of_one, z in zip(metrics, logits, strict=True):
            _mark_divergence(of_one, z, epoch * steps, train.batch_size)
        yield Epoch([{"epoch": epoch + 1} | of_one for of_one in metrics], averaged, own)


def _mark_divergence(metrics: dict[str, float], logits: Tensor, before: int, batch_size: int) -> None:
    """Where the loss of an epoch is not finite, say at which step what the net said, logits [N, C], first was not;
    `before` steps came before this epoch."""
    if not math.isfinite(metrics["loss"]):
        metrics["diverged_at"] = before + int((~logits.isfinite().all(1)).int().argmax()) // batch_size


def _make_step(
    net: MLP,
    source: Split | Jittered,
    labels: Tensor,
    train: Train,
    draws: Sequence[torch.Generator],
    optimize: Callable[[], None],
    distill: tuple[Distill, Teacher] | None,
) -> Step:
    """All that happens to a batch, which is what a CUDA graph holds."""

    def step(index: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """One step on the samples at `index` [M, B], shifted by `shift` [2, M, B]: logits, soft targets [M, B, C]."""
        x = source.inputs(index, shift)
        soft_targets = distill[1](index, x) if distill else x.new_zeros(*index.shape, 0)
        logits = net(x, draws) if len(draws) > 1 else net(x[0], draws)[None]
        net.zero_grad()
        _loss(logits, labels[index], soft_targets, distill).total.sum().backward()
        with torch.no_grad():
            optimize()
        if train.max_norm:
            net.constrain(train.max_norm)
        return logits.detach(), soft_targets

    return step


def _resumed(
    state: dict[str, Tensor], members: int, states: Sequence[dict[str, Tensor]]
) -> Sequence[dict[str, Tensor]]:
    """Each member's own part of the training state, as views, after `states` were copied into it. Raises BadInput when
    they are of another training."""
    own = [{k: t[m] if members > 1 and t.dim() else t for k, t in state.items()} for m in range(members)]
    for saved, tensors in zip(states, own, strict=False):
        if {n: (t.shape, t.dtype) for n, t in saved.items()} != {n: (t.shape, t.dtype) for n, t in tensors.items()}:
            raise BadInput("the saved training state is not one of this net and optimizer: remove the run, kd runs rm")
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    return own


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: it would hand the gradients back to the kernel and take them again, page by page,
    at every step, which costs 4 % of a teacher's."""
    with contextlib.suppress(OSError, AttributeError):  # another C library does as it likes
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**30)


def _shifts(jitter: int, n: int, seed: int, epoch: int) -> Tensor:
    return torch.randint(2 * jitter + 1, (2, n), generator=generator(seed, "jitter", epoch))


def _loss(logits: Tensor, labels: Tensor, soft_targets: Tensor, distill: tuple[Distill, Teacher] | None) -> core.Loss:
    if distill is None:
        hard = core.cross_entropy(logits, labels)
        return core.Loss(hard, torch.zeros_like(hard), hard)
    loss = distill[0].model_dump(exclude={"teacher"})
    return core.distillation_loss(logits, labels, soft_targets, **loss)


def _metrics(
    logits: Tensor, labels: Tensor, soft_targets: Tensor, distill: tuple[Distill, Teacher] | None
) -> list[dict[str, float]]:
    """The means of an epoch for each net, from what it said at every step: logits [M, N, C], labels [M, N]."""
    loss = _loss(logits, labels, soft_targets, distill)
    columns = {"loss": loss.total, "hard_loss": loss.hard, "train_errors": (logits.argmax(-1) != labels).sum(-1)}
    if distill:  # T^2 KL(soft targets || student): 0 for a perfect match
        columns["t2_kl"] = distill[0].T ** 2 * (loss.soft - core.entropy(soft_targets))
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _captured(
    step: Step, sizes: Sequence[tuple[int, int]], draws: Sequence[torch.Generator], state: dict[str, Tensor]
) -> Step:
    """`step` as one CUDA graph for each size [M, B] of its index: a launch a step in place of a hundred.

    The graph is captured with the batch in buffers of its own, after the steps on a side stream that CUDA asks for;
    what they do to the training state is undone.
    """
    before = {name: tensor.clone() for name, tensor in state.items()}
    device = draws[0].device
    graphs = {}
    for size in sizes:
        index, shift = (torch.zeros(*more, *size, dtype=torch.int64, device=device) for more in ((), (2,)))
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step(index, shift)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for draw in draws:
            graph.register_generator_state(draw)  # so that a replay draws on from where the last one stopped
        with torch.cuda.graph(graph):
            outs = step(index, shift)
        graphs[size] = graph, index, shift, outs
    for name, tensor in state.items():
        tensor.copy_(before[name])

    def replay(index: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        graph, its_index, its_shift, outs = graphs[index.shape[0], index.shape[1]]
        its_index.copy_(index)
        its_shift.copy_(shift)
        graph.replay()
        return outs

    return replay


def make_optimizer(net: MLP, train: Train, rate: Tensor) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The training state by name, which is the weights and all that the optimizer keeps of them, and its step, which
    moves them along their gradients at `rate`, a tensor because a CUDA graph reads it anew at every step.

    torch's functional form: the classes in torch.optim import its compiler, which costs a second and 300 MB.
    """
    weights = list[Tensor](net.parameters())
    fixed: dict[str, Any] = {"lr": rate, "weight_decay": train.weight_decay, "maximize": False, "fused": True}
    kept: dict[str, list[Tensor]]
    if train.optimizer == "sgd":
        kept = {"momentum_buffer": [torch.zeros_like(w) for w in weights]} if train.momentum else {}
        buffers = list[Tensor | None](kept.get("momentum_buffer", []))

        def step(gradients: list[Tensor]) -> None:
            sgd(weights, gradients, buffers, momentum=train.momentum or 0.0, dampening=0, nesterov=False, **fixed)
    else:
        kept = {key: [torch.zeros_like(w) for w in weights] for key in ("exp_avg", "exp_avg_sq")}
        kept["step"] = [torch.zeros((), device=w.device) for w in weights]
        adam_ = adam if train.optimizer == "adam" else adamw

        def step(gradients: list[Tensor]) -> None:
            averages, squares, steps = kept.values()
            adam_(
                weights,
                gradients,
                averages,
                squares,
                [],
                steps,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                **fixed,
            )

    names = [name for name, _ in net.named_parameters()]
    state = dict(zip(names, (w.detach() for w in weights), strict=True))
    state |= {f"{name}/{key}": t for key, ts in kept.items() for name, t in zip(names, ts, strict=True)}
    return state, lambda: step([w.grad for w in weights if w.grad is not None])


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
