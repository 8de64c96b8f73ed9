"""A teacher's logits of fixed views, in its run's directory: asked once, whatever the epochs, seeds and students (the
idea of FKD: Shen and Xing, arXiv:2112.01528).

    views-….npy     [K, N, C], float32 or float16, as numpy reads it
    views-….done    the sha256 of each view, which is written last: a view that was not asked to the end, or is damaged,
                    is asked again
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcli import BadInput, Note
from kdcli.config import AUGMENTATION
from kdcli.data.augment import Fixed, Views, different_views
from kdcli.data.cache import array_in
from kdcli.data.dataset import Split
from kdcli.runs.directory import Run
from kdcli.teachers.teacher import Teacher, members, nets, weights_checksum

VERSION = 1  # of how views are drawn and kept
BATCH = 256
Logits = NDArray[np.floating]


def kept_views(
    run: Run, images: Split, key: str, fixed: Fixed, half: bool, device: torch.device, note: Note
) -> Teacher:
    """A teacher that answers, in float32, from the logits that it was asked for once about the `fixed` views of
    `images`, which `key` tells from others; with `half` they are kept in float16. Of two processes one asks and the
    other waits. Raises BadInput where float16 does not hold them, OSError where they cannot be written."""
    found = [_of(member, images, key, fixed, half, device, note) for member in members(run)]

    def logits(rows: Tensor, x: Tensor) -> Tensor:
        view, image = np.divmod(rows.numpy(), len(images))
        asked = np.stack([kept[view, image] for kept in found])
        return torch.from_numpy(asked).to(x.device, non_blocking=True).float()

    return Teacher(logits, run.spec.average, run.spec.weights, fixed)


def _of(run: Run, images: Split, key: str, fixed: Fixed, half: bool, device: torch.device, note: Note) -> Logits:
    """The logits [K, N, C] of a lone net, mapped into memory; those that are not there yet are asked for."""
    how = fixed.train.model_dump(include={*AUGMENTATION})
    # Another torch may draw other views from the same generators.
    drawn = [hashlib.sha256(draws.numpy().tobytes()).hexdigest() for draws in fixed.draw(0).values()]
    about = json.dumps([VERSION, key, weights_checksum(run), how, fixed.count, half, drawn])
    path = run.path / f"views-{hashlib.sha256(about.encode()).hexdigest()[:16]}.npy"
    kind, shape = "<f2" if half else "<f4", [fixed.count, len(images), len(run.spec.dataset.classes)]
    with (run.path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _naming(path):
            views = array_in(path, kind, shape)
            sums = array_in(path.with_suffix(".done"), np.uint8, [fixed.count, hashlib.sha256().digest_size])
        if missing := [k for k, view in enumerate(views) if hashlib.sha256(view).digest() != sums[k].tobytes()]:
            (net,), some = nets(run, device), f"{len(missing)} of " if len(missing) < fixed.count else ""
            what = f"{some}{fixed.count} views of each of {len(images):,} images"
            exact = ", all that there are: training is exact" if fixed.count == different_views(fixed.train) else ""
            note(f"{run.name}: is asked about {what}, once for all epochs and all students that see these{exact}")
            for k in missing:
                answers = _answers(net, images, fixed, k, device)
                _write(sums, k, [_write(views, k, ((part.half() if half else part).numpy() for part in answers))])
    return views


@torch.inference_mode()
def _answers(net: nn.Module, images: Split, fixed: Fixed, k: int, device: torch.device) -> Iterator[Tensor]:
    """The logits [B, C] of view k of the images, batch by batch."""
    drawn = fixed.draw(k)
    for index in torch.arange(len(images)).split(BATCH):
        draws, samples, rows = {name: d[index] for name, d in drawn.items()}, index, torch.arange(len(index))
        if "partner" in draws:  # is sent to the device too
            samples, draws["partner"] = torch.cat([index, draws["partner"]]), len(index) + rows
        views = Views(images.at(samples).to(device), fixed.train, 0)
        yield net(views.view(rows.to(device), {name: d.to(device) for name, d in draws.items()})).float().cpu()


def _write(array: "np.memmap[Any, Any]", k: int, parts: Iterable[NDArray[Any]]) -> NDArray[np.uint8]:
    """Write row k of an array that a file holds, past the map: where the disk is full that is an OSError, with the
    file's name. Returns its sha256. Raises BadInput where a value is too large for float16."""
    digest, file = hashlib.sha256(), Path(str(array.filename))
    with _naming(file), file.open("r+b") as out:
        out.seek(array.offset + k * array[0].nbytes)
        for part in parts:
            if part.dtype == np.float16 and not np.isfinite(part).all():
                raise BadInput("distill.half: float16 does not hold the teacher's logits: remove it")
            digest.update(part.tobytes())
            out.write(part.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """An OSError names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
