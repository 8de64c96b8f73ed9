import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST_FILES, OWN_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import BadInput, BadKeys
from kdcli.config import Data
from kdcli.data import sources
from kdcli.data.dataset import Dataset, Split, open_dataset
from kdcli.runs.spec import Facts

EDITED = """

def edited():
    found = load(each=6)
    x_train, y_train, x_test, y_test, classes = found.values()
    EDIT
    return found
"""


def source(folder: Path, edit: str = "pass") -> Data:
    """The data section of a file with 18 images of three classes, whose line `edit` changes what it returns."""
    folder.mkdir(exist_ok=True)
    path = folder / "images.py"
    path.write_text(OWN_DATA + EDITED.replace("EDIT", edit))
    return Data(function=f"{path}:edited")


def idx(array: np.ndarray) -> bytes:
    """The IDX encoding of a uint8 array, written by hand."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def dataset(labels: list[int], held: int, names: str = "abcdefgh") -> Dataset:
    """A dataset that has nothing but labels."""
    y = torch.tensor(labels)
    split = Split(torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8), y, 255)
    facts = Facts(fingerprint="f", classes=list(names[: int(y.max()) + 1]), shape=[1, 2, 2], white=255)
    return Dataset(split, split, held, facts)


# The datasets that kd knows.


def test_digits_are_a_fixed_stratified_split_scaled_to_one() -> None:
    digits = open_dataset(Data(name="digits", heldout=200))
    assert (len(digits.train), len(digits.test), len(digits.heldout)) == (1297, 500, 200)
    assert digits.facts.classes == [str(c) for c in range(10)]
    assert (digits.facts.shape, digits.facts.white) == ([1, 8, 8], 16)
    inputs = digits.train.inputs(torch.arange(len(digits.train)))
    assert inputs.shape == (1297, 1, 8, 8)
    assert (float(inputs.min()), float(inputs.max())) == (0, 1)
    for labels, total in ((digits.test.labels, 500), (digits.train.labels[digits.heldout], 200)):
        shares = torch.bincount(labels, minlength=10) / total
        assert float((shares - torch.bincount(digits.train.labels) / 1297).abs().max()) < 0.005
    sources._read.cache_clear()
    again = open_dataset(Data(name="digits", heldout=200))
    assert again.facts == digits.facts
    assert torch.equal(again.test.store, digits.test.store)
    seen = {image.numpy().tobytes() for image in digits.train.store}
    assert sum(image.numpy().tobytes() in seen for image in digits.test.store) == 0


def test_evaluating_on_the_heldout_images_takes_them_out_of_training() -> None:
    usual = open_dataset(Data(name="digits", heldout=200))
    search = open_dataset(Data(name="digits", heldout=200, evaluate_on="heldout"))
    assert len(search.train) == 1097
    assert torch.equal(search.test.images(torch.arange(200)), usual.train.images(usual.heldout))
    trained_on = {image.numpy().tobytes() for image in search.train.images(torch.arange(1097))}
    assert sum(image.numpy().tobytes() in trained_on for image in search.test.images(torch.arange(200))) == 0
    assert search.facts == usual.facts  # the same images: who trains on them is the spec's


def test_a_tenth_is_held_out_unless_the_file_says_otherwise() -> None:
    assert open_dataset(Data(name="digits")).held == 129
    with pytest.raises(BadKeys) as error:
        open_dataset(Data(name="digits", heldout=433))
    assert error.value.problems == (("data.heldout", "must be at most 432, a third of the training images"),)


def test_mnist_is_read_as_torchvision_reads_it(mnist_dir: Path) -> None:
    from torchvision.datasets import MNIST

    mnist = open_dataset(Data(name="mnist", heldout=5_000), mnist_dir)
    assert (len(mnist.train), len(mnist.test), len(mnist.heldout)) == (60_000, 10_000, 5_000)
    assert (mnist.facts.shape, mnist.facts.white) == ([1, 28, 28], 255)
    for split, train in ((mnist.train, True), (mnist.test, False)):
        reference = MNIST(str(mnist_dir), train=train)
        assert torch.equal(split.store[:, 0], reference.data)
        assert torch.equal(split.labels, reference.targets)
    assert int((mnist.test.labels == 3).sum()) == 1010


IMAGES, LABELS = idx(np.zeros((4, 5, 5), np.uint8)), idx(np.array([0, 1, 0, 1], np.uint8))


def mnist_in(folder: Path, **contents: bytes) -> BadInput:
    """Why `name: mnist` cannot be had from a folder of these files, valid unless they are given."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in MNIST_FILES:
        valid = IMAGES if "images" in name else LABELS
        (raw / f"{name}-ubyte").write_bytes(contents.get(name.replace("-", "_"), valid))
    with pytest.raises(BadInput) as error:
        open_dataset(Data(name="mnist"), folder)
    (line,) = error.value.lines
    return BadInput(line.removeprefix("data.name: "))


