import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import BadInput, core, data
from kdcli.config import Data


def idx(array: np.ndarray) -> bytes:
    """The IDX encoding of a uint8 array, written by hand."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_digits_are_a_fixed_stratified_split_scaled_to_one() -> None:
    digits = data.load(Data(name="digits", heldout=200))
    assert (len(digits.train), len(digits.test), len(digits.heldout)) == (1297, 500, 200)
    inputs = digits.train.inputs()
    assert inputs.shape == (1297, 64)
    assert (float(inputs.min()), float(inputs.max())) == (0, 1)
    for labels, total in ((digits.test.labels, 500), (digits.train.labels[digits.heldout], 200)):
        shares = torch.bincount(labels, minlength=10) / total
        assert float((shares - torch.bincount(digits.train.labels) / 1297).abs().max()) < 0.005
    again = data.load(Data(name="digits", heldout=200))
    assert torch.equal(again.test.images, digits.test.images)
    seen = {image.numpy().tobytes() for image in digits.train.images}
    assert sum(image.numpy().tobytes() in seen for image in digits.test.images) == 0


def test_evaluating_on_the_heldout_images_takes_them_out_of_training() -> None:
    usual = data.load(Data(name="digits", heldout=200))
    search = data.load(Data(name="digits", heldout=200, evaluate_on="heldout"))
    assert len(search.train) == 1097
    assert torch.equal(search.test.images, usual.train.at(usual.heldout).images)
    trained_on = {image.numpy().tobytes() for image in search.train.images}
    assert sum(image.numpy().tobytes() in trained_on for image in search.test.images) == 0


def test_jitter_shifts_and_fills_with_background() -> None:
    """A 3 x 3 image moved by hand: shift (2, 1) of jitter 1 shows it from one row down, its last row falling in."""
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    jittered = data.Jittered(data.Split(image, torch.zeros(1, dtype=torch.long), white=1), 1)

    def shifted(dy: int, dx: int) -> list[float]:
        return jittered.inputs(torch.tensor([0]), torch.tensor([[dy], [dx]]))[0].tolist()

    assert shifted(1, 1) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert shifted(2, 1) == [4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert shifted(1, 0) == [0, 1, 2, 0, 4, 5, 0, 7, 8]


@pytest.mark.parametrize("jitter", [1, 2])
def test_all_shifts_are_equally_likely(jitter: int) -> None:
    """Chi-square on the shifts as `fit` draws them: the extreme ones get their full share."""
    from scipy.stats import chisquare

    side = 2 * jitter + 1
    shifts = torch.randint(side, (2, 60_000), generator=core.generator(0, "jitter", 0))
    counts = torch.bincount(shifts[0] * side + shifts[1], minlength=side**2)
    assert len(counts) == side**2
    assert chisquare(counts.numpy()).pvalue > 0.001


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], value: int) -> None:
    array = np.full(shape, value, dtype=np.uint8)
    path = tmp_path_factory.getbasetemp() / "array-idx"
    path.write_bytes(idx(array))
    assert np.array_equal(data.read_idx(path), array)


GOOD = idx(np.zeros((3, 2, 2), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "is truncated: 27 bytes where its header promises 28"),
        (GOOD + b"\0", "is damaged: 29 bytes where its header promises 28"),
        (GOOD[:9], "is not an IDX file"),
        (b"", "is not an IDX file"),
        (b"\0\0\x0d" + GOOD[3:], "is not an IDX file"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "is truncated"),
        (b"\0\0\x08\x01" + b"\0" * 4, "is damaged"),
    ],
)
def test_a_damaged_idx_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x-idx"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        data.read_idx(path)


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_array_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-idx"
    path.write_bytes(content)
    try:
        array = data.read_idx(path)
    except BadInput:
        return
    assert idx(np.asarray(array)) == content


def test_other_content_of_the_right_size_is_not_mnist(tmp_path: Path) -> None:
    path = tmp_path / "x-idx"
    path.write_bytes(GOOD)
    with pytest.raises(BadInput, match="not MNIST's"):
        data.read_idx(path, md5="0" * 32)


def test_mnist_is_read_as_torchvision_reads_it(mnist_dir: Path) -> None:
    from torchvision.datasets import MNIST

    mnist = data.load(Data(name="mnist"), mnist_dir)
    assert (len(mnist.train), len(mnist.test), len(mnist.heldout)) == (60_000, 10_000, 5_000)
    for split, train in ((mnist.train, True), (mnist.test, False)):
        reference = MNIST(str(mnist_dir), train=train)
        assert torch.equal(split.images, reference.data)
        assert torch.equal(split.labels, reference.targets)
    assert int((mnist.test.labels == 3).sum()) == 1010
