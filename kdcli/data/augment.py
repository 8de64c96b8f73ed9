"""Views: a batch of bytes as a net sees it in training, each sample with draws of its own, on the device."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli.config import COUNTLESS, Train
from kdcli.data.dataset import Split
from kdcli.machine.device import generator, stream

PLACES = 4  # along each side, by which elastic bends an image
SHARED = -1  # a seed that no run has
ALL = slice(None)
OTHER = "partner's "


def different_views(train: Train) -> float:
    """How many views of an image there are: of shifts and flips so many; of the others countless, inf."""
    return math.inf if any(getattr(train, key) for key in COUNTLESS) else (2 * train.jitter + 1) ** 2 * (1 + train.flip)


@dataclass(frozen=True)
class Fixed:
    """Views of `size` images that are the same in every run: a teacher is asked about them once. `transfer`: positions
    among these images of the transfer set; `most`: how many views of each image are asked for.

    Of shifts and flips no two views of an image are the same, and those of up to 2 pixels have 25 views: with all of
    them training is exact, since an epoch draws each with the probability that it has where it is drawn anew. With
    mixup the `size` images must be the transfer set: each is blended with another of them.
    """

    train: Train
    most: int
    size: int
    transfer: Tensor

    @property
    def count(self) -> int:
        """How many views are kept: `most`, but no more than there are."""
        return int(min(self.most, different_views(self.train)))

    def draw(self, k: int) -> dict[str, Tensor]:
        """View k of every image: its draws, [size, ...] each; with mixup also the `partner` that it is blended with,
        and the draws of that, `partner's ...`."""
        train = self.train
        if different_views(train) == math.inf:
            drawn = _draws(train, self.size, SHARED, k)
            if train.mixup:
                order = torch.randperm(self.size, generator=generator(SHARED, "partner", k))
                partner = torch.empty_like(order).index_copy_(0, order, order.roll(-1))
                drawn |= {OTHER + name: draws[partner] for name, draws in drawn.items() if name != "mixup"}
                drawn["partner"] = partner
            return drawn
        there = int(different_views(train))
        order = torch.randperm(there, generator=generator(SHARED, "order"))
        first = torch.randint(there, (self.size,), generator=generator(SHARED, "first"))
        which, side = order[(first + k) % there], 2 * train.jitter + 1
        found = {"jitter": torch.stack([which // side % side, which % side], 1), "flip": which[:, None] // side**2}
        return {name: draws for name, draws in found.items() if getattr(train, name)}

    def choose(self, seed: int, epoch: int, order: Tensor) -> dict[str, Tensor]:
        """The draws of an epoch, a view a sample; and, as `kept`, which row of [count * size] that view is."""
        chosen = torch.randint(self.count, (len(order),), generator=generator(seed, "view", epoch))
        positions = self.transfer[order]
        drawn = {"kept": chosen * self.size + positions}
        for k in range(self.count):  # those of all views together may be too many to hold
            at = (chosen == k).nonzero()[:, 0]
            for name, draws in self.draw(k).items():
                drawn.setdefault(name, draws.new_empty(len(order), *draws.shape[1:]))[at] = draws[positions[at]]
        return drawn


@dataclass(frozen=True)
class Views:
    """What a `train` section does to the images of an epoch. What is drawn depends on (seed, epoch) alone and has a row
    a sample, in the order of the epoch, so that a resumed training repeats it. `fixed`: the views to choose from."""

    images: Split
    train: Train
    seed: int
    fixed: Fixed | None = None

    def order(self, epoch: int) -> Tensor:
        """The samples in the order of an epoch."""
        return torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch))

    def draw(self, epoch: int) -> dict[str, Tensor]:
        """The draws of an epoch, [N] or [N, k] each, on the device of the images; of fixed views with their rows among
        the logits that were kept of them, `kept`, on the CPU."""
        if self.fixed:
            drawn = self.fixed.choose(self.seed, epoch, self.order(epoch))
        else:
            drawn = _draws(self.train, len(self.images), self.seed, epoch)
        device = self.images.labels.device
        return {name: draws if name == "kept" else draws.to(device) for name, draws in drawn.items()}

    def view(self, index: Tensor, drawn: dict[str, Tensor], own: slice = ALL) -> Tensor:
        """Float images [B, C, H, W] in [0, 1] of the samples at `index` [B], as the draws of each say; or of its `own`
        rows alone."""
        if "mixup" not in drawn or "partner" in drawn:  # else neighbours are blended
            index, drawn, own = index[own], {name: draws[own] for name, draws in drawn.items()}, ALL
        if "partner" not in drawn:
            x, other = self._alone(index, drawn), None
        else:  # in one pass, which takes a third less time than two
            pairs = {name: torch.cat([drawn[name], drawn[OTHER + name]]) for name in drawn if OTHER + name in drawn}
            x, other = self._alone(torch.cat([index, drawn["partner"]]), pairs).chunk(2)
        if "mixup" in drawn:
            x = blend(x, drawn["mixup"], other)
        return x[own]

    def _alone(self, index: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """The images before any are blended."""
        x = self.images.images(index)
        if "jitter" in drawn:
            x = shift(x, drawn["jitter"], self.train.jitter)
        if "flip" in drawn:
            x = torch.where(drawn["flip"][:, :, None, None] < 0.5, x.flip(3), x)
        x = self.images.scaled(x)
        if "crop" in drawn:
            x = crop(x, drawn["crop"], self.train.crop or 1)
        if "elastic" in drawn:
            x = bend(x, drawn["elastic"], self.train.elastic or 0)
        if "cutout" in drawn:
            x = cut_out(x, drawn["cutout"], self.train.cutout or 0)
        return x


def _draws(train: Train, n: int, seed: int, epoch: int) -> dict[str, Tensor]:
    """What is drawn for n samples: one thing changes no other."""
    drawn: dict[str, Tensor] = {}
    if train.jitter:
        source = generator(seed, "jitter", epoch)
        drawn["jitter"] = torch.randint(2 * train.jitter + 1, (2, n), generator=source).T
    for name, k in (("flip", 1), ("crop", 4), ("elastic", 2 * PLACES**2), ("cutout", 2)):
        if getattr(train, name):
            drawn[name] = torch.rand(n, k, generator=generator(seed, name, epoch))
    if train.mixup:
        drawn["mixup"] = (_kept_shares if seed == SHARED else _shares)(train.mixup, n, seed, epoch)
    return drawn


def _shares(alpha: float, n: int, seed: int, epoch: int) -> Tensor:
    shares = np.random.default_rng(stream(seed, "mixup", epoch)).beta(alpha, alpha, n)
    return torch.from_numpy(shares.astype(np.float32))


_kept_shares = lru_cache(64)(_shares)  # every epoch asks for them again, and they take half the time of all draws


def shift(x: Tensor, shifts: Tensor, most: int) -> Tensor:
    """Images [B, C, H, W] moved by `shifts` [B, 2], down and right, counted from 0 to 2 `most`; the border is zero.
    Read through a view of the padded batch: with RandomAffine a step takes 2.2 x as long (make bench)."""
    height, width = x.shape[2:]
    views = F.pad(x, (most,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2 most + 1, 2 most + 1, H, W]
    return views[torch.arange(len(x), device=x.device), :, shifts[:, 0], shifts[:, 1]]


def crop(x: Tensor, u: Tensor, least: float) -> Tensor:
    """A part of each image [B, C, H, W] in its place and size: of an area from `least` to 1, an aspect ratio from 3/4
    to 4/3 (Szegedy et al., arXiv:1409.4842), which is cut where it would be wider or higher than the image, and a place
    that `u` [B, 4] in [0, 1) chooses."""
    area, ratio = least + (1 - least) * u[:, 0], torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    right, down = (2 * u[:, 2] - 1) * (1 - width), (2 * u[:, 3] - 1) * (1 - height)
    zero = torch.zeros_like(area)
    theta = torch.stack([width, zero, right, zero, height, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def bend(x: Tensor, u: Tensor, most: float) -> Tensor:
    """Images [B, C, H, W] seen through a bent glass: 4 x 4 places from border to border show what lies up to `most`
    pixels to the side and above or below, as `u` [B, 32] in [0, 1) chooses, and those between them what bicubic
    interpolation makes of that (Ronneberger et al., arXiv:1505.04597, section 3.1: 3 x 3 places, Gaussian)."""
    height, width = x.shape[2:]
    one = torch.eye(PLACES**2, device=x.device).view(-1, 1, PLACES, PLACES)
    parts = F.interpolate(one, (height, width), mode="bicubic", align_corners=True).flatten(1)  # of each place
    pixel = torch.diag(torch.tensor([2 / width, 2 / height], device=x.device))  # in each direction of the grid
    between = (parts[None, ..., None] * pixel[:, None, None]).view(2 * PLACES**2, -1)
    still = F.affine_grid(torch.eye(2, 3, device=x.device)[None], [1, 1, height, width], align_corners=False)
    # what lies between is linear in the places: one product, where to interpolate each field takes four times as long
    grid = torch.addmm(still.view(1, -1), most * (2 * u - 1), between)
    return F.grid_sample(x, grid.view(-1, height, width, 2), padding_mode="border", align_corners=False)


def cut_out(x: Tensor, u: Tensor, side: int) -> Tensor:
    """Images [B, C, H, W] with a square of `side` pixels around a place that `u` [B, 2] in [0, 1) chooses, clipped at
    the border, in the image's mean colour (DeVries and Taylor, arXiv:1708.04552)."""
    (n, channels), (height, width) = x.shape[:2], x.shape[2:]
    square = torch.arange(side, device=x.device) - side // 2
    down, right = ((u[:, i : i + 1] * size).long() + square for i, size in ((0, height), (1, width)))
    at = down.clamp(0, height - 1)[:, :, None] * width + right.clamp(0, width - 1)[:, None]  # [B, side, side]
    pixels = x.flatten(2)
    colour = pixels.mean(2, keepdim=True).expand(-1, -1, side**2)
    # only the square is written: to choose each pixel by a mask takes four times as long
    return pixels.scatter(2, at.view(n, 1, -1).expand(-1, channels, -1), colour).view_as(x)


def blend(x: Tensor, share: Tensor, other: Tensor | None = None) -> Tensor:
    """Each of B samples [B, ...] blended with its `other` [B, ...], or with the next of the batch, `share` [B] of
    itself: images, and in the same way the rows of their labels (mixup: Zhang et al., arXiv:1710.09412)."""
    share = share.view(-1, *[1] * (x.dim() - 1))
    return share * x + (1 - share) * (x.roll(-1, 0) if other is None else other)
