"""Where images come from. Each source gives arrays of bytes (or, of a table, floats), labels and the names of
the classes."""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdcli import BadInput, BadKeys, code, failure
from kdcli.config import Data, nearest
from kdcli.data.cache import Array, Form, array_in, entry, fill, keep, room, written
from kdcli.data.images import TESTS, Folder, Labelled, headers, list_folder, list_images
from kdcli.runs.spec import Facts

MNIST = "12176aed4628b392"  # the beginning of its fingerprint
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class Found(NamedTuple):
    """Images [N, C, H, W], bytes from 0 to `white`, or rows of a table, floats [N, columns, 1, 1]; int64 labels [N]."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: list[str]
    white: int = 255
    notes: list[str] = []  # what the reader must know of them
    listing: Path | None = None  # of the files that they are from (`listed`)


class Unlabelled(NamedTuple):
    """Images [U, C, H, W], bytes like those of training, that nobody labelled."""

    x: Array
    fingerprint: str
    known: set[int]  # the training images that are among them, by number
    notes: list[str]
    listing: Path


def read(data: Data, data_dir: Path | None, download: bool) -> tuple[Found, Facts]:
    """The images that a `data` section names, and what they are. Raises BadInput or BadKeys when they cannot be had."""
    root = Path(data_dir or os.environ.get("KD_DATA") or "data")
    with of_key(next(key for key in data.one_of if getattr(data, key))):
        return _read(data.images, _stamp(data), root, download)


def read_unlabelled(data: Data, found: Found, facts: Facts) -> Unlabelled:
    """The images of `data.unlabelled` in the shape of those found, resized to it where `data.size` is set. Raises
    BadKeys when they cannot be had."""
    channels, height, width = facts.shape
    if facts.table or channels not in (1, 3):
        what = "this is a table" if facts.table else f"those of training have {channels}"
        raise BadKeys(("data.unlabelled", f"holds image files of 1 or 3 channels, and {what}: remove it"))
    own = Path(data.unlabelled or "")
    if data.folder and own.parent == Path(data.folder) and own.name in facts.classes:
        raise BadKeys(("data.unlabelled", f"is the class {own.name} of data.folder too: move it out of {data.folder}"))
    if data.size not in (None, min(height, width)):
        what = f"must be {min(height, width)}, the shorter side of the training images, whose size is given"
        raise BadKeys(("data.size", what))
    with of_key("unlabelled"):
        files, notes = list_images(Path(data.unlabelled or ""))
        key = _seen([facts.fingerprint, data.folder, data.unlabelled, data.size], files)
        folder = entry(key[:16], lambda out: _unlabelled(data, found, facts, files, out))
        about = json.loads((folder / "facts.json").read_text())
    x = np.load(folder / "x.npy", mmap_mode="c")
    return Unlabelled(x, about["fingerprint"], {*about["known"]}, [*notes, *about["notes"]], folder / "files.json")


def _unlabelled(data: Data, found: Found, facts: Facts, files: Sequence[Path], out: Path) -> None:
    """Decode image files that nobody labelled, and write what they are, to a folder."""
    root, (_, height, width) = data.unlabelled or "", facts.shape
    sizes = [] if data.size else [(one.width, one.height) for one in headers(files)]
    if odd := [i for i, size in enumerate(sizes) if size != (width, height)]:
        one = f"{files[odd[0]]} has {' x '.join(map(str, sizes[odd[0]]))}"
        what = f"training images have {width} x {height} pixels, unlike {len(odd):,} of the unlabelled: {one}"
        raise BadKeys(("data.size", f"is missing: {what}; such as size: {min(height, width)}"))

    room(out, root, len(files), facts.shape)
    fill(out / "x.npy", files, Form(facts.shape, data.size, facts.white), root)
    x = np.load(out / "x.npy", mmap_mode="r")
    tested = [f"{data.folder}/{name}" for name in listed([found.listing])["test"]]
    pairs = duplicates(found.x_test, x)
    notes = _of_pairs(pairs, tested, [*map(str, files)], "also among the unlabelled images, pixel for pixel")
    _list(out, Path(root), unlabelled=files)
    digest = hashlib.sha256(json.dumps([x.shape, facts.white]).encode())
    known = [i for i, _ in duplicates(found.x_train, x)]
    keep(out, {"fingerprint": _hashed(digest, x), "known": known, "notes": notes})


def listed(listings: Iterable[Path | None]) -> dict[str, list[str]]:
    """The files of `train`, `test` and `unlabelled`, in the order of the images, relative to the folder that holds
    them; none of images from elsewhere."""
    found: dict[str, list[str]] = {"train": [], "test": [], "unlabelled": []}
    for listing in listings:
        found |= json.loads(listing.read_text()) if listing else {}
    return found


def _list(out: Path, root: Path, **parts: Sequence[Path]) -> None:
    """Write the files of some images for `listed`."""
    names = {part: [file.relative_to(root).as_posix() for file in files] for part, files in parts.items()}
    (out / "files.json").write_text(json.dumps(names))


@contextmanager
def of_key(key: str) -> Iterator[None]:
    """What is wrong is told of a key of the `data` section."""
    try:
        yield
    except BadKeys:
        raise
    except BadInput as error:
        raise BadKeys(*((f"data.{key}", line) for line in error.lines)) from error
    except OSError as error:
        raise BadKeys((f"data.{key}", failure(error))) from error


def _stamp(data: Data) -> str:
    """What changes when the files of a source do."""
    if data.function:
        return code.digest(data.function)
    for key, path, there in (("folder", data.folder, os.path.isdir), ("arrays", data.arrays, os.path.isfile)):
        if path and not there(path):
            raise BadKeys((f"data.{key}", f"there is no {'folder' if key == 'folder' else 'file'} {path}"))
    if data.folder:
        folder = list_folder(Path(data.folder))
        return _seen([folder.classes, folder.notes], [file for file, _ in (*folder.train, *folder.test)])
    return str(written(Path(data.arrays))) if data.arrays else ""


def _seen(about: list[Any], files: Iterable[Path]) -> str:
    """The hash of what tells files from others, and from what they were before."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for file in files:
        digest.update(json.dumps([str(file), *written(file)]).encode())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _read(how: str, stamp: str, root: Path, download: bool) -> tuple[Found, Facts]:
    data = Data.model_validate_json(how, context={"reading": True})
    if data.name == "digits":
        found = _digits()
    elif data.function:
        found = _arrays(code.call(data.function), data.function)
    else:
        there = root.absolute() if data.name else ""
        return _kept(hashlib.sha256(f"{how} {stamp} {there}".encode()).hexdigest()[:16], data, root, download)
    return found._replace(notes=_of_duplicates(found)), _facts(found)


