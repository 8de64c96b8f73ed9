"""A teacher's logits of fixed views, in its run's directory: asked once, whatever the epochs, seeds and students (the
idea of FKD: Shen and Xing, arXiv:2112.01528).

    views-….npy    [K, N, C], float32 or float16, as numpy reads it; after that the sha256 of each view, which is
                   written last: a view that was not asked to the end, or is damaged, is asked again
"""

import contextlib
import fcntl
import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcli import BadInput, Note
from kdcli.config import AUGMENTATION
from kdcli.data.augment import Fixed, Views, different_views
from kdcli.data.dataset import Split
from kdcli.runs.directory import Run
from kdcli.teachers.teacher import Teacher, members, nets, weights_checksum

VERSION = 1  # of how views are drawn and kept
BATCH, DIGEST = 256, hashlib.sha256().digest_size
Logits = NDArray[np.floating]


def kept_views(
    run: Run, images: Split, key: str, fixed: Fixed, half: bool, device: torch.device, note: Note
) -> Teacher:
    """A teacher that answers, in float32, from the logits that it was asked for once about the `fixed` views of
    `images`, which `key` tells from others; with `half` they are kept in float16. Of two processes one asks and the
    other waits. Raises BadInput where float16 does not hold them, OSError where they cannot be written."""
    found = [_of(member, images, key, fixed, half, device, note) for member in members(run)]

    def logits(rows: Tensor, x: Tensor) -> Tensor:
        asked = np.stack([kept[rows.numpy()] for kept in found])
        return torch.from_numpy(asked).to(x.device, non_blocking=True).float()

    return Teacher(logits, run.spec.average, run.spec.weights, fixed)


def _of(run: Run, images: Split, key: str, fixed: Fixed, half: bool, device: torch.device, note: Note) -> Logits:
    """The logits [K * N, C] of a lone net, mapped into memory; those that are not there yet are asked for."""
    how = fixed.train.model_dump(include={*AUGMENTATION})
    # Another torch may draw other views from the same generators.
    drawn = [hashlib.sha256(draws.numpy().tobytes()).hexdigest() for draws in fixed.draw(0).values()]
    about = json.dumps([VERSION, key, weights_checksum(run), how, fixed.count, half, drawn])
    path = run.path / f"views-{hashlib.sha256(about.encode()).hexdigest()[:16]}.npy"
    file = _File(path, (fixed.count, len(images), len(run.spec.dataset.classes)), "<f2" if half else "<f4")
    with (run.path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing := file.missing():
            (net,), some = nets(run, device), f"{len(missing)} of " if len(missing) < fixed.count else ""
            what = f"{some}{fixed.count} views of each of {len(images):,} images"
            exact = ", all that there are: training is exact" if fixed.count == different_views(fixed.train) else ""
            note(f"{run.name}: is asked about {what}, once for all epochs and all students that see these{exact}")
            for k in missing:
                file.write(k, _answers(net, images, fixed, k, device))
    return file.mapped().reshape(-1, file.shape[2])


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


@dataclass(frozen=True)
class _File:
    path: Path
    shape: tuple[int, int, int]
    dtype: str

    @property
    def header(self) -> bytes:
        content = io.BytesIO()
        about = {"descr": self.dtype, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(content, about)
        return content.getvalue()

    def at(self, k: int) -> int:
        """Where view k begins; behind the last one, the checksums."""
        return len(self.header) + k * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def mapped(self) -> Logits:
        return np.memmap(self.path, self.dtype, "r", len(self.header), self.shape)

    def missing(self) -> list[int]:
        """The views that are still to be written; a file that is not there, or has another size, is begun."""
        count = self.shape[0]
        size = self.at(count) + count * DIGEST
        if not self.path.exists() or self.path.stat().st_size != size or not self._begins_right():
            self.path.unlink(missing_ok=True)  # another process may have it mapped, so it is not cut short
            with self._naming(), self.path.open("wb") as file:
                file.write(self.header)
                file.truncate(size)
        views = self.mapped()
        with self.path.open("rb") as file:
            file.seek(self.at(count))
            digests = [file.read(DIGEST) for _ in range(count)]
        return [k for k, digest in enumerate(digests) if hashlib.sha256(views[k]).digest() != digest]

    def _begins_right(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(len(self.header)) == self.header

    def write(self, k: int, logits: Iterator[Tensor]) -> None:
        """Write a view, then its checksum. Raises OSError with the file's name, BadInput where a logit is too large."""
        digest = hashlib.sha256()
        with self._naming(), self.path.open("r+b") as file:
            file.seek(self.at(k))
            for part in logits:
                if self.dtype == "<f2" and not bool(part.half().isfinite().all()):
                    raise BadInput("distill.half: float16 does not hold the teacher's logits: remove it")
                content = part.numpy().astype(self.dtype).tobytes()
                digest.update(content)
                file.write(content)
            file.seek(self.at(self.shape[0]) + k * DIGEST)
            file.write(digest.digest())

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """An OSError names the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
