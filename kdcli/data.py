"""Datasets as uint8 tensors: read once, memory-mapped where they are large; a batch is an index into them."""

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput
from kdcli.config import DATASETS, Data

MNIST_FILES = {  # file: md5 of its uncompressed content
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True)
class Split:
    """Images [N, side, side], uint8 from 0 to `white`, and their labels [N], int64."""

    images: Tensor
    labels: Tensor
    white: int

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> "Split":
        """The samples at `index`, a tensor of positions."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device) -> "Split":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def inputs(self, index: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Float inputs [..., side * side] in [0, 1] of the samples at `index` [...], or of all; `shift` is unused."""
        rows = self.images.flatten(1)
        if index is not None:
            rows = rows.index_select(0, index.flatten()).view(*index.shape, -1)
        return _scaled(rows, self.white)


class Jittered:
    """Images that can be read shifted by up to `jitter` pixels each way, the border filled with background."""

    def __init__(self, split: Split, jitter: int) -> None:
        side = split.images.shape[-1]
        padded = F.pad(split.images, (jitter,) * 4)
        self.shifted = padded.unfold(1, side, 1).unfold(2, side, 1)  # a view: [N, 2j + 1, 2j + 1, side, side]
        self.white = split.white

    def inputs(self, index: Tensor, shift: Tensor) -> Tensor:
        """Float inputs [..., side * side] of the samples at `index` [...]; `shift` [2, ...] counts from 0 to
        2 * jitter."""
        return _scaled(self.shifted[index, shift[0], shift[1]].flatten(-2), self.white)


def _scaled(rows: Tensor, white: int) -> Tensor:
    return rows.to(torch.float32).mul_(1 / white)


@dataclass(frozen=True)
class Dataset:
    """train: what is trained on. test: what errors are counted on."""

    train: Split
    test: Split
    held: int

    @cached_property
    def heldout(self) -> Tensor:
        """Positions in `train` of the `held` images that omit-classes keeps out of the transfer set to choose its bias
        on."""
        return stratified(self.train.labels, self.held)

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.train.to(device), self.test.to(device), self.held)


def load(data: Data, data_dir: Path | None = None) -> Dataset:
    """The dataset of an experiment's `data` section.

    MNIST is looked for in `data_dir`, else in $KD_DATA, else in data/, and downloaded there when absent.
    Raises BadInput when it cannot be had or a file is damaged.
    """
    train, test = _digits() if data.name == "digits" else _mnist(data_dir or Path(os.environ.get("KD_DATA") or "data"))
    if data.evaluate_on == "heldout":
        train, test = _without(train, heldout := stratified(train.labels, data.heldout)), train.at(heldout)
    return Dataset(train, test, data.heldout)


def _without(split: Split, index: Tensor) -> Split:
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[index] = False
    return split.at(rest.nonzero()[:, 0])


def stratified(labels: Tensor, count: int) -> Tensor:
    """Positions, ascending, of `count` samples with the classes in their shares; always the same ones."""
    from sklearn.model_selection import train_test_split

    y = labels.cpu().numpy()
    _, chosen = train_test_split(np.arange(len(y)), test_size=count, stratify=y, random_state=0)
    return torch.from_numpy(np.sort(chosen)).to(labels.device)


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 real digits of 8 x 8 pixels, in a fixed stratified split of 1,297 and 500."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    facts = DATASETS["digits"]
    all_ = Split(torch.from_numpy(bunch.images.astype(np.uint8)), torch.from_numpy(bunch.target).long(), facts.white)
    test = stratified(all_.labels, facts.test)
    return _without(all_, test), all_.at(test)


def _mnist(folder: Path) -> tuple[Split, Split]:
    raw = folder / "MNIST" / "raw"
    if not all((raw / name).is_file() for name in MNIST_FILES):
        _download_mnist(folder)
    facts = DATASETS["mnist"]
    arrays = [torch.from_numpy(read_idx(raw / name, md5)) for name, md5 in MNIST_FILES.items()]
    train_images, train_labels, test_images, test_labels = arrays
    return (
        Split(train_images, train_labels.long(), facts.white),
        Split(test_images, test_labels.long(), facts.white),
    )


def _download_mnist(folder: Path) -> None:
    """Fetch MNIST with torchvision, which verifies what it downloads."""
    try:
        from torchvision.datasets import MNIST

        with contextlib.redirect_stdout(sys.stderr):
            MNIST(str(folder), download=True)
    except Exception as error:  # torchvision lets through whatever the network, the disk or gzip raised
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"{folder}: MNIST is not there and could not be downloaded ({reason}): put its four files in "
            f"{folder / 'MNIST' / 'raw'}, name their folder with --data-dir or KD_DATA, or run the digits experiment, "
            "which needs no download"
        ) from None


def read_idx(path: Path, md5: str | None = None) -> np.ndarray:
    """The uint8 array in an IDX file, memory-mapped copy-on-write. Raises BadInput when the file is not one, its size
    is not the one that its header promises, or its content has another `md5`."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            dims = magic[3] if len(magic) == 4 and magic[:3] == b"\0\0\x08" else 0
            header = file.read(4 * dims)
            if not 1 <= dims <= 3 or len(header) < 4 * dims:
                raise BadInput(f"{path}: is not an IDX file of bytes: delete it to have it downloaded again")
            shape = tuple(int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(dims))
            offset, size = 4 + 4 * dims, path.stat().st_size
            promised = offset + int(np.prod(shape, dtype=object))
            if size != promised or size == offset:
                what = "truncated" if size < promised else "damaged"
                raise BadInput(
                    f"{path}: is {what}: {size:,} bytes where its header promises {promised:,}; "
                    "delete it to have it downloaded again"
                )
            file.seek(0)
            if md5 and hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != md5:
                raise BadInput(
                    f"{path}: its content is not MNIST's (md5 differs): delete it to have it downloaded again"
                )
        return np.memmap(path, np.uint8, "c", offset, shape)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