def _kept(key: str, data: Data, root: Path, download: bool) -> tuple[Found, Facts]:
    """What a source holds, from the files that it was decoded into."""
    folder = entry(key, lambda out: _decode(data, root, download, out))
    about, listing = json.loads((folder / "facts.json").read_text()), folder / "files.json"
    facts = Facts.model_validate(about["facts"])
    more = {"white": facts.white, "notes": about["notes"], "listing": listing if listing.exists() else None}
    return _mapped(folder, facts.classes)._replace(**more), facts


def _decode(data: Data, root: Path, download: bool, folder: Path) -> None:
    """Write the arrays of a source, and what they are, to a folder."""
    if data.arrays:
        found = _npz(Path(data.arrays))
        for name in ARRAYS:
            np.save(folder / name, getattr(found, name))
    elif data.folder:
        found = _folder(data, folder)
    else:
        found = _torchvision(data, root, download, folder)
    facts = _facts(found)
    if data.name == "mnist" and not facts.fingerprint.startswith(MNIST):
        instead = "name the folder of MNIST with --data-dir or KD_DATA, or put its four files elsewhere"
        raise BadInput(f"{root}/MNIST/raw: these files are not MNIST's, which `name: mnist` means: {instead}")
    keep(folder, {"facts": facts.model_dump(), "notes": found.notes})


