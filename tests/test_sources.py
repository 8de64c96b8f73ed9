"""Folders, arrays and torchvision's datasets, with the mess that they come in."""

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli import BadInput, BadKeys
from kdcli.config import Data
from kdcli.data import images, sources
from kdcli.data.dataset import Dataset, open_dataset

Picture = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources._read.cache_clear()


def draw(
    path: Path, colour: object = (200, 30, 60), size: tuple[int, int] = (8, 6), mode: str = "RGB", **how: object
) -> Path:
    """An image file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **how)  # type: ignore[arg-type]
    return path


def photos(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3, parts: tuple[str, ...] = ("train", "test")
) -> Path:
    """A folder of small images, every one of its own colour."""
    n = 0
    for part in parts:
        for i, name in enumerate(classes):
            for k in range(each):
                n += 1
                draw(root / part / name / f"{k}.png", (50 * i, 5 * n, n))
    return root


def opened(folder: Path, **more: object) -> Dataset:
    return open_dataset(Data.model_validate({"folder": str(folder), **more}))


def refused(folder: Path, **more: object) -> list[str]:
    with pytest.raises(BadInput) as error:
        opened(folder, **more)
    return list(error.value.lines)


def test_a_folder_is_read_as_its_classes_say(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    draw(root / "train" / "dog" / "deep" / "er" / "x.jpeg", (1, 2, 3), quality=100, subsampling=0)
    found = opened(root)
    assert found.facts.classes == ["cat", "dog"]
    assert found.facts.shape == [3, 6, 8]
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train.store[0, :, 3, 3].tolist() == [0, 5, 1]
    assert np.abs(found.train.store[6, :, 3, 3].numpy().astype(int) - [1, 2, 3]).max() <= 2
    assert found.notes == []


def test_mean_and_std_are_those_of_the_training_images_by_numpy(tmp_path: Path) -> None:
    found = opened(photos(tmp_path / "photos"))
    x = found.train.store.numpy() / 255
    np.testing.assert_allclose(found.facts.mean, x.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(found.facts.std, x.std((0, 2, 3)), atol=1e-6)
    given = opened(tmp_path / "photos", mean=[0.5], std=[0.25]).facts
    assert (given.mean, given.std, given.given) == ([0.5], [0.25], True)
    with pytest.raises(BadKeys, match=r"data\.mean: must have 1 number, or 3: one per channel, not 2"):
        opened(tmp_path / "photos", mean=[0.5, 0.5], std=[0.2, 0.2])


def test_classes_sort_by_number_then_name(tmp_path: Path) -> None:
    assert opened(photos(tmp_path / "photos", ("10", "9", "b", "a"))).facts.classes == ["9", "10", "a", "b"]


@pytest.mark.parametrize(
    ("train", "part"), [("train", "val"), ("train", "valid"), ("Train", "Test"), ("Training", "Testing")]
)
def test_other_names_of_the_folders_are_known_and_said(train: str, part: str, tmp_path: Path) -> None:
    found = opened(photos(tmp_path / "photos", parts=(train, part)))
    assert found.facts.classes == ["cat", "dog"]
    assert len(found.test) == 6
    assert found.notes == [f"The test images are those of {tmp_path}/photos/{part}."]


def test_of_test_and_val_the_test_images_are_read_and_that_is_said(tmp_path: Path) -> None:
    found = opened(photos(tmp_path / "photos", parts=("train", "val", "test")))
    root = tmp_path / "photos"
    assert found.notes == [f"{root}: beside train, neither training nor test images: val."]


@pytest.mark.parametrize("other", ["Train", "training", "Test", "bird"])
def test_what_is_not_read_beside_the_parts_is_said(other: str, tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", parts=("train", "test", other))
    draw(root / "train" / "loose.png")
    found = opened(root)
    assert found.notes == [
        f"{root}: beside train, neither training nor test images: {other}.",
        f"{root}: images outside the folders of classes left out: 1.",
    ]


def test_a_part_without_classes_makes_room_for_the_next(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", parts=("training", "test"))
    draw(root / "train" / "loose.png")
    assert opened(root).notes == [f"{root}: beside training, neither training nor test images: train."]


def test_test_images_without_classes_make_room_for_others(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", parts=("train", "val"))
    draw(root / "test" / "1.png")
    found = opened(root)
    assert len(found.test) == 6
    assert f"The test images are those of {root}/val." in found.notes
    assert f"{root}: beside train, neither training nor test images: test." in found.notes


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    folder = os.fsencode(root / "train" / "cat")
    os.rename(os.path.join(folder, b"0.png"), os.path.join(folder, b"stra\xdfe.png"))
    (line,) = refused(root)
    assert line == f"data.folder: {root}/train/cat: the name 'stra\\udcdfe.png' is not UTF-8: rename it"


def test_unlabelled_images_are_no_class(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", classes=("cat", "dog", "more"), each=10, parts=("",))
    (line,) = refused(root, unlabelled=str(root / "more"))
    assert line == f"data.unlabelled: is the class more of data.folder too: move it out of {root}"


@pytest.mark.parametrize(("classes", "found"), [([b"cat", b"dog"], ["cat", "dog"]), (10, None)])
def test_names_of_classes_are_a_list(classes: Any, found: list[str] | None, tmp_path: Path) -> None:
    x, y = np.arange(8, dtype=np.uint8).reshape(4, 1, 2), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(classes))
    data = Data(arrays=str(tmp_path / "a.npz"))
    if found:
        assert open_dataset(data).facts.classes == found
    else:
        with pytest.raises(BadInput, match="classes must be a list of names"):
            open_dataset(data)


def test_classes_directly_below_give_a_fixed_stratified_share(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", each=10, parts=(".",))
    found, again = opened(root, test=0.3), opened(root, test=0.3)
    assert torch.bincount(found.test.labels).tolist() == [3, 3]
    assert torch.bincount(found.train.labels).tolist() == [7, 7]
    assert found.facts == again.facts
    assert found.notes == [f"The test images are a fixed 30% of every class of {root}."]
    assert len(opened(root).test) == 4
    both = photos(tmp_path / "both")
    with pytest.raises(BadKeys, match=r"data\.test: .* has test images of its own: remove the key"):
        opened(both, test=0.3)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert opened(photos(tmp_path / "photos", ("bus", "train", "test"), each=5, parts=(".",))).facts.classes == [
        "bus",
        "test",
        "train",
    ]


def test_what_is_hidden_and_what_is_no_image_is_left_out_and_counted(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    for name in (".DS_Store", "Thumbs.db", "._0.png"):
        (root / "train" / "cat" / name).write_bytes(b"x")
    (root / "test" / "dog" / "notes.txt").write_text("x")
    (root / "train" / "labels.csv").write_text("x")  # beside the classes
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "cat" / "__MACOSX").mkdir()
    found = opened(root)
    assert found.facts.classes == ["cat", "dog"]
    assert found.notes == [
        f"{root}: hidden or system files left out: 4.",
        f"{root}: .txt files, which are not read as images, left out: 1.",
    ]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: (r / "train" / "owl").mkdir(), ["train/owl: contains no images"]),
        (lambda r: draw(r / "test" / "owl" / "0.png"), ["test/owl: is no class of {r}/train (known: cat, dog)"]),
        (lambda r: [f.unlink() for f in (r / "test").rglob("*.png")], ["test: has no images in folders of classes"]),
        (lambda r: os.rename(r / "test" / "cat", r / "test" / "Cat"), ["test/Cat: is no class of {r}/train; did you mean cat?"]),
        (lambda r: [(r / part).rename(r / f"{part}_set") for part in ("train", "test")], ["test_set, train_set seem to be parts of a dataset, not classes: call them train and test, and"]),
        (lambda r: os.rename(r / "train", r / "tran"), ["has test/<class>/… but no train/<class>/… beside it"]),
        (lambda r: (r / "train" / "cat" / "0.png").write_bytes(b"GIF89a"), ["train/cat/0.png: is damaged or not an image"]),
        (lambda r: (r / "train" / "cat" / "0.png").write_bytes(b""), ["train/cat/0.png: is damaged or not an image"]),
        (lambda r: draw(r / "train" / "cat" / "9.png", size=(9, 9)), ["data.size: is missing: the images have 2 sizes, from 8 x 6 to 9 x 9; such as size: 64"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_told(spoil: Callable[[Path], object], said: list[str], tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    spoil(root)
    lines = refused(root)
    assert len(lines) == len(said)
    assert all(part.replace("{r}", str(root)) in line for part, line in zip(said, lines, strict=True))


def test_a_truncated_file_is_named_and_of_many_the_first_ten(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", each=15)
    for file in sorted((root / "train").rglob("*.png")):
        Image.effect_noise((64, 64), 90).convert("RGB").save(file)
        file.write_bytes(file.read_bytes()[:-2_000])
    lines = refused(root, size=8)
    assert lines[0] == f"data.folder: {root}/train/cat/0.png: is damaged or not an image"
    assert len(lines) == 11
    assert lines[-1] == "data.folder: and 20 more"
    assert [file.suffix for file in (tmp_path / "cache" / "kd").iterdir()] == [".lock"]  # nothing half done is kept


def test_one_class_alone_and_no_folder_are_refused(tmp_path: Path) -> None:
    assert (
        "must hold two or more folders of classes, each with its images, not 1"
        in refused(photos(tmp_path / "one", ("cat",)))[0]
    )
    (tmp_path / "none").mkdir()
    assert "must hold two or more folders of classes, each with its images, not 0" in refused(tmp_path / "none")[0]


def test_a_class_missing_from_the_test_images_is_named(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    for file in (root / "test" / "dog").iterdir():
        file.unlink()
    assert opened(root).notes == [f"{root}/test has no images of dog."]


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    (root / "train" / "cat" / "loop").symlink_to(root / "train" / "cat")
    assert len(opened(root).train) == 6


def test_test_images_that_lie_in_training_are_counted_and_named(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    draw(root / "test" / "cat" / "0.png", (0, 5, 1))
    draw(root / "test" / "dog" / "1.png", (0, 10, 2))
    (note,) = opened(root).notes
    assert note.startswith(
        "2 test images are also in the training set, pixel for pixel, 1 of them with another label: "
    )
    assert f"{root}/test/cat/0.png is {root}/train/cat/0.png" in note


def test_duplicates_are_those_of_a_comparison_of_all_with_all() -> None:
    """Of six bits an image, so that most are there several times: each test image with the last one like it."""
    rng = np.random.default_rng(0)
    for n, m in ((5, 9), (40, 30), (0, 3)):
        test, others = (rng.integers(0, 2, (k, 1, 3, 2), np.uint8) for k in (n, m))
        alike = {j: [i for i in range(m) if (test[j] == others[i]).all()] for j in range(n)}
        assert sources.duplicates(test, others) == [(j, same[-1]) for j, same in alike.items() if same]


# How files are decoded.


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff", ".gif", ".PNG"])
def test_every_format_is_read(suffix: str, tmp_path: Path) -> None:
    file = draw(tmp_path / f"x{suffix}", (200, 30, 60), lossless=True)
    assert images.to_bytes(images.open_image(file), None, 3)[:, 2, 2].tolist() == [200, 30, 60]


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("RGBA", (200, 30, 60, 0), [0, 0, 0]),
        ("RGBA", (200, 100, 50, 51), [40, 20, 10]),
        ("LA", (200, 0), [0, 0, 0]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 257 * 130, [130, 130, 130]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("P", 0, [200, 30, 60]),
    ],
)
def test_every_mode_becomes_colours(mode: str, colour: object, wanted: list[int], tmp_path: Path) -> None:
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "P":
        Image.new("RGB", (8, 6), (200, 30, 60)).quantize().save(file)
    else:
        draw(file, colour, mode=mode)
    assert images.to_bytes(images.open_image(file), None, 3)[:, 2, 2].tolist() == wanted


def test_a_photograph_is_turned_as_it_was_held(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "x.png", exif=exif)
    array = images.to_bytes(images.open_image(tmp_path / "x.png"), None, 1)
    assert array.shape == (1, 8, 4)
    assert array[0, :, 0].tolist() == [255] * 4 + [0] * 4
    assert images.headers([tmp_path / "x.png"]) == [images.Header(4, 8, False)]


@pytest.mark.parametrize("kind", ["jpg", "tiff"])
@pytest.mark.parametrize("orientation", [1, 2, 4, 5, 8, 9])  # the last one is in no standard
def test_a_header_has_the_size_that_the_image_has(orientation: int, kind: str, tmp_path: Path) -> None:
    exif, file = Image.Exif(), tmp_path / f"x.{kind}"
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4)).save(file, exif=exif)
    assert images.headers([file])[0][:2] == images.open_image(file).size


def test_the_shorter_side_is_resized_and_the_middle_kept() -> None:
    wide = Image.new("RGB", (40, 10), "white")
    wide.paste((0, 0, 0), (15, 0, 25, 10))
    assert images.to_bytes(wide, (5, 5), 1)[:, :, 1:-1].tolist() == [[[0] * 3] * 5]
    assert images.to_bytes(wide.rotate(90, expand=True), (5, 5), 3).shape == (3, 5, 5)


def test_grey_folders_have_one_channel_unless_they_are_to_have_three(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for i, name in enumerate(("a", "b")):
            for k in range(3):
                draw(tmp_path / "x" / part / name / f"{k}.png", 60 * i + 9 * k + 3 * (part == "test"), mode="L")
    assert opened(tmp_path / "x").facts.shape == [1, 6, 8]
    assert opened(tmp_path / "x", channels=3).facts.shape == [3, 6, 8]
    draw(tmp_path / "x" / "train" / "a" / "7.png")
    assert opened(tmp_path / "x").facts.shape == [3, 6, 8]


# The cache.


def test_a_second_start_decodes_nothing_and_a_changed_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "photos")
    first = opened(root)
    with monkeypatch.context() as patched:
        patched.setattr(sources, "fill", lambda *_: pytest.fail("decoded again"))
        sources._read.cache_clear()
        assert opened(root).facts == first.facts
    draw(root / "train" / "cat" / "0.png", (255, 255, 255))
    changed = opened(root)
    assert changed.facts.fingerprint != first.facts.fingerprint
    assert changed.train.store[0, 0, 0, 0] == 255


def test_the_arrays_are_mapped_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    found = opened(root)
    found.train.store[0] = 9
    sources._read.cache_clear()
    assert opened(root).train.store[0, 1, 0, 0] == 5


def test_a_cache_that_cannot_be_written_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (line,) = refused(photos(tmp_path / "photos"))
    assert "decoded images go to" in line
    assert "XDG_CACHE_HOME names another folder" in line


# Arrays.


def saved(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def of_images(shape: tuple[int, ...], n: int, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)
    return images, np.arange(n) % classes


@pytest.mark.parametrize(
    ("shape", "wanted"), [((6, 5), [1, 6, 5]), ((6, 5, 3), [3, 6, 5]), ((3, 6, 5), [3, 6, 5]), ((4, 6, 5), [4, 6, 5])]
)
def test_npz_files_hold_images_of_any_layout(shape: tuple[int, ...], wanted: list[int], tmp_path: Path) -> None:
    x, y = of_images(shape, 8)
    other, _ = of_images(shape, 4, seed=1)
    found = open_dataset(Data(arrays=str(saved(tmp_path / "a.npz", x_train=x, y_train=y, x_test=other, y_test=y[:4]))))
    assert found.facts.shape == wanted
    moved = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if shape[-1] == 3 else x
    np.testing.assert_array_equal(found.train.store, moved)


def test_medmnist_files_are_read_as_they_are(tmp_path: Path) -> None:
    x, y = of_images((28, 28, 3), 9, 3)
    file = saved(tmp_path / "m.npz", train_images=x, train_labels=y[:, None], val_images=x, val_labels=y[:, None],
                 test_images=255 - x, test_labels=y[:, None])  # fmt: skip
    found = open_dataset(Data(arrays=str(file)))
    assert found.facts.shape == [3, 28, 28]
    assert found.train.labels.tolist() == y.tolist()
    assert found.notes == [f"{file}: val_images, val_labels are left out."]


def test_a_table_is_rows_of_floats_normalised_column_by_column(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal([5, 100, 0], [1, 30, 0], (40, 3)), np.arange(40) % 2
    found = open_dataset(
        Data(arrays=str(saved(tmp_path / "t.npz", x_train=x, y_train=y, x_test=x[:9] + 1, y_test=y[:9])))
    )
    assert found.facts.shape == [3, 1, 1]
    assert found.facts.table
    np.testing.assert_allclose(found.facts.mean, x.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.facts.std, [*x[:, :2].std(0), 1], rtol=1e-4)
    np.testing.assert_allclose(found.train.inputs(torch.tensor([3]))[0, :, 0, 0], x[3], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_train": None}, "must hold x_train, y_train, x_test, y_test and, if they have names, classes, not y_train, x_test, y_test"),
        ({"x_train": np.full((8, 3), np.nan)}, "x_train holds nan in row 0, column 0: fill it in or leave it out"),
        ({"x_train": np.full((8, 3), 1e300)}, "x_train holds 1e+300 in row 0, column 0: float32 does not hold that: scale the column"),
        ({"y_train": np.array([0, 1] * 3 + [0, 10**12])}, "y_train holds 1000000000000 among 8 labels: it must hold every class from 0 to the last"),
        ({"x_train": np.zeros((8, 2, 2, 3), np.float32)}, "x_train must be bytes (uint8)"),
        ({"y_train": np.eye(8)}, "y_train must be whole numbers from 0, [8]"),
        ({"y_train": np.array(list("abababab"))}, "y_train must be whole numbers from 0, [8]"),
        ({"x_train": np.zeros((8, 9, 9, 4), np.uint8)}, "x_train must have 1 or 3 channels or, as [N, C, H, W], fewer of them than pixels on a side, not [8, 9, 9, 4]"),
        ({"x_test": np.zeros((4, 9, 9), np.uint8)}, "x_test must be like x_train, uint8 [1, 6, 5], not uint8 [1, 9, 9]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_arrays_is_told(change: dict[str, object], said: str, tmp_path: Path) -> None:
    x, y = of_images((6, 5), 8)
    good = {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4]} | change
    file = saved(tmp_path / "a.npz", **{name: array for name, array in good.items() if array is not None})
    with pytest.raises(BadInput) as error:
        open_dataset(Data(arrays=str(file)))
    assert said in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
def test_a_damaged_npz_file_is_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.npz: cannot be read as \.npz"):
        open_dataset(Data(arrays=str(tmp_path / "a.npz")))


def test_an_npz_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    x, y = of_images((6, 5), 8)
    np.savez(tmp_path / "a.npz", x_train=np.array([{}], object), y_train=y, x_test=x, y_test=y)
    with pytest.raises(BadInput, match="cannot be read as"):
        open_dataset(Data(arrays=str(tmp_path / "a.npz")))


# torchvision's.


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_mnist(raw: Path, prefix: str = "") -> None:
    """The files of a kind of MNIST, with 12 training and 4 test images of ten classes."""
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k" if not prefix else "test", 10)):
        x, y = of_images((28, 28), n, 10, seed=n)
        for kind, array in (("images-idx3", x), ("labels-idx1", y.astype(np.uint8))):
            (raw / f"{prefix}{part}-{kind}-ubyte").write_bytes(idx(array))


def test_a_dataset_of_torchvisions_is_read_with_its_class_names(tmp_path: Path) -> None:
    small_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    found = open_dataset(Data(name="torchvision:FashionMNIST"), tmp_path / "data")
    assert found.facts.classes[:2] == ["T-shirt/top", "Trouser"]
    assert found.facts.shape == [1, 28, 28]
    np.testing.assert_array_equal(found.train.store[:, 0], of_images((28, 28), 20, 10, seed=20)[0])
    assert found.test.labels.tolist() == list(range(10))
    resized = open_dataset(Data(name="torchvision:FashionMNIST", size=14, channels=3), tmp_path / "data")
    assert resized.facts.shape == [3, 14, 14]


def test_emnist_needs_its_split(tmp_path: Path) -> None:
    small_mnist(tmp_path / "data" / "EMNIST" / "raw", "emnist-digits-")
    found = open_dataset(Data(name="torchvision:EMNIST", split="digits"), tmp_path / "data")
    assert found.facts.classes == [str(c) for c in range(10)]
    with pytest.raises(BadKeys, match=r"data\.split: is missing: EMNIST has several"):
        open_dataset(Data(name="torchvision:EMNIST"), tmp_path / "data")
    with pytest.raises(BadKeys, match=r"data\.split: is for KMNIST to choose by: remove it"):
        open_dataset(Data(name="torchvision:KMNIST", split="digits"), tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CIFAR11", "data.name: torchvision has no dataset CIFAR11; did you mean CIFAR10?"),
        ("FakeData", "data.name: FakeData has no parts train and test"),
        ("MovingMNIST", "MovingMNIST is missing"),
    ],
)
def test_what_torchvision_cannot_give_is_told(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        open_dataset(Data(name=f"torchvision:{name}"), tmp_path, download=False)
    assert said in str(error.value)
    assert len(error.value.lines) == 1


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(BadInput) as error:
        open_dataset(Data(name="torchvision:CIFAR10"), tmp_path)
    assert str(error.value) == (
        f"data.name: {tmp_path}: CIFAR10 is missing and could not be downloaded (OSError: no network): put its files "
        f"in {tmp_path}, where torchvision looks for them, or name another folder with --data-dir or KD_DATA"
    )


@pytest.mark.parametrize("damage", ["facts.json", "files.json", "x_train.npy", "y_test.npy"])
@pytest.mark.parametrize("how", ["truncate", "rewrite", "remove"])
def test_a_damaged_cache_is_made_anew(damage: str, how: str, tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    first = opened(root)
    images = first.train.store.clone()
    (file,) = (tmp_path / "cache" / "kd").glob(f"*/{damage}")
    content = file.read_bytes()
    file.unlink()
    if how != "remove":
        file.write_bytes(content[:10] if how == "truncate" else content[:-4] + bytes(4))
    sources._read.cache_clear()
    again = opened(root)
    assert again.facts == first.facts
    assert torch.equal(again.train.store, images)


def test_a_link_that_leads_to_another_class_is_refused(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    (root / "train" / "cat" / "up").symlink_to(root / "train" / "dog")
    assert refused(root)[0].startswith(f"data.folder: {root}/train/cat/up: points outside its class folder, to ")
    (root / "train" / "cat" / "up").unlink()
    photos(tmp_path / "elsewhere", ("more",))
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "train" / "more")
    assert len(opened(root).train) == 9


# Images that nobody labelled.


def alien(root: Path) -> Path:
    """A folder of unlabelled images at several depths."""
    for i in range(3):
        draw(root / "/".join("abc"[:i]) / f"{i}.png", (9, 9, 100 + i))
    return root


def unlabelled(data: Mapping[str, str], folder: Path, **more: object) -> Dataset:
    return open_dataset(Data.model_validate({**data, "unlabelled": str(folder), **more}))


def test_images_that_nobody_labelled_are_found_at_any_depth_beside_a_folder(tmp_path: Path) -> None:
    root, plain = photos(tmp_path / "photos"), opened(tmp_path / "photos")
    extra = alien(tmp_path / "more")
    (extra / "a" / ".hidden.png").write_bytes(b"x")
    (extra / "notes.txt").write_text("x")
    (extra / "linked").symlink_to(root / "train" / "cat")  # which in a folder of classes is refused
    found = unlabelled({"folder": str(root)}, extra)
    assert found.unlabelled
    assert found.unlabelled.store[:, :, 0, 0].tolist() == [[9, 9, 100], [9, 9, 101], [9, 9, 102], *([0, 5 * n, n] for n in (1, 2, 3))]  # fmt: skip
    assert found.unlabelled.labels.tolist() == [-1] * 6
    assert found.notes == [
        f"{extra}: hidden or system files left out: 1.",
        f"{extra}: .txt files, which are not read as images, left out: 1.",
    ]
    assert found.files["unlabelled"][:3] == ["0.png", "a/1.png", "a/b/2.png"]
    assert found.facts == plain.facts.model_copy(update={"unlabelled": found.facts.unlabelled})
    assert torch.equal(found.train.store, plain.train.store)
    assert (plain.unlabelled, plain.facts.unlabelled, plain.files["unlabelled"]) == (None, None, [])


def test_the_fingerprint_of_unlabelled_images_is_of_their_pixels_alone(tmp_path: Path) -> None:
    data = {"folder": str(photos(tmp_path / "photos"))}
    one, other = (unlabelled(data, alien(tmp_path / name)).facts.unlabelled for name in ("one", "other"))
    assert one == other
    os.rename(tmp_path / "other" / "0.png", tmp_path / "other" / "00.png")
    assert unlabelled(data, tmp_path / "other").facts.unlabelled == one
    draw(tmp_path / "other" / "00.png", (9, 9, 99))
    changed = unlabelled(data, tmp_path / "other")
    assert changed.facts.unlabelled != one
    assert changed.files["unlabelled"][0] == "00.png"


def test_unlabelled_images_are_decoded_once_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(folder=str(photos(tmp_path / "photos")), unlabelled=str(alien(tmp_path / "more")))
    first = open_dataset(data)
    monkeypatch.setattr(sources, "fill", lambda *_: pytest.fail("was decoded again"))
    again = open_dataset(data)
    assert first.unlabelled
    assert again.unlabelled
    assert torch.equal(first.unlabelled.store, again.unlabelled.store)
    found, facts = sources.read(data, None, download=False)
    assert isinstance(sources.read_unlabelled(data, found, facts).x, np.memmap)
    assert again.facts == first.facts


def test_unlabelled_images_take_the_shape_of_those_of_training(tmp_path: Path) -> None:
    root, extra = photos(tmp_path / "photos"), tmp_path / "more"
    extra.mkdir()
    Image.fromarray(np.arange(800, dtype=np.uint16).reshape(20, 40).astype(np.uint8)).save(extra / "wide.png")
    with pytest.raises(BadKeys) as error:
        unlabelled({"folder": str(root)}, extra)
    line = "data.size: is missing: training images have 8 x 6 pixels, unlike 1 of the unlabelled: "
    assert error.value.lines == (f"{line}{extra}/wide.png has 40 x 20; such as size: 6",)
    found = unlabelled({"folder": str(root)}, extra, size=4)
    assert found.unlabelled
    assert found.unlabelled.store.shape == (1, 3, 4, 4)  # of grey, colours
    wanted = images.to_bytes(images.open_image(extra / "wide.png", 4), (4, 4), 3)
    np.testing.assert_array_equal(found.unlabelled.store[0], wanted)


def npz(path: Path, shape: tuple[int, ...] = (6, 9, 3)) -> str:
    x = np.random.default_rng(0).integers(0, 255, (8, *shape), np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(8) % 2, x_test=x[:4] // 2, y_test=np.arange(4) % 2)
    return str(path)


def test_unlabelled_images_join_any_source(tmp_path: Path) -> None:
    """Digits have 16 levels of grey; the colour images of arrays need not be square."""
    small_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    (tmp_path / "own.py").write_text(f"import numpy as np\n\ndef load():\n    return dict(np.load({npz(tmp_path / 'x.npz')!r}))\n")  # fmt: skip
    extra = tmp_path / "grey"
    extra.mkdir()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) // 4
    Image.fromarray((grey * 255.0 / 16).round().astype(np.uint8)).save(extra / "digit.png")
    found = unlabelled({"name": "digits"}, extra)
    assert found.unlabelled
    np.testing.assert_array_equal(found.unlabelled.images(torch.tensor([0]))[0, 0], grey)
    assert found.unlabelled.inputs(torch.tensor([0])).max() == 15 / 16
    of_torchvision = Data(name="torchvision:FashionMNIST", unlabelled=str(extra), size=10)
    resized = open_dataset(of_torchvision, tmp_path / "data").unlabelled
    assert resized
    assert resized.store.shape == (1, 1, 10, 10)
    for source in ({"arrays": npz(tmp_path / "x.npz")}, {"function": f"{tmp_path}/own.py:load"}):
        beside = unlabelled(source, extra, size=6)
        assert beside.unlabelled
        assert beside.unlabelled.store.shape == (1, 3, 6, 9)
        with pytest.raises(BadKeys, match=r"data\.size: must be 6, the shorter side of the training images"):
            unlabelled(source, extra, size=9)
        assert beside.files == {"train": [], "test": [], "unlabelled": ["digit.png"]}


def test_what_is_wrong_with_unlabelled_images_is_told_by_their_key(tmp_path: Path) -> None:
    data = {"folder": str(photos(tmp_path / "photos"))}

    def told(folder: Path, data: Mapping[str, str] = data) -> list[str]:
        with pytest.raises(BadKeys) as error:
            unlabelled(data, folder)
        return list(error.value.lines)

    assert told(tmp_path / "none") == [f"data.unlabelled: there is no folder {tmp_path}/none"]
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    assert told(tmp_path / "empty") == [f"data.unlabelled: {tmp_path}/empty: contains no images"]
    extra = alien(tmp_path / "more")
    (extra / "a" / "1.png").write_bytes(b"GIF89a")
    assert told(extra) == [f"data.unlabelled: {extra}/a/1.png: is damaged or not an image"]
    (extra / "a" / "1.png").unlink()
    (extra / "a" / "1.png").symlink_to(extra / "gone.png")
    assert told(extra) == [f"data.unlabelled: {extra}/a/1.png: No such file or directory"]
    rows = np.random.default_rng(0).random((8, 5))
    np.savez(tmp_path / "t.npz", x_train=rows, y_train=np.arange(8) % 2, x_test=rows, y_test=np.arange(8) % 2)
    table = {"arrays": str(tmp_path / "t.npz")}
    assert told(extra, table) == [
        "data.unlabelled: holds image files of 1 or 3 channels, and this is a table: remove it"
    ]


def test_test_images_that_lie_among_the_unlabelled_ones_are_counted_and_named(tmp_path: Path) -> None:
    root, extra = photos(tmp_path / "photos"), alien(tmp_path / "more")
    draw(extra / "z.png", (0, 35, 7))  # the first test image
    said = "1 test image is also among the unlabelled images, pixel for pixel: "
    assert unlabelled({"folder": str(root)}, extra).notes == [f"{said}{root}/test/cat/0.png is {extra}/z.png."]


def test_files_are_named_in_the_order_of_the_images(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", each=20)
    found = opened(root)
    assert found.files["train"][19:21] == ["train/cat/9.png", "train/dog/0.png"]
    held = opened(root, evaluate_on="heldout", heldout=6)
    share = opened(photos(tmp_path / "share", each=10, parts=(".",)), test=0.3)
    for dataset, folder in ((found, root), (held, root), (share, tmp_path / "share")):
        for split, files in ((dataset.train, dataset.files["train"]), (dataset.test, dataset.files["test"])):
            assert len(files) == len(split)
            stored = split.images(torch.arange(len(split)))[:, :, 0, 0].tolist()
            assert stored == [list(Image.open(folder / file).getpixel((0, 0))) for file in files]  # type: ignore[arg-type]
    assert len(held.test) == 6
    assert set(held.files["test"]).isdisjoint(held.files["train"])


def test_a_split_that_there_is_not_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match=r"^data.split: Unknown value 'ballanced' for argument split\. Valid values are"):
        open_dataset(Data(name="torchvision:EMNIST", split="ballanced"), tmp_path)


def test_whatever_a_file_makes_pillow_raise_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: object, **__: object) -> None:
        raise struct.error("required argument is not an integer")  # of odd EXIF data

    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", odd)
    with pytest.raises(BadInput, match=r"a\.png: is damaged or not an image"):
        images.open_image(tmp_path / "a.png")
