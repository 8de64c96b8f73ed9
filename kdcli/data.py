"""Datasets: images as bytes, their labels, the classes' names; a batch is an index into them."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, BadKeys, code, failure
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
        images = self.images if index is None else self.images.index_select(0, index)
        return images.to(torch.float32).mul_(1 / self.white)

    def padded(self, jitter: int) -> Tensor:
        """The images at all shifts by up to `jitter` pixels each way, the border filled with zeros: a view
        [N, 2 jitter + 1, 2 jitter + 1, C, H, W] of the padded images."""
        height, width = self.images.shape[2:]
        return F.pad(self.images, (jitter,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)

    def shifted(self, padded: Tensor, index: Tensor, shift: Tensor) -> Tensor:
        """Float images [B, C, H, W] of the samples at `index` [B]; `shift` [2, B], down and right, counts from 0 to
        2 jitter. Read through the view of `padded`: with RandomAffine a step takes 2.2 x as long (make bench)."""
        return padded[index, shift[0], shift[1]].to(torch.float32).mul_(1 / self.white)


@dataclass(frozen=True)
class Dataset:
    """`test`: what errors are counted on; `held`: how many images of `train` omit-classes chooses its bias on."""

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
    """The dataset of an experiment's `data` section, whatever its transfer set. MNIST is looked for in `data_dir`, else
    in $KD_DATA, else in data/, and downloaded there when absent, unless `download` is false. Raises BadInput when it
    cannot be had, is damaged, or is too small for the held-out images."""
    content = code.digest(data.function) if data.function else ""
    train, test, facts = _read(data.function or f"{data.name}", content, data_dir, download)
    held = data.heldout or min(max(len(train) // 10, len(facts.classes)), len(train) // 3)
    if held > len(train) // 3:
        raise BadKeys(("data.heldout", f"must be at most {len(train) // 3}, a third of the training images"))
    whole = Dataset(train, test, held, facts)
    if data.evaluate_on == "test":
        return whole
    return replace(whole, train=_without(train, whole.heldout), test=train.at(whole.heldout))


@lru_cache(maxsize=2)
def _read(source: str, content: str, data_dir: Path | None, download: bool) -> tuple[Split, Split, Facts]:
    """The training and test images of a name or a function, whose file has this content, and what they are."""
    raw = Path(data_dir or os.environ.get("KD_DATA") or "data", "MNIST", "raw")
    if content:
        train, test, classes = _from_function(source)
    else:
        train, test = _digits() if source == "digits" else _mnist(raw, download)
        classes = [str(c) for c in range(10)]
    shape, white = train.images.shape, train.white
    digest = hashlib.sha256(json.dumps([classes, shape, test.images.shape, white]).encode())
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(tensor.numpy().data)
    if source == "mnist" and not digest.hexdigest().startswith(MNIST):
        instead = "name the folder of MNIST with --data-dir or KD_DATA, or put its four files elsewhere"
        raise BadInput(f"{raw}: these IDX files are not MNIST's, which `name: mnist` means: {instead}")
    return train, test, Facts(fingerprint=digest.hexdigest(), classes=classes, shape=list(shape[1:]), white=white)


def _without(split: Split, index: Tensor) -> Split:
    return split.at(torch.ones(len(split), dtype=torch.bool).index_fill(0, index, False))


def stratified(labels: Tensor, count: int, classes: Sequence[str]) -> Tensor:
    """Positions, ascending, of `count` samples with the classes in their shares; always the same ones. Raises BadInput
    when a class would be left without one on either side."""
    counts = torch.bincount(labels, minlength=len(classes))
    present, of = counts[counts > 0], f"{count} of {len(labels)} images"
    if alone := [name for name, n in zip(classes, counts.tolist(), strict=True) if n == 1]:
        raise BadInput(f"class {alone[0]} has one image: to draw a share of every class takes two of each")
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


def _mnist(raw: Path, download: bool) -> tuple[Split, Split]:
    from torchvision.datasets import mnist

    files, tensors = [raw / f"{name}-ubyte" for name in MNIST_FILES], []
    if not all(file.is_file() for file in files):
        _download_mnist(raw, download)
    for file, read in zip(files, [mnist.read_image_file, mnist.read_label_file] * 2, strict=True):
        try:
            tensors.append(read(str(file)))
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error.strerror or error}") from None
        except Exception:  # torchvision asserts, or lets through what numpy raises
            raise BadInput(f"{file}: is damaged or no IDX file: delete it to have it downloaded again") from None
    train, test = (Split(images[:, None], labels, 255) for images, labels in (tensors[:2], tensors[2:]))
    for split in (train, test):
        if len(split.images) != len(split) or split.images.shape[1:] != train.images.shape[1:]:
            raise BadInput(f"{raw}: its files do not belong together: {len(split.images)} images, {len(split)} labels")
    return train, test


def _download_mnist(raw: Path, download: bool) -> None:
    from torchvision.datasets import MNIST

    absent = f"{raw.parents[1]}: MNIST is not there"
    instead = f"put its four files in {raw}, name their folder with --data-dir or KD_DATA, or run the "
    instead += "digits experiment, which needs no download"
    if not download:
        raise BadInput(f"{absent}, and --dry-run downloads nothing: {instead}")
    try:
        with code.quiet():
            MNIST(str(raw.parents[1]), download=True)  # which verifies what it downloads
    except Exception as error:  # torchvision lets through whatever the network, the disk or gzip raised
        raise BadInput(f"{absent} and could not be downloaded ({failure(error)[:200]}): {instead}") from None


def _from_function(reference: str) -> tuple[Split, Split, list[str]]:
    """What somebody's own function returns. Raises BadInput that names the array that is wrong."""
    found = code.call(reference)
    keys = ("x_train", "y_train", "x_test", "y_test")
    if not isinstance(found, Mapping) or not set(keys) <= found.keys():
        raise BadInput(f"{reference}: must return a dictionary of {', '.join(keys)} and, if they have names, classes")
    train, test, names = _split(reference, found, "train"), _split(reference, found, "test"), found.get("classes")
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence | np.ndarray)):
        raise BadInput(f"{reference}: classes must be a list of names, not {type(names).__name__}")
    classes = [str(c) for c in (range(int(train.labels.max()) + 1) if names is None else names)]
    if twice := [c for c in classes if classes.count(c) > 1]:
        raise BadInput(f"{reference}: classes names {twice[0]} twice")
    if len(classes) < 2 or train.labels.unique().tolist() != list(range(len(classes))):
        raise BadInput(f"{reference}: y_train must hold every one of two or more classes, 0 to {len(classes) - 1}")
    if int(test.labels.max()) >= len(classes) or test.images.shape[1:] != train.images.shape[1:]:
        raise BadInput(f"{reference}: x_test and y_test must have the classes and the image size of training")
    return train, test, classes


def _split(reference: str, found: Mapping[str, Any], part: str) -> Split:
    with code.blaming(reference.rpartition(":")[0], f"{reference}: x_{part}, y_{part}: cannot be read as arrays"):
        images, labels = (np.asarray(found[f"{axis}_{part}"]) for axis in "xy")
    is_x, is_y = (f"{array.dtype} {list(array.shape)}" for array in (images, labels))
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise BadInput(f"{reference}: x_{part} must be bytes (uint8) [N, C, H, W] or [N, H, W], not {is_x}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise BadInput(f"{reference}: y_{part} must be whole numbers from 0, [{len(images)}], not {is_y}")
    whole = np.ascontiguousarray(images if images.ndim == 4 else images[:, None])
    return Split(torch.from_numpy(whole), torch.from_numpy(labels.astype(np.int64)), 255)
