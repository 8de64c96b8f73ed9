"""A teacher is what gives logits: a run, or the members of an ensemble, asked through their cached logits or live."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcli import BadInput, code
from kdcli.config import Average
from kdcli.data.augment import Fixed
from kdcli.data.dataset import Dataset, Split, open_dataset
from kdcli.machine import distributed
from kdcli.machine.device import place
from kdcli.runs.directory import ONNX, Run, open_run
from kdcli.teachers.imports import imported


@dataclass(frozen=True)
class Teacher:
    """`logits(index, x)`: [members, B, C] for the samples at `index` [B] of the transfer set, seen as `x` [B, C, H, W];
    `average` and `weights` say how those of several members are combined. One that was asked about fixed `views` knows
    the samples by their rows among what was kept of those."""

    logits: Callable[[Tensor, Tensor], Tensor]
    average: Average = "arithmetic"
    weights: Sequence[float] = ()
    views: Fixed | None = None


def dataset_of(run: Run, data_dir: Path | None) -> Dataset:
    """The dataset of a run. Raises BadInput when it is not there, or no longer what it was."""
    dataset = open_dataset(run.spec.data, data_dir)
    for key, which in (("fingerprint", "its"), ("unlabelled", "its unlabelled")):
        if getattr(dataset.facts, key) != getattr(run.spec.dataset, key):
            what = f"{which} images are not those that it was planned with: they have changed since"
            raise BadInput(f"{run.name}: {what}")
    return dataset


def members(run: Run) -> list[Run]:
    """The runs of an ensemble's members, or the run itself."""
    return [open_run(run.root, name) for name in run.spec.parents] if run.spec.command == "ensemble" else [run]


def check_code(run: Run) -> None:
    """Raise BadInput where somebody's file that makes a net of a run, or of its members, has changed since."""
    for member in members(run):
        model = member.spec.model
        if model and model.file and code.digest(model.name or "") != member.spec.code:
            raise BadInput(f"{model.file}: has changed since {member.name} was trained with it")


def nets(run: Run, device: torch.device) -> list[nn.Module]:
    """The trained net of a run, or those of an ensemble's members: frozen, in eval mode. Raises BadInput when the
    weights are damaged, or somebody's file that makes the net has changed."""
    found = []
    check_code(run)
    for member in members(run):
        spec, model = member.spec, member.spec.model
        if spec.origin and spec.origin.logits:
            raise BadInput(f"{member.name}: is a file of logits: it can be asked about no other image or view")
        content = member.content(ONNX) if spec.origin and spec.origin.onnx else None
        net = imported(spec.origin, model, spec.dataset, False, content).net
        try:
            net.load_state_dict(member.load("weights"))
        except RuntimeError:
            raise BadInput(f"{member.path}: its weights do not fit its config.yaml: {member.remedy}") from None
        found.append(place(net, device).eval().requires_grad_(False))
    return found


def kept_logits(run: Run, split: str, images: int) -> Tensor:
    """The logits [M, N, C], M = 1 of a lone net, that a run's members kept of the N `train` or `test` images. Raises
    BadInput when they are not there."""
    found = []
    for member in members(run):
        logits = member.load("logits").get(split)
        if logits is None or logits.shape != (images, len(member.spec.dataset.classes)):
            raise BadInput(f"{member.path}: its logits are not those of the {images:,} {split} images: {member.remedy}")
        found.append(logits)
    return torch.stack(found)


def logits_of(run: Run, part: str, split: Split) -> Tensor:
    """The logits [M, N, C], M = 1 of a lone net, of a run's members for a part of the images, on their device: those
    that a member kept, else what its net says. Raises BadInput when those kept are not of these images."""
    found, device = [], split.labels.device
    for member in members(run):
        kept = part in member.load("logits")
        logits = kept_logits(member, part, len(split))[0] if kept else predict(nets(member, device)[0], split)
        found.append(logits.to(device))
    return torch.stack(found)


def cached(run: Run, transfer: Tensor, images: int, device: torch.device, unlabelled: Split | None = None) -> Teacher:
    """A teacher asked once: right while every image is seen as it is. `transfer`: positions of the transfer set, which
    the `unlabelled` images follow."""
    logits = kept_logits(run, "train", images)[:, transfer]
    if unlabelled:
        logits = torch.cat([logits, logits_of(run, "unlabelled", unlabelled).cpu()], 1)
    return Teacher(distributed.sharded(logits, device), run.spec.average, run.spec.weights)


def live(run: Run, device: torch.device) -> Teacher:
    """A teacher that sees what its student sees."""
    asked = nets(run, device)
    return Teacher(lambda _, x: torch.stack([net(x.clone()) for net in asked]), run.spec.average, run.spec.weights)


def weights_checksum(run: Run) -> str:
    """A checksum of the weights of a finished run, or of those of an ensemble's members."""
    found = [(member, member.result().sha256.get("weights.safetensors", "")) for member in members(run)]
    weights = [f"{member.spec.content if member.spec.origin else ''}{own}" for member, own in found]
    return hashlib.sha256(" ".join(weights).encode()).hexdigest()


@torch.inference_mode()
def predict(net: nn.Module, split: Split) -> Tensor:
    """Logits [N, C] of a split's images as they are, in eval mode; the mode of the net is put back."""
    was_training = net.training
    batch_size = 1_000 if split.store[0].numel() <= 1_000 else 100  # of large images so many take twice the time
    net.eval()
    batches: Sequence[Tensor] = torch.arange(len(split), device=split.labels.device).split(batch_size)
    logits = torch.cat([net(split.inputs(index)) for index in batches])
    net.train(was_training)
    return logits.float()
