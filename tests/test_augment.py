"""Views of a batch: against worked examples, numpy, and torchvision's own transforms."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as reference

from kdcli.config import Train
from kdcli.data import augment
from kdcli.data.augment import Views
from kdcli.data.dataset import Split
from kdcli.machine import device


def train(**more: object) -> Train:
    return Train.model_validate({"epochs": 3, "lr": 0.1, "batch_size": 4, **more})


def split(n: int = 9, c: int = 3, h: int = 6, w: int = 5) -> Split:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, c, h, w), np.uint8))
    return Split(images, torch.arange(n) % 2, white=255)


def test_jitter_shifts_and_fills_with_background() -> None:
    """A 3 x 3 image moved by hand: shift (2, 1) of jitter 1 shows it from one row down, its last row falling in."""
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)

    def shifted(dy: int, dx: int) -> list[float]:
        return augment.shift(image, torch.tensor([[dy, dx]]), 1).flatten().tolist()

    assert shifted(1, 1) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert shifted(2, 1) == [4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert shifted(1, 0) == [0, 1, 2, 0, 4, 5, 0, 7, 8]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(3, 7), st.integers(3, 7), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_colour_images_of_any_shape_shift_as_wholes(jitter: int, c: int, h: int, w: int, seed: int) -> None:
    """Against numpy, which moves each image by itself."""
    draws = np.random.default_rng(seed)
    images, shifts = draws.integers(0, 256, (8, c, h, w), np.uint8), draws.integers(0, 2 * jitter + 1, (8, 2))
    found = augment.shift(torch.from_numpy(images), torch.from_numpy(shifts), jitter)
    wide = np.pad(images, [(0, 0), (0, 0), (jitter, jitter), (jitter, jitter)])
    wanted = [wide[i, :, dy : dy + h, dx : dx + w] for i, (dy, dx) in enumerate(shifts)]
    np.testing.assert_array_equal(found, np.stack(wanted))


@pytest.mark.parametrize("jitter", [1, 2])
def test_all_shifts_are_equally_likely(jitter: int) -> None:
    """Chi-square on the shifts that are drawn: the extreme ones get their full share."""
    from scipy.stats import chisquare

    views = Views(Split(torch.zeros(1), torch.zeros(60_000), 255), train(jitter=jitter), 0)
    side, shifts = 2 * jitter + 1, views.draw(0)["jitter"]
    counts = torch.bincount(shifts[:, 0] * side + shifts[:, 1], minlength=side**2)
    assert len(counts) == side**2
    assert chisquare(counts.numpy()).pvalue > 0.001


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    images = split(400)
    views = Views(images, train(flip=True), 0)
    plain, seen = images.inputs(torch.arange(400)), views.view(torch.arange(400), views.draw(0))
    same, mirrored = ((seen == x).flatten(1).all(1) for x in (plain, plain.flip(3)))
    assert (same ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240


def test_a_crop_is_torchvisions_resized_crop_of_the_same_box() -> None:
    """Bilinear sampling of a box that is the whole of one axis or a half of it, away from the border."""
    x = torch.rand(2, 3, 32, 32)
    u = torch.tensor([[0.0, 0.5, 0.5, 0.5], [0.0, 0.5, 0.0, 1.0]])  # a quarter of the area, ratio 1: middle; corner
    found = augment.crop(x, u, 0.25)
    for i, (top, left) in enumerate([(8, 8), (16, 0)]):
        wanted = reference.resized_crop(x[i], top, left, 16, 16, [32, 32], antialias=False)
        assert torch.allclose(found[i, :, 2:-2, 2:-2], wanted[:, 2:-2, 2:-2], atol=1e-4)


@given(st.floats(0.05, 0.99), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_crop_shows_nothing_that_is_not_in_the_image(least: float, seed: int) -> None:
    """Of an image whose value is its row, each crop's values rise by the share of the height that it shows."""
    x = torch.linspace(0, 1, 64).view(1, 1, 64, 1).expand(16, 1, 64, 64)
    found = augment.crop(x, torch.rand(16, 4, generator=torch.Generator().manual_seed(seed)), least)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    heights = found[:, 0, -1, 0] - found[:, 0, 0, 0]
    assert float(heights.min()) > (least * 0.75) ** 0.5 - 0.05


