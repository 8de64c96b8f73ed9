"""Datasets: images as bytes, their labels, the classes' names; a batch is an index into them."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, BadKeys, code
from kdcli.config import Data
from kdcli.runs import Facts

MNIST = "12176aed4628b392"  # the beginning of its fingerprint
MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W], uint8 from 0 to `white`, and their labels [N], int64."""

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

    def inputs(self, index: Tensor | None = None) -> Tensor:
        """Float images [B, C, H, W] in [0, 1] of the samples at `index` [B], or of all."""
        return self._scaled(self.images if index is None else self.images.index_select(0, index))

    def padded(self, jitter: int) -> Tensor:
        """The images at all shifts by up to `jitter` pixels each way, the border filled with zeros: a view
        [N, 2 jitter + 1, 2 jitter + 1, C, H, W] of the padded images."""
        height, width = self.images.shape[2:]
        return F.pad(self.images, (jitter,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)

    def shifted(self, padded: Tensor, index: Tensor, shift: Tensor) -> Tensor:
        """Float images [B, C, H, W] of the samples at `index` [B]; `shift` [2, B], down and right, counts from 0 to
        2 jitter. Read through the view of `padded`: RandomAffine takes 2.5 x a step (make bench)."""
        return self._scaled(padded[index, shift[0], shift[1]])

    def _scaled(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mul_(1 / self.white)


@dataclass(frozen=True)
class Dataset:
    """train: what is trained on. test: what errors are counted on. `held`: how many images omit-classes keeps out of
    the transfer set to choose its bias on."""

    train: Split
    test: Split
    held: int
    facts: Facts

    @cached_property
    def heldout(self) -> Tensor:
        """Positions in `train` of the held-out images. Raises BadInput when a class has too few."""
        return stratified(self.train.labels, self.held, self.facts.classes)

    def transfer_set(self, omitted: Sequence[str], count: int | None) -> Tensor:
        """Positions in `train` of what a student sees: without the `omitted` classes and, where some are, without the
        held-out images; `count` of them, if it is given. Raises BadInput when a class has too few."""
        labels = self.train.labels
        absent = torch.isin(labels, self.numbers(omitted))
        if omitted:
            absent[self.heldout] = True
        transfer = (~absent).nonzero()[:, 0]
        if count is None or count >= len(transfer):
            return transfer
        return transfer[stratified(labels[transfer], count, self.facts.classes)]

    def numbers(self, classes: Sequence[str]) -> Tensor:
        """The positions of some classes in the order of the logits."""
        return torch.tensor([self.facts.classes.index(c) for c in classes], dtype=torch.int64)

    def to(self, device: torch.device) -> "Dataset":
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def open_dataset(data: Data, data_dir: Path | None = None, download: bool = True) -> Dataset:
    """The dataset of an experiment's `data` section, whatever its transfer set.

    MNIST is looked for in `data_dir`, else in $KD_DATA, else in data/, and downloaded there when absent, unless
    `download` is false. Raises BadInput when it cannot be had, is damaged, or is too small for the held-out images.
    """
    content = code.digest(data.function) if data.function else None
    train, test, facts = _read(data.name, data.function, content, data_dir, download)
    held = data.heldout or min(max(len(train) // 10, len(facts.classes)), len(train) // 3)
    if held > len(train) // 3:
        raise BadKeys(("data.heldout", f"must be at most {len(train) // 3}, a third of the training images"))
    whole = Dataset(train, test, held, facts)
    if data.evaluate_on == "test":
        return whole
    return replace(whole, train=_without(train, whole.heldout), test=train.at(whole.heldout))


@lru_cache(maxsize=2)
def _read(
    name: str | None, function: str | None, content: str | None, data_dir: Path | None, download: bool
) -> tuple[Split, Split, Facts]:
    """The training and test images of a source, and what they are; read anew when the `content` of its file changes."""
    folder, classes = data_dir or Path(os.environ.get("KD_DATA") or "data"), [str(c) for c in range(10)]
    if function:
        train, test, classes = _from_function(function)
    else:
        train, test = _digits() if name == "digits" else _mnist(folder, download)
    header = json.dumps([classes, list(train.images.shape), list(test.images.shape), train.white])
    found = hashlib.sha256(header.encode())
    for tensor in (train.images, train.labels, test.images, test.labels):
        found.update(tensor.numpy().data)
    if name == "mnist" and not found.hexdigest().startswith(MNIST):
        raise BadInput(
            f"{folder / 'MNIST' / 'raw'}: these IDX files are not MNIST's, which `name: mnist` means: "
            "name the folder of MNIST with --data-dir or KD_DATA, or put its four files elsewhere"
        )
    shape = list(train.images.shape[1:])
    return train, test, Facts(fingerprint=found.hexdigest(), classes=classes, shape=shape, white=train.white)


def _without(split: Split, index: Tensor) -> Split:
    return split.at(torch.ones(len(split), dtype=torch.bool).index_fill(0, index, False))


def stratified(labels: Tensor, count: int, classes: Sequence[str]) -> Tensor:
    """Positions, ascending, of `count` samples with the classes in their shares; always the same ones. Raises BadInput
    when a class would be left without one on either side."""
    counts = torch.bincount(labels, minlength=len(classes))
    present, of = counts[counts > 0], f"{count} of {len(labels)} images"
    if int(present.min()) < 2:
        small = classes[counts.tolist().index(1)]
        raise BadInput(f"class {small} has one image: to draw a share of every class takes two of each")
    if not len(present) <= count <= len(labels) - len(present):
        raise BadInput(f"{of}: must leave one of each of {len(present)} classes, on either side")
    from sklearn.model_selection import train_test_split

    _, positions = train_test_split(np.arange(len(labels)), test_size=count, stratify=labels.numpy(), random_state=0)
    chosen = torch.from_numpy(np.sort(positions))
    share = torch.bincount(labels[chosen], minlength=len(classes))
    if missing := ((counts > 0) & ((share == 0) | (share == counts))).nonzero()[:, 0].tolist():
        raise BadInput(f"{of}: class {classes[missing[0]]} is too small to have a share on either side")
    return chosen


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 real digits of 8 x 8 pixels, in a fixed stratified split of 1,297 and 500."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images.astype(np.uint8))[:, None], torch.from_numpy(bunch.target).long()
    all_ = Split(images, labels, white=16)
    test = stratified(labels, 500, bunch.target_names)
    return _without(all_, test), all_.at(test)


def _mnist(folder: Path, download: bool) -> tuple[Split, Split]:
    from torchvision.datasets import mnist

    raw, tensors = folder / "MNIST" / "raw", []
    files = [raw / f"{name}-ubyte" for name in MNIST_FILES]
    if not all(file.is_file() for file in files):
        _download_mnist(folder, raw, download)
    for file in files:
        try:
            read = mnist.read_image_file if "images" in file.name else mnist.read_label_file
            tensors.append(read(str(file)))
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error.strerror or error}") from None
        except Exception:  # torchvision asserts, or lets through what numpy raises
            raise BadInput(f"{file}: is damaged or no IDX file: delete it to have it downloaded again") from None
    train, test = (Split(images[:, None], labels, 255) for images, labels in (tensors[:2], tensors[2:]))
    for split in (train, test):
        if len(split.images) != len(split) or split.images.shape[1:] != train.images.shape[1:]:
            what = f"{len(split.images)} images, {len(split)} labels"
            raise BadInput(f"{raw}: its files do not belong together: {what}")
    return train, test


def _download_mnist(folder: Path, raw: Path, download: bool) -> None:
    """Fetch MNIST with torchvision, which verifies what it downloads."""
    instead = f"put its four files in {raw}, name their folder with --data-dir or KD_DATA"
    instead += ", or run the digits experiment, which needs no download"
    if not download:
        raise BadInput(f"{folder}: MNIST is not there, and --dry-run downloads nothing: {instead}")
    from torchvision.datasets import MNIST

    try:
        with code.quiet():
            MNIST(str(folder), download=True)
    except Exception as error:  # torchvision lets through whatever the network, the disk or gzip raised
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{folder}: MNIST is not there and could not be downloaded ({reason}): {instead}") from None


def _from_function(reference: str) -> tuple[Split, Split, list[str]]:
    """What somebody's own function returns: a mapping of x_train, y_train, x_test, y_test and, if the classes have
    names, classes. Raises BadInput that names the array that is wrong."""
    found = code.call(reference)
    keys = ("x_train", "y_train", "x_test", "y_test")
    if not isinstance(found, Mapping) or not set(keys) <= found.keys():
        raise BadInput(f"{reference}: must return a dictionary of {', '.join(keys)} and, if they have names, classes")
    train, test = (_split(reference, part, found[f"x_{part}"], found[f"y_{part}"]) for part in ("train", "test"))
    names = found.get("classes")
    if names is None:
        names = range(int(train.labels.max()) + 1)
    elif isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        raise BadInput(f"{reference}: classes must be a list of names, not {type(names).__name__}")
    classes = [str(c) for c in names]
    if twice := [c for c in classes if classes.count(c) > 1]:
        raise BadInput(f"{reference}: classes names {twice[0]} twice")
    if len(classes) < 2 or train.labels.unique().tolist() != list(range(len(classes))):
        raise BadInput(f"{reference}: y_train must hold every one of two or more classes, 0 to {len(classes) - 1}")
    if int(test.labels.max()) >= len(classes) or test.images.shape[1:] != train.images.shape[1:]:
        raise BadInput(f"{reference}: x_test and y_test must have the classes and the image size of training")
    return train, test, classes


def _split(reference: str, part: str, x: Any, y: Any) -> Split:
    try:
        images, labels = np.asarray(x), np.asarray(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{reference}: x_{part}, y_{part}: cannot be read as arrays: {error}") from None
    is_x, is_y = (f"{array.dtype} {list(array.shape)}" for array in (images, labels))
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise BadInput(f"{reference}: x_{part} must be bytes (uint8) [N, C, H, W] or [N, H, W], not {is_x}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise BadInput(f"{reference}: y_{part} must be whole numbers from 0, [{len(images)}], not {is_y}")
    whole = np.ascontiguousarray(images if images.ndim == 4 else images[:, None])
    return Split(torch.from_numpy(whole), torch.from_numpy(labels.astype(np.int64)), 255)