def _facts(found: Found) -> Facts:
    """What the images are: their fingerprint, and the mean and standard deviation of each channel."""
    shape, white, x = found.x_train.shape, found.white, found.x_train
    digest = hashlib.sha256(json.dumps([found.classes, shape, found.x_test.shape, white]).encode())
    each = x.size // shape[1]
    if x.dtype == np.uint8:  # by how often each byte is there, since squares of images take ten times as long
        values, counts = np.arange(256), np.zeros((shape[1], 256), np.int64)
        for part in np.array_split(x, len(x) // 100 + 1):
            counts += [np.bincount(part[:, c].ravel(), minlength=256) for c in range(shape[1])]
        mean = counts @ values / each
        std = np.sqrt((counts * np.square(values - mean[:, None])).sum(1) / each)
    else:
        parts = np.array_split(x, len(x) // 1_000 + 1)
        mean = sum(part.sum((0, 2, 3), np.float64) for part in parts) / each
        std = np.sqrt(sum(np.square(part - mean[:, None, None]).sum((0, 2, 3)) for part in parts) / each)
    std[std < 1e-6 * np.abs(mean)] = white  # a channel that is the same everywhere stays as it is
    return Facts(
        fingerprint=_hashed(digest, *(getattr(found, name) for name in ARRAYS)),
        classes=found.classes,
        shape=list(shape[1:]),
        white=white,
        table=x.dtype != np.uint8,
        mean=[float(f"{m:.9g}") for m in mean / white],
        std=[float(f"{s:.9g}") for s in np.where(std == 0, white, std) / white],
    )


def _hashed(digest: Any, *arrays: Array) -> str:
    """The hash of what a digest has seen and of the content of arrays, which may be larger than memory."""
    for array in arrays:
        for part in np.array_split(array, len(array) // 10_000 + 1):
            digest.update(np.ascontiguousarray(part).data)
    return str(digest.hexdigest())


def duplicates(test: Array, others: Array) -> list[tuple[int, int]]:
    """The test images that lie among others too, pixel for pixel: positions in the one and the other."""
    tested: dict[int, list[int]] = {}
    for j, row in enumerate(test):
        tested.setdefault(hash(row.tobytes()), []).append(j)
    pairs = {j: i for i, row in enumerate(others) for j in tested.get(hash(row.tobytes()), ())}
    return [(j, i) for j, i in sorted(pairs.items()) if np.array_equal(test[j], others[i])]


def _of_duplicates(found: Found, test: Labelled = (), train: Labelled = ()) -> list[str]:
    """What to say of the test images that lie in the training set too, by file or by number."""
    pairs = duplicates(found.x_test, found.x_train)
    other = sum(int(found.y_test[j] != found.y_train[i]) for j, i in pairs)
    labels = f", {other:,} of them with another label" if other else ""
    ones, others = ([str(file) for file, _ in part] for part in (test, train))
    return _of_pairs(pairs, ones, others, f"also in the training set, pixel for pixel{labels}")


def _of_pairs(pairs: Sequence[tuple[int, int]], test: Sequence[str], others: Sequence[str], where: str) -> list[str]:
    """What to say of duplicates, by the names of the files, if there are any."""
    if not pairs:
        return []
    ones = [test[j] if test else f"test image {j}" for j, _ in pairs[:5]]
    same = [others[i] if others else f"training image {i}" for _, i in pairs[:5]]
    some = "; ".join(f"{one} is {other}" for one, other in zip(ones, same, strict=True))
    more = f"; and {len(pairs) - 5:,} more" if len(pairs) > 5 else ""
    lie = "test image is" if len(pairs) == 1 else "test images are"
    return [f"{len(pairs):,} {lie} {where}: {some}{more}."]


def _digits() -> Found:
    """scikit-learn's 1,797 real digits of 8 x 8 pixels, in a fixed stratified split of 1,297 and 500."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    classes = [str(c) for c in bunch.target_names]
    test = stratified(labels, 500, classes)
    train = np.delete(np.arange(len(labels)), test)
    return Found(images[train], labels[train], images[test], labels[test], classes, white=16)


def _downloaded(name: str, root: Path, download: bool, get: Callable[[bool], Any]) -> Any:
    """What `get` gives of a dataset that is there or, if it is not and may be, is downloaded and verified."""
    problem, instead = "", f"put its files in {root}, where torchvision looks for them, or name another folder with "
    instead += f"--data-dir or KD_DATA{'; the digits experiment needs no download' if name == 'MNIST' else ''}"
    for how in (False, True) if download else (False,):
        try:
            with code.quiet():
                return get(how)
        except BadInput:
            raise
        except Exception as error:  # torchvision lets through whatever the network, the disk or gzip raised
            problem = failure(error)[:200]
            absent = isinstance(error, FileNotFoundError) or "not found" in str(error)
            if not how and not absent:
                again = "delete its files to have them downloaded again"
                raise BadInput(f"{root}: {name} is damaged or cannot be read ({problem}): {again}") from None
    if not download:
        raise BadInput(f"{root}: {name} is missing, and --dry-run downloads nothing: {instead}")
    raise BadInput(f"{root}: {name} is missing and could not be downloaded ({problem}): {instead}") from None


def _torchvision(data: Data, root: Path, download: bool, folder: Path) -> Found:
    """A dataset of torchvision's: the parts that it calls train and test (or val, or valid)."""
    from torchvision import datasets

    name = "MNIST" if data.name == "mnist" else (data.name or "").removeprefix("torchvision:")
    make, known = getattr(datasets, name, None), [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
    if name not in known or not inspect.isclass(make):
        raise BadKeys(("data.name", f"torchvision has no dataset {name}{nearest(name, known)}"))
    takes = set(inspect.signature(make.__init__).parameters)
    takes |= {"train", "download"} if "kwargs" in takes else set()  # EMNIST and QMNIST, which are kinds of MNIST
    if not takes & {"train", "split"}:
        raise BadKeys(("data.name", f"{name} has no parts train and test"))
    if ({"train", "split"} <= takes) != (data.split is not None):
        what = f"is for {name} to choose by: remove it" if data.split else f"is missing: {name} has several"
        raise BadKeys(("data.split", what))
    fixed: dict[str, Any] = {"root": str(root)} | ({"split": data.split} if data.split else {})
    classes = list[str]()
    for part, names in (("train", ["train"]), ("test", TESTS)):
        ways = [{"train": part == "train"}] if "train" in takes else [{"split": name} for name in names]

        def get(down: bool, ways: list[dict[str, Any]] = ways) -> Any:
            more = fixed | ({"download": down} if "download" in takes else {})
            for way in ways:
                try:
                    return make(**way, **more)
                except ValueError as error:
                    if not str(error).startswith("Unknown value"):
                        raise
                    wrong = str(error).rstrip(".")
            raise BadKeys(("data.split" if data.split else "data.name", wrong))

        dataset = _downloaded(name, root, download, get)
        labels = _of_dataset(dataset, name, data, folder, part)
        numbers = range(int(labels.max()) + 1)
        found = numbers if data.name == "mnist" else getattr(dataset, "classes", None) or numbers
        classes = classes or [str(c[0] if isinstance(c, tuple) else c) for c in found]
    whole = _mapped(folder, classes)
    return whole._replace(notes=_of_duplicates(whole))


def _of_dataset(dataset: Any, name: str, data: Data, folder: Path, part: str) -> Array:
    """Decode the images of a part of a dataset of torchvision's into a folder; the labels."""
    labels = array_in(folder / f"y_{part}.npy", np.int64, [len(dataset)])  # which the processes share

    def image(i: int) -> Image.Image:
        try:
            image, label = dataset[i]
        except Exception as error:
            raise BadInput(f"{name}: image {i} cannot be read: {failure(error)}") from None
        if not isinstance(image, Image.Image) or not isinstance(label, int | np.integer):
            raise BadInput(f"{name} does not give an image and the number of its class")
        labels[i] = label
        return image

    first = image(0)
    size = (data.size, data.size) if data.size else (first.height, first.width)
    form = Form([data.channels or (1 if first.mode == "L" else 3), *size], data.size)
    room(folder, name, len(dataset), form.shape)
    fill(folder / f"x_{part}.npy", range(len(dataset)), form, name, image)
    return labels


def _mapped(folder: Path, classes: list[str]) -> Found:
    """The arrays in a folder, mapped into memory: pages are read when they are used, and belong to the system."""
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="c") for name in ARRAYS]
    return Found(arrays[0], arrays[1], arrays[2], arrays[3], classes)


def _folder(data: Data, out: Path) -> Found:
    """Decode a folder of image files."""
    folder, shape = _chosen(data)
    what, form = str(folder.path), Form(shape, data.size)
    room(out, what, len(folder.train) + len(folder.test), shape)
    for part, files in (("train", folder.train), ("test", folder.test)):
        fill(out / f"x_{part}.npy", [file for file, _ in files], form, what)
        np.save(out / f"y_{part}", np.array([label for _, label in files], np.int64))
    _list(out, folder.path, train=[file for file, _ in folder.train], test=[file for file, _ in folder.test])
    found = _mapped(out, folder.classes)
    return found._replace(notes=[*folder.notes, *_of_duplicates(found, folder.test, folder.train)])


def _chosen(data: Data) -> tuple[Folder, list[int]]:
    """A folder of image files (`list_folder`), and the shape of its images; without test images of their own, a share
    of every class is taken. Raises BadInput where one cannot be read, BadKeys where they differ in size and none is
    asked for."""
    folder = list_folder(Path(data.folder or ""))
    if folder.test and data.test:
        raise BadKeys(("data.test", f"{folder.path} has test images of its own: remove the key"))
    if not folder.test:
        share, files = data.test or 0.2, folder.train
        held = set(stratified(np.array([c for _, c in files]), round(share * len(files)), folder.classes).tolist())
        train, test = ([one for i, one in enumerate(files) if (i in held) == tested] for tested in (False, True))
        notes = [f"The test images are a fixed {share:.0%} of every class of {folder.path}.", *folder.notes]
        folder = folder._replace(train=train, test=test, notes=notes)
    found = headers([file for file, _ in (*folder.train, *folder.test)])
    sizes = {(one.height, one.width) for one in found}
    if len(sizes) > 1 and not data.size:
        least, most = min(sizes, key=min), max(sizes, key=max)
        between = f"from {least[1]} x {least[0]} to {most[1]} x {most[0]}"
        raise BadKeys(("data.size", f"is missing: the images have {len(sizes):,} sizes, {between}; such as size: 64"))
    channels = data.channels or (1 if all(one.grey for one in found) else 3)
    return folder, [channels, *((data.size, data.size) if data.size else sizes.pop())]


def ahead(data: Data, data_dir: Path | None) -> tuple[int, int]:
    """How many image files a `data` section decodes, and the bytes that they become. Raises BadInput."""
    count, shape = 0, list[int]()
    if data.folder:
        with of_key("folder"):
            folder, shape = _chosen(data)
        count = len(folder.train) + len(folder.test)
    if data.unlabelled:
        shape = shape or read(data, data_dir, download=False)[1].shape
        with of_key("unlabelled"):
            count += len(list_images(Path(data.unlabelled))[0])
    return count, count * math.prod(shape)


def arrays_of(file: Path, alone: str = "an array without a name") -> dict[str, Array]:
    """The arrays of an .npz file by name; that of an .npy file is called `alone`. Raises BadInput."""
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {alone: found}
        with found as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of numpy, zlib and zipfile, a dozen kinds
        why = getattr(error, "strerror", None) or "is damaged, or of another format"
        why = "it holds objects" if "Object arrays" in str(error) else why
        raise BadInput(f"{file}: cannot be read as {file.suffix or '.npz'}: {why}") from None


def _npz(file: Path) -> Found:
    """An .npz file: x_train, y_train, x_test, y_test, or MedMNIST's train_images, train_labels, …"""
    if file.is_file() and file.suffix.lower() != ".npz":
        raise BadInput(f"{file}: data.arrays is an .npz file: np.savez writes one")
    content = arrays_of(file)
    names = dict(zip(("train_images", "train_labels", "test_images", "test_labels"), ARRAYS, strict=True))
    found = _arrays({names.get(name, name): array for name, array in content.items()}, str(file))
    left = sorted(set(content) - set(ARRAYS) - set(names) - {"classes"})
    notes = [f"{file}: {', '.join(left)} are left out."] if left else []
    return found._replace(notes=notes + _of_duplicates(found))


def _arrays(found: Any, source: str) -> Found:
    """The arrays of a mapping. Raises BadInput that names the one that is wrong."""
    if not isinstance(found, Mapping) or not set(ARRAYS) <= found.keys():
        have = (", ".join(map(str, found)) or "nothing") if isinstance(found, Mapping) else type(found).__name__
        must = "return a dictionary of" if ".py:" in source else "hold"
        raise BadInput(f"{source}: must {must} {', '.join(ARRAYS)} and, if they have names, classes, not {have}")
    (x_train, y_train), (x_test, y_test) = (_checked(source, found, part) for part in ("train", "test"))
    names = found.get("classes")
    a_list = isinstance(names, Sequence | np.ndarray) and not isinstance(names, str) and getattr(names, "ndim", 1) == 1
    if names is not None and not a_list:
        raise BadInput(f"{source}: classes must be a list of names, not {type(names).__name__}")
    if names is None and int(y_train.max()) >= len(y_train):
        holds = f"holds {y_train.max()} among {len(y_train)} labels"
        raise BadInput(f"{source}: y_train {holds}: it must hold every class from 0 to the last")
    names = range(int(y_train.max()) + 1) if names is None else names
    classes = [c.decode(errors="replace") if isinstance(c, bytes) else str(c) for c in names]
    if twice := [c for c in classes if classes.count(c) > 1]:
        raise BadInput(f"{source}: classes names {twice[0]} twice")
    if len(classes) < 2:
        has = f"one: {classes[0]}" if classes else "none"
        raise BadInput(f"{source}: needs two or more classes, and has {has}")
    if np.unique(y_train).tolist() != list(range(len(classes))):
        has = f"and has {np.unique(y_train)[:20].tolist()}, with {len(classes)} names"
        raise BadInput(f"{source}: y_train must hold every one of two or more classes, 0 to {len(classes) - 1}, {has}")
    if int(y_test.max()) >= len(classes):
        raise BadInput(f"{source}: y_test holds {y_test.max()}: training has the classes 0 to {len(classes) - 1}")
    if x_test.shape[1:] != x_train.shape[1:] or x_test.dtype != x_train.dtype:
        sizes = f"{x_train.dtype} {list(x_train.shape[1:])}, not {x_test.dtype} {list(x_test.shape[1:])}"
        raise BadInput(f"{source}: x_test must be like x_train, {sizes}")
    return Found(x_train, y_train, x_test, y_test, classes, 255 if x_train.dtype == np.uint8 else 1)


def _checked(source: str, found: Mapping[str, Any], part: str) -> tuple[Array, Array]:
    with code.blaming(source.rpartition(":")[0], f"{source}: x_{part}, y_{part}: cannot be read as arrays"):
        x, y = (np.asarray(found[f"{axis}_{part}"]) for axis in "xy")
    is_x, is_y = (f"{array.dtype} {list(array.shape)}" for array in (x, y))
    table = x.dtype.kind == "f" and x.ndim == 2
    if not x.size or not (table or (x.dtype == np.uint8 and x.ndim in (3, 4))):
        kinds = "bytes (uint8) [N, C, H, W], [N, H, W, C] or [N, H, W], or a table of floats [N, columns]"
        raise BadInput(f"{source}: x_{part} must be {kinds}, not {is_x}")
    if table:
        with np.errstate(over="ignore"):
            as_kept = x.astype(np.float32)
        for row, column in np.argwhere(~np.isfinite(as_kept))[:1]:
            value = x[row, column]
            why = "float32 does not hold that: scale the column" if np.isfinite(value) else "fill it in or leave it out"
            raise BadInput(f"{source}: x_{part} holds {value} in row {row}, column {column}: {why}")
    if y.shape == (len(x), 1):
        y = y[:, 0]
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise BadInput(f"{source}: y_{part} must be whole numbers from 0, [{len(x)}], not {is_y}")
    if (y := y.astype(np.int64)).min() < 0:  # of numbers too large for it as well
        raise BadInput(f"{source}: y_{part} must be whole numbers from 0, and holds {y.min()}")
    if table:
        x = as_kept[:, :, None, None]
    elif x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] in (1, 3) and x.shape[3] in (1, 3):
        raise BadInput(f"{source}: x_{part} {list(x.shape)} may be [N, C, H, W] or [N, H, W, C]: nothing is guessed")
    elif x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.shape[1] not in (1, 3) and x.shape[1] >= min(x.shape[2:]):
        must = "must have 1 or 3 channels or, as [N, C, H, W], fewer of them than pixels on a side"
        raise BadInput(f"{source}: x_{part} {must}, not {list(x.shape)}")
    return np.ascontiguousarray(x), y


def stratified(labels: Array, count: int, classes: Sequence[str]) -> NDArray[np.int64]:
    """Positions, ascending, of `count` samples with the classes in their shares; always the same ones. Raises BadInput
    when a class would be left without one on either side."""
    counts = np.bincount(labels, minlength=len(classes))
    present, of = int((counts > 0).sum()), f"{count} of {len(labels)} images"
    if alone := [name for name, n in zip(classes, counts.tolist(), strict=True) if n == 1]:
        raise BadInput(f"class {alone[0]} has one image: to draw a share of every class takes two of each")
    if not present <= count <= len(labels) - present:
        raise BadInput(f"{of}: must leave one of each of {present} classes, on either side")
    from sklearn.model_selection import train_test_split

    _, positions = train_test_split(np.arange(len(labels)), test_size=count, stratify=labels, random_state=0)
    share = np.bincount(labels[positions], minlength=len(classes))
    if missing := ((counts > 0) & ((share == 0) | (share == counts))).nonzero()[0].tolist():
        raise BadInput(f"{of}: class {classes[missing[0]]} is too small to have a share on either side")
    return np.sort(positions)