@given(st.integers(1, 3), st.integers(5, 9), st.integers(5, 9), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_elastic_bends_as_torchvision_does_with_the_same_field(c: int, h: int, w: int, seed: int) -> None:
    """Its `elastic_transform`, given the field that bicubic interpolation by hand, as torch's manual defines it, makes
    of the 4 x 4 places; within the image, since what lies beyond is black there and the border's colour here."""
    draws = np.random.default_rng(seed)
    x, u = torch.from_numpy(draws.random((2, c, h, w), np.float32)), torch.from_numpy(draws.random((2, 32), np.float32))

    def weights(size: int) -> np.ndarray:
        found, a = np.zeros((size, 4)), -0.75
        for i in range(size):
            at = i * 3 / (size - 1)
            for k in range(int(at) - 1, int(at) + 3):
                d = abs(at - k)
                near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                found[i, min(max(k, 0), 3)] += near if d <= 1 else far if d < 2 else 0
        return found

    places = 0.8 * (2 * u.numpy().reshape(2, 2, 4, 4) - 1)  # pixels to the side; down
    field = np.einsum("hi,bcij,wj->bchw", weights(h), places, weights(w))
    found = augment.bend(x, u, 0.8)
    for i in range(2):
        scaled = torch.from_numpy(np.stack([field[i, 0] * 2 / w, field[i, 1] * 2 / h], -1)).float()
        wanted = reference.elastic_transform(x[i], scaled[None])
        assert torch.allclose(found[i, :, 1:-1, 1:-1], wanted[:, 1:-1, 1:-1], atol=1e-4)


def test_elastic_by_hand() -> None:
    """All places a pixel to the right and none down show each pixel's right neighbour; the last repeats the border."""
    x, u = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[0.75] * 16 + [0.5] * 16])
    torch.testing.assert_close(augment.bend(x, u, 2), x[..., [1, 2, 3, 3]])


def test_cutout_blots_a_square_out_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    found = augment.cut_out(x, torch.tensor([[0.5, 0.0]]), 2)  # rows 1 and 2, columns -1 and 0
    wanted = x.clone()
    wanted[0, 0, 1:3, 0] = 7.5
    assert torch.equal(found, wanted)
    assert torch.equal(augment.cut_out(x, torch.tensor([[0.5, 0.5]]), 100), torch.full_like(x, 7.5))


def test_mixup_blends_each_sample_with_the_next_of_its_batch_by_hand() -> None:
    x, share = torch.tensor([[0.0, 4.0], [8.0, 0.0], [2.0, 2.0]]), torch.tensor([1.0, 0.25, 0.5])
    assert torch.equal(augment.blend(x, share), torch.tensor([[0.0, 4.0], [3.5, 1.5], [1.0, 3.0]]))


def test_mixup_shares_follow_beta() -> None:
    from scipy.stats import beta, kstest

    drawn = Views(Split(torch.zeros(1), torch.zeros(5_000), 255), train(mixup=0.3), 0).draw(0)["mixup"]
    assert kstest(drawn.numpy(), beta(0.3, 0.3).cdf).pvalue > 0.001


ALL = {"jitter": 1, "flip": True, "crop": 0.5, "elastic": 1, "cutout": 2, "mixup": 0.4}


def test_draws_depend_on_seed_and_epoch_alone_and_are_each_samples_own() -> None:
    images = split(40)
    views = Views(images, train(**ALL), 3)
    one, again, later, other = views.draw(1), views.draw(1), views.draw(2), Views(images, train(**ALL), 4).draw(1)
    assert list(one) == ["jitter", "flip", "crop", "elastic", "cutout", "mixup"]
    for name, draws in one.items():
        assert torch.equal(draws, again[name])
        assert not torch.equal(draws, later[name])
        assert not torch.equal(draws, other[name])
        assert len(draws.unique(dim=0)) > 4
    without = Views(images, train(**ALL | {"flip": False}), 3).draw(1)
    assert all(torch.equal(draws, one[name]) for name, draws in without.items())  # one changes no other


@pytest.mark.parametrize("one", list(ALL))
def test_a_sample_is_seen_as_its_own_draws_say_whatever_its_batch(one: str) -> None:
    if one == "mixup":
        pytest.skip("blends samples of a batch")
    views = Views(split(12), train(**{one: ALL[one]}), 0)
    drawn = views.draw(0)
    whole = views.view(torch.arange(12), drawn)
    parts = [
        views.view(torch.tensor([i]), {name: draws[i : i + 1] for name, draws in drawn.items()}) for i in range(12)
    ]
    assert torch.allclose(whole, torch.cat(parts))


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x])
def test_a_view_leaves_the_stored_images_as_they_are(change: Callable[[Tensor], Tensor]) -> None:
    images = split(8)
    before, views = images.store.clone(), Views(images, train(**ALL), 0)
    seen = views.view(torch.arange(8), views.draw(0))
    assert change(seen).shape == (8, 3, 6, 5)
    assert torch.equal(images.store, before)
    assert device.generator(0, "flip", 0).initial_seed() != device.generator(0, "crop", 0).initial_seed()
