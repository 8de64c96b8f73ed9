"""Datasets: images as bytes, their labels, the classes' names; a batch is an index into them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import BadKeys, counted
from kdcli.config import Data
from kdcli.data.sources import listed, of_key, read, read_unlabelled, stratified
from kdcli.runs.spec import Facts, Spec


@dataclass(frozen=True)
class Split:
    """Samples: their images, bytes from 0 to `white` or the floats of a table, and their labels [N], int64, -1 of what
    nobody labelled."""

    store: Tensor  # [M, C, H, W]; it may be a file that is mapped into memory, so it is never copied whole
    labels: Tensor
    white: int
    positions: Tensor | None = None  # of the samples in `store`; None: all, in order
    extra: Tensor | None = None  # [U, C, H, W], another store, whose images are numbered after those of `store`

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> "Split":
        """The samples at `index`, a tensor of positions."""
        positions = index if self.positions is None else self.positions[index]
        return replace(self, labels=self.labels[index], positions=positions)

    def followed_by(self, unlabelled: "Split") -> "Split":
        """These samples, then all of a store that nobody labelled."""
        positions, labels = self.positions, torch.cat([self.labels, unlabelled.labels])
        if positions is not None:
            positions = torch.cat([positions, len(self.store) + torch.arange(len(unlabelled))])
        return replace(self, labels=labels, positions=positions, extra=unlabelled.store)

    def to(self, device: torch.device) -> "Split":
        if self.store.device == device:
            return self
        if self.positions is None and self.extra is None:
            return replace(self, store=self.store.to(device), labels=self.labels.to(device))
        store = torch.empty(len(self), *self.store.shape[1:], dtype=self.store.dtype, device=device)
        indices = torch.arange(len(self), device=self.labels.device)
        for part, index in zip(store.split(1_000), indices.split(1_000), strict=True):
            part.copy_(self.images(index))
        return replace(self, store=store, labels=self.labels.to(device), positions=None, extra=None)

    def images(self, index: Tensor) -> Tensor:
        """Images [B, C, H, W] of the samples at `index` [B], as they are stored."""
        at = index if self.positions is None else self.positions[index]
        if self.extra is None:
            return self.store.index_select(0, at)
        found, own = self.store.new_empty(len(at), *self.store.shape[1:]), at < len(self.store)
        found[own] = self.store.index_select(0, at[own])
        found[~own] = self.extra.index_select(0, at[~own] - len(self.store))
        return found

    def inputs(self, index: Tensor) -> Tensor:
        """Float images [B, C, H, W] in [0, 1] of the samples at `index` [B]."""
        return self.scaled(self.images(index))

    def scaled(self, images: Tensor) -> Tensor:
        """Images as floats: bytes in [0, 1]."""
        return images.to(torch.float32).mul_(1 / self.white) if self.white > 1 else images


@dataclass(frozen=True, eq=False)
class Dataset:
    """`test`: what errors are counted on; `held`: how many images of `train` omit-classes chooses its bias on."""

    train: Split
    test: Split
    held: int
    facts: Facts
    notes: Sequence[str] = ()  # what the reader must know of the images
    unlabelled: Split | None = None  # what students see besides, with the labels of their teacher alone
    listings: Sequence[Path | None] = ()

    @property
    def on_heldout(self) -> bool:
        """Whether errors are counted on held-out training images."""
        return self.test.store is self.train.store

    def apart(self, rows: Tensor) -> dict[str, Tensor]:
        """Of rows of all training images those of `train` and, as `test`, those of the held-out ones (`on_heldout`)."""
        return {"train": rows[self.train.positions], "test": rows[self.test.positions]}

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """The files of the samples of `train`, `test` and `unlabelled`, relative to `data.folder` or `data.unlabelled`:
        `train/cat/1.jpg`. None of a source that is no folder."""
        found = listed(self.listings)
        if self.on_heldout:
            found["test"] = found["train"]
        for name, split in (("train", self.train), ("test", self.test)):
            if split.positions is not None and found[name]:
                found[name] = [found[name][i] for i in split.positions.tolist()]
        return found

    @cached_property
    def heldout(self) -> Tensor:
        """Positions in `train` of the held-out images. Raises BadInput when a class has too few."""
        return torch.from_numpy(stratified(self.train.labels.numpy(), self.held, self.facts.classes))

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
        return transfer[torch.from_numpy(stratified(labels[transfer].numpy(), count, self.facts.classes))]

    def seen(self, spec: Spec) -> Split:
        """What a net is trained on: its transfer set and, of a student, what nobody labelled."""
        transfer = self.transfer_set(spec.omitted, spec.data.transfer)
        labelled = self.train if len(transfer) == len(self.train) else self.train.at(transfer)
        return labelled.followed_by(self.unlabelled) if self.unlabelled and spec.dataset.unlabelled else labelled

    def numbers(self, classes: Sequence[str]) -> Tensor:
        """The positions of some classes in the order of the logits."""
        return torch.tensor([self.facts.classes.index(c) for c in classes], dtype=torch.int64)


def open_dataset(data: Data, data_dir: Path | None = None, download: bool = True) -> Dataset:
    """The dataset of an experiment's `data` section, whatever its transfer set. What torchvision knows is looked for in
    `data_dir`, else in $KD_DATA, else in data/, and downloaded there when absent, unless `download` is false. Raises
    BadInput when it cannot be had, is damaged, or is too small for the held-out images."""
    found, facts = read(data, data_dir, download)
    train, test = (
        Split(torch.from_numpy(x), torch.from_numpy(y), found.white)
        for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test))
    )
    given: dict[str, Any] = {"mean": data.mean, "std": data.std, "given": True} if data.mean else {}
    if data.mean and len(data.mean) not in (1, facts.shape[0]):
        numbers = "a number" if facts.shape[0] == 1 else f"1 number, or {facts.shape[0]}: one per channel"
        raise BadKeys(("data.mean", f"must have {numbers}, not {len(data.mean)}"))
    held = data.heldout or tenth(len(train), len(facts.classes))
    if held > len(train) // 3:
        raise BadKeys(("data.heldout", f"must be at most {len(train) // 3}, a third of the training images"))
    notes, unlabelled, listings, known = found.notes, None, [found.listing], set[int]()
    if data.unlabelled:
        extra = read_unlabelled(data, found, facts)
        known = extra.known
        given["unlabelled"], notes, listings = extra.fingerprint, [*notes, *extra.notes], [*listings, extra.listing]
        unlabelled = Split(torch.from_numpy(extra.x), torch.full((len(extra.x),), -1), found.white)
    whole = Dataset(train, test, held, facts.model_copy(update=given), notes, unlabelled, listings)
    if data.evaluate_on == "test":
        return whole
    with of_key("heldout"):
        at = whole.heldout
    others = (~torch.isin(torch.arange(len(train)), at)).nonzero()[:, 0]
    if twice := {*at.tolist()} & known:
        notes = [*notes, f"Among the unlabelled images too, pixel for pixel: {counted(len(twice), 'held-out image')}."]
    return replace(whole, train=train.at(others), test=train.at(at), notes=notes)


def tenth(images: int, classes: int) -> int:
    """How many of so many training images are held out unless an experiment says so: a tenth, one a class or more."""
    return min(max(images // 10, classes), images // 3)