def test_idx_files_of_others_are_not_called_damaged(tmp_path: Path) -> None:
    message = str(mnist_in(tmp_path))
    assert message.startswith(f"{tmp_path}/MNIST/raw: these files are not MNIST's")
    assert "damaged" not in message
    assert "delete" not in message


@pytest.mark.parametrize(
    "content",
    [IMAGES[:-1], IMAGES + b"\0", IMAGES[:9], b"", b"\0\0\x0d" + IMAGES[3:], b"\0\0\x08\x03" + b"\xff" * 12, LABELS],
)
def test_a_damaged_idx_file_is_told(content: bytes, tmp_path: Path) -> None:
    message = str(mnist_in(tmp_path, t10k_images_idx3=content))
    assert message.startswith(
        (f"{tmp_path}: MNIST is damaged or cannot be read", "MNIST: image ", f"{tmp_path}/MNIST/raw: these files")
    )


def test_files_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    three = idx(np.array([0, 1, 0], np.uint8))
    assert "MNIST: image 3 cannot be read: IndexError" in str(mnist_in(tmp_path, train_labels_idx1=three))
    small = idx(np.zeros((4, 5, 6), np.uint8))
    assert "these files are not MNIST's" in str(mnist_in(tmp_path, t10k_images_idx3=small))


