"""Image files: how one becomes bytes, and what lies in a folder of them."""

import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from kdcli import BadInput, cores
from kdcli.config import nearest, some

T = TypeVar("T")
FORMATS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
TRAINS = ("train", "training")  # what the folder of a part may be called, the first that is there, in any capitals
TESTS = ("test", "testing", "val", "valid", "validation")
PART = re.compile(rf"(.*[-_ ])?({'|'.join(TRAINS + TESTS)})([-_ ].*)?", re.IGNORECASE)  # `seg_train`, `test_set`
GREY = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L"}


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image file while it is read. Raises BadInput where it cannot be."""
    too_large = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
    try:
        with too_large, Image.open(file) as image:
            yield image
    except BadInput:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{file}: is too large: make it smaller, {Image.MAX_IMAGE_PIXELS:,} pixels at most") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise BadInput(f"{file}: {getattr(error, 'strerror', None) or 'is damaged or not an image'}") from None


def open_image(file: Path, least: int = 0) -> Image.Image:
    """An image file, the first frame of several, held as the camera was: of mode L, RGB, or RGBA where parts of it are
    transparent. A JPEG file is decoded no larger than its shorter side needs for `least` pixels. Raises BadInput."""
    with _opened(file) as image:
        if least:
            image.draft(None, (least, least))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise BadInput(f"{file}: has pixels of mode {image.mode}: save it with 8 or 16 bits per pixel")
        if image.has_transparency_data:
            return image.convert("RGBA")
        return image.convert("L" if image.mode in GREY else "RGB")


def to_bytes(image: Image.Image, size: tuple[int, int] | None, channels: int, white: int = 255) -> NDArray[np.uint8]:
    """An image as bytes [C, H, W] from 0 to `white`, of this width and height if they are given: as much of its middle
    as has their shape, resized; what is transparent is black."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    if white != 255:
        array = (array * (white / 255)).round().astype(np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


class Header(NamedTuple):
    """What a file says of its image before it is decoded."""

    width: int
    height: int
    grey: bool


def headers(files: Sequence[Path]) -> list[Header]:
    """The headers of image files. Raises BadInput with those that cannot be read."""

    def header(file: Path) -> Header | BadInput:
        try:
            with _opened(file) as image:
                # by its orientation; Pillow has turned a TIFF file already
                turned = image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
                width, height = image.size[::-1] if turned else image.size
                return Header(width, height, image.mode in GREY)
        except BadInput as error:
            return error

    parts = in_processes(lambda _, some: [*map(header, some)], files, [range(len(files))])
    found = [one for _, part in parts for one in part]
    refuse([line for one in found if isinstance(one, BadInput) for line in one.lines])
    return [one for one in found if isinstance(one, Header)]


Work = Callable[[int, Sequence[Any]], T]  # on some items, of which the first has this number


def in_processes(work: Work[T], items: Sequence[Any], parts: Iterable[range]) -> Iterator[tuple[range, T]]:
    """What `work` makes of parts of the items, a hundred at a time, in order, in as many processes as there are cores;
    threads would wait for each other."""
    hundreds: Any = [part[i : i + 100] for part in parts for i in range(0, len(part), 100)]

    def several(part: Any) -> T:  # forked processes take it over; it could not be sent to them
        return work(part.start, items[part.start : part.stop])

    made = DataLoader(hundreds, None, num_workers=cores(), collate_fn=several, multiprocessing_context="fork")
    yield from zip(hundreds, made, strict=True)


def refuse(problems: Sequence[str]) -> None:
    """Raise BadInput with the first of many problems, if there are any."""
    if problems:
        raise BadInput(*problems[:10], *([f"and {len(problems) - 10:,} more"] if len(problems) > 10 else []))


Labelled = Sequence[tuple[Path, int]]  # files, and the number of the class of each


class Folder(NamedTuple):
    """The image files of a folder; `test` is empty where it has no test images of their own."""

    path: Path
    classes: list[str]  # those of the training images: numbers by value, then names
    train: Labelled
    test: Labelled
    notes: list[str]  # what was chosen, and left out


def list_folder(path: Path) -> Folder:
    """What lies in `train/<class>/…` and `test/<class>/…` (or as else they may be called), at any depth below a class;
    or in `<class>/…`. Raises BadInput with all that is wrong with the classes."""
    train, test, beside = _parts(path)
    classes, ignored = _classes(train), Counter[str]()
    if len(classes) < 2:
        raise BadInput(f"{train}: must hold two or more folders of classes, each with its images, not {len(classes)}")
    if all(map(PART.fullmatch, classes)):
        instead = "call them train and test, and put the images of each into folders of their classes"
        raise BadInput(f"{train}: {some(classes)} seem to be parts of a dataset, not classes: {instead}")
    of_train = [(file, i) for i, name in enumerate(classes) for file in _files(train / name, ignored)]
    of_test = [(file, i) for i, name in enumerate(classes) if test for file in _files(test / name, ignored)]
    lying = [file for part in {path, train, test or train} for file in part.iterdir()]
    loose = sum(file.suffix.lower() in FORMATS and file.is_file() for file in lying)  # few are asked the disk about
    ignored["images outside the folders of classes"] += loose
    have, notes = {i for _, i in of_train}, list[str]()
    problems = [f"{train / c}: contains no images" for i, c in enumerate(classes) if i not in have]
    if test:
        strange = [c for c in _classes(test) if c not in classes]
        problems += [f"{test / c}: is no class of {train}{nearest(c, classes)}" for c in strange]
        problems += [] if of_test or strange else [f"{test}: has no images in folders of classes"]
        notes += [] if test.name == "test" else [f"The test images are those of {test}."]
        tested = {i for _, i in of_test}
        absent = [c for i, c in enumerate(classes) if i not in tested]
        notes += [f"{test} has no images of {some(absent)}."] if absent else []
    notes += [f"{path}: beside {train.name}, neither training nor test images: {some(beside)}."] if beside else []
    left = _left_out(path, ignored)
    refuse([*problems, *left] if problems else [])
    return Folder(path, classes, of_train, of_test, [*notes, *left])


def list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The image files at any depth below a folder, and what was left out. Raises BadInput when there is none."""
    ignored = Counter[str]()
    if not path.is_dir():
        raise BadInput(f"there is no folder {path}")
    if not (files := _files(path, ignored, linked=True)):
        raise BadInput(f"{path}: contains no images", *_left_out(path, ignored))
    return files, _left_out(path, ignored)


def _left_out(path: Path, ignored: Counter[str]) -> list[str]:
    return [f"{path}: {what} left out: {n:,}." for what, n in ignored.items() if n]


def _parts(path: Path) -> tuple[Path, Path | None, list[str]]:
    """The folder of the training images, that of the test images if there is one, and the folders beside these; a class
    may be called train."""
    there, named = _classes(path), dict[str, list[Path]]()
    for name in sorted(there, key=lambda name: name != name.lower()):  # of train and Train it is train
        named.setdefault(name.lower(), []).append(path / name)
    trains, tests = ([part for name in names for part in named.get(name, [])] for names in (TRAINS, TESTS))
    tests.sort(key=lambda part: not _classes(part))  # those without classes are another's: test/1.jpg beside val/cat
    for train in filter(_classes, trains):
        return train, tests[0] if tests else None, [name for name in there if path / name not in (train, *tests[:1])]
    if tests and all(map(_classes, tests)):
        raise BadInput(f"{path}: has {tests[0].name}/<class>/… but no train/<class>/… beside it")
    return path, None, []


def _classes(path: Path) -> list[str]:
    try:
        names = [d.name for d in path.iterdir() if d.is_dir() and not _hidden(d.name)]
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    if odd := [name for name in names if not name.isprintable()]:
        raise BadInput(f"{path}: the name {odd[0]!r} cannot be printed: rename the folder")
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def _files(folder: Path, ignored: Counter[str], linked: bool = False) -> list[Path]:
    """The image files at any depth below a folder, sorted; counts what is left out. Unless it may be `linked` to
    others, it is that of a class. Raises BadInput."""
    found, seen = list[Path](), set[tuple[int, int]]()
    try:
        for parent, inner, names in os.walk(folder, followlinks=True, onerror=_raise):
            place = os.stat(parent)
            if (place.st_dev, place.st_ino) in seen:  # by a link to a folder above it
                inner.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            hidden = {name for name in (*inner, *names) if _hidden(name)}
            inner[:] = [name for name in inner if name not in hidden]
            if odd := [name for name in (*inner, *names) if name.encode(errors="ignore").decode() != name]:
                raise BadInput(f"{parent}: the name {odd[0]!r} is not UTF-8: rename it")
            links = [Path(parent, name) for name in inner if os.path.islink(os.path.join(parent, name))]
            for link in () if linked else links:
                to, own = link.resolve(), folder.resolve()
                if (own.parent in (to, *to.parents) and own not in (to, *to.parents)) or to in own.parents:
                    raise BadInput(f"{link}: points outside its class folder, to {to}: remove the link")
            ignored["hidden or system files"] += len(hidden)
            for name in {*names} - hidden:
                if (suffix := os.path.splitext(name)[1].lower()) in FORMATS:
                    found.append(Path(parent, name))
                else:
                    ignored[f"{suffix} files, which are not read as images,".lstrip()] += 1
    except OSError as error:
        raise BadInput(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    return sorted(found)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class may have no test images
        raise error