@given(st.binary(max_size=64), st.sampled_from(["train_images_idx3", "train_labels_idx1"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_get_a_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    mnist_in(tmp_path_factory.getbasetemp() / "any", **{name: content})


def test_mnist_that_is_absent_is_not_downloaded_by_a_dry_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="MNIST is missing, and --dry-run downloads nothing: put its files in"):
        open_dataset(Data(name="mnist"), tmp_path, download=False)


# Somebody's own images.


def test_colour_images_of_three_named_classes(tmp_path: Path) -> None:
    found = open_dataset(source(tmp_path))
    assert found.facts.classes == ["cat", "dog", "owl"]
    assert (found.facts.shape, found.facts.white) == ([3, 6, 9], 255)
    assert (len(found.train), len(found.test), found.held) == (18, 9, 3)
    assert found.train.inputs(torch.tensor([4])).shape == (1, 3, 6, 9)
    assert torch.allclose(found.train.inputs(torch.tensor([4]))[0], found.train.store[4] / 255)
    assert found.numbers(["owl", "cat"]).tolist() == [2, 0]


def test_a_hundred_classes(tmp_path: Path) -> None:
    named = open_dataset(Data(function=f"{source(tmp_path).function}".replace("edited", "hundred")))
    assert named.facts.classes[7] == "kind 7"
    assert (len(named.train), named.held, len(named.facts.classes)) == (1200, 120, 100)
    assert set(torch.bincount(named.train.labels[named.heldout]).tolist()) == {1, 2}


def test_classes_without_names_are_called_by_their_numbers(tmp_path: Path) -> None:
    assert open_dataset(source(tmp_path, "del found['classes']")).facts.classes == ["0", "1", "2"]


def test_grey_images_may_leave_out_their_channel_and_come_from_torch(tmp_path: Path) -> None:
    edit = "import torch; found = {k: torch.from_numpy(v[:, 0] if 'x' in k else v) for k, v in found.items() if k != 'classes'}"
    assert open_dataset(source(tmp_path, edit)).facts.shape == [1, 6, 9]


@pytest.mark.parametrize(
    "edit",
    [
        "found.update(y_train=y_train.astype(np.uint16), y_test=y_test.astype(np.int8))",
        "found.update(y_train=y_train.tolist(), y_test=y_test.tolist())",
        "found['classes'] = np.array(classes)",
        "found['classes'] = tuple(classes)",
        "found['x_train'] = np.asfortranarray(x_train)",
        "found['x_train'] = x_train[::-1][::-1]",
    ],
)
def test_arrays_and_names_of_any_kind_are_the_same_dataset(edit: str, tmp_path: Path) -> None:
    plain = open_dataset(source(tmp_path / "plain"))
    assert open_dataset(source(tmp_path / "other", edit)).facts == plain.facts


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    edits = {
        "as it is": "pass",
        "elsewhere": "pass  # and another text",
        "a pixel": "x_train[5, 2, 5, 8] ^= 1",
        "a test pixel": "x_test[0, 0, 0, 0] ^= 1",
        "a label": "y_train[[0, -1]] = y_train[[-1, 0]]",
        "a test label": "y_test[[0, -1]] = y_test[[-1, 0]]",
        "an image less": "found.update(x_test=x_test[:-1], y_test=y_test[:-1])",
        "another shape": "found.update(x_train=x_train.reshape(-1, 3, 9, 6), x_test=x_test.reshape(-1, 3, 9, 6))",
        "a name": "classes[1] = 'doe'",
        "the order of the names": "classes.reverse()",
        "no names": "del found['classes']",
    }
    prints = {what: open_dataset(source(tmp_path / what, edit)).facts.fingerprint for what, edit in edits.items()}
    assert prints.pop("elsewhere") == prints["as it is"]
    assert len(set(prints.values())) == len(prints)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("return [1]", "must return a dictionary of x_train, y_train, x_test, y_test and, if they have names, classes"),
        ("del found['y_test']", "must return a dictionary of x_train, y_train, x_test, y_test"),
        ("found['x_train'] = x_train / 255", "x_train must be bytes (uint8) [N, C, H, W], [N, H, W, C] or [N, H, W], or a table of floats [N, columns], not float64 [18, 3, 6, 9]"),
        ("found['x_test'] = x_test.reshape(9, -1)", "x_test must be bytes (uint8) [N, C, H, W], [N, H, W, C] or [N, H, W], or a table of floats [N, columns], not uint8 [9, 162]"),
        ("found['x_train'] = x_train[:0]", "x_train must be bytes (uint8) [N, C, H, W], [N, H, W, C] or [N, H, W], or a table of floats [N, columns], not uint8 [0, 3, 6, 9]"),
        ("found['y_train'] = y_train[1:]", "y_train must be whole numbers from 0, [18], not int64 [17]"),
        ("found['y_train'] = y_train / 1", "y_train must be whole numbers from 0, [18], not float64 [18]"),
        ("found['y_test'] = y_test.astype(int) - 1", "y_test must be whole numbers from 0, and holds -1"),
        (
            "found['y_test'] = (y_test.astype(int) - 1).astype('uint64')",
            "y_test must be whole numbers from 0, and holds -1",
        ),
        ("found['y_train'] = y_train[None]", "y_train must be whole numbers from 0, [18], not int64 [1, 18]"),
        ("found['y_train'] = y_train * 2", "y_train must hold every one of two or more classes, 0 to 2"),
        ("del found['classes']; found['y_train'] = y_train * 2", "y_train must hold every one of two or more classes, 0 to 4"),
        ("del found['classes']; found['y_train'] = y_train * 0", "needs two or more classes, and has one: 0"),
        ("found['classes'] = []", "needs two or more classes, and has none"),
        ("found['y_train'] = y_train * 0", "y_train must hold every one of two or more classes"),
        ("found['classes'] = ['a', 'b']", "y_train must hold every one of two or more classes, 0 to 1"),
        ("found['classes'] = ['a', 'b', 'c', 'd']", "y_train must hold every one of two or more classes, 0 to 3"),
        ("found['classes'] = ['a', 'b', 'b']", "classes"),
        ("y_test[4] = 3", "y_test holds 3: training has the classes 0 to 2"),
        ("found['x_test'] = x_test[:, :1]", "x_test must be like x_train, uint8 [3, 6, 9], not uint8 [1, 6, 9]"),
        ("found['x_train'] = 'images'", "x_train"),
        ("found['x_train'] = [[1, 2], [3]]", "x_train"),
        ("found['y_train'] = list('abcabcabcabcabcabc')", "y_train"),
        ("found['classes'] = 3", "classes"),
        ("raise OSError('no disk')", "OSError: no disk"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_somebodys_images_is_told_in_one_line(edit: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        open_dataset(source(tmp_path, edit))
    (line,) = error.value.lines
    assert line.startswith(f"data.function: {tmp_path}/images.py:")
    assert message in line


def test_code_that_fails_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        open_dataset(source(tmp_path, "found[0]"))
    line = (OWN_DATA + EDITED).partition("EDIT")[0].count("\n") + 1
    assert str(error.value) == f"data.function: {tmp_path}/images.py:{line}: KeyError: 0"


# Parts of the training images.


def test_a_transfer_set_lacks_classes_and_heldout_images() -> None:
    whole = dataset([0, 1, 2] * 20, held=12)
    assert whole.transfer_set([], None).tolist() == list(range(60))
    assert whole.heldout.tolist() == sorted(whole.heldout.tolist())
    assert torch.bincount(whole.train.labels[whole.heldout]).tolist() == [4, 4, 4]
    kept = whole.transfer_set(["b"], None)
    assert set(kept.tolist()) == {i for i in range(60) if i % 3 != 1} - set(whole.heldout.tolist())
    few = whole.transfer_set(["b"], 8)
    assert set(few.tolist()) < set(kept.tolist())
    assert torch.bincount(whole.train.labels[few]).tolist() == [4, 0, 4]
    assert torch.equal(few, whole.transfer_set(["b"], 8))
    assert torch.bincount(whole.train.labels[whole.transfer_set([], 30)]).tolist() == [10, 10, 10]
    assert torch.equal(whole.transfer_set(["b"], 1000), kept)


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([0, 0, 0, 1, 1, 1, 2], 4, "class c has one image: to draw a share of every class takes two of each"),
        ([0, 1, 2] * 5, 2, "2 of 15 images: must leave one of each of 3 classes, on either side"),
        ([0, 1, 2] * 5, 13, "13 of 15 images: must leave one of each of 3 classes, on either side"),
    ],
)
def test_classes_that_are_too_small_are_told_in_one_line(labels: list[int], count: int, message: str) -> None:
    for held, drawn in ((3, count), (count, None)):
        small = dataset(labels, held)
        with pytest.raises(BadInput) as error:
            _ = small.transfer_set([], drawn) if drawn else small.heldout
        assert str(error.value) == message


@given(st.lists(st.integers(0, 3), min_size=2, max_size=80), st.integers(1, 80))
@settings(max_examples=200, deadline=None)
def test_a_share_leaves_every_class_on_both_sides_or_is_refused(labels: list[int], count: int) -> None:
    y = np.array(labels)
    try:
        chosen = sources.stratified(y, count, "abcd")
    except BadInput:
        return
    rest = sorted(set(range(len(y))) - set(chosen.tolist()))
    assert len(chosen) == count
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(y[chosen].tolist()) == set(y[rest].tolist()) == set(labels)
