"""A teacher that is a file of its answers, logits or probabilities for the images: read, checked and put in order."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcli import BadInput
from kdcli.data.cache import Array
from kdcli.data.sources import arrays_of

PARTS = {"train": "training", "test": "test", "unlabelled": "unlabelled"}
KEYS = {"file": "_files", "index": "_index", "split": ""}  # columns of a table that are no classes, and their arrays
TINY = float(np.finfo(np.float32).tiny)  # what a probability of 0 counts as: float32 has underflowed there
CLOSE = 1e-3  # a row of probabilities sums to 1 up to this: float16 and four decimals of a hundred classes do
Files = Mapping[str, Sequence[str]]  # of the images of each part, by their paths below the folder of the data


class Answers(NamedTuple):
    """What a file says of the images of each part that it has rows for: float32 logits [images, classes], the classes
    in the order of the data; and how it was read, a sentence each."""

    logits: dict[str, Tensor]  # `train` always
    said: list[str]


def read_answers(
    file: Path, sizes: Mapping[str, int], classes: Sequence[str], order: Sequence[str] | None, files: Files
) -> Answers:
    """The answers in an .npz, .npy, .csv or .parquet file for so many images of each part: `train`, `test` and, where
    the data have them, `unlabelled`. `classes` are those of the data; `order` names the columns of a file that does not
    (or otherwise); `files` are none where the data are no files. Raises BadInput for a file that cannot be read, or
    does not give each image of a part one finite answer."""
    kind = file.suffix.lower()
    if kind not in (".npz", ".npy", ".csv", ".parquet"):
        raise BadInput(f"{file}: must be an .npz, .npy, .csv or .parquet file")
    try:
        arrays = arrays_of(file, "train") if kind in (".npz", ".npy") else _by_part(*_table(file), files)
        return _understood(arrays, {part: n for part, n in sizes.items() if n}, classes, order, files)
    except BadInput as error:
        raise BadInput(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None


def _table(file: Path) -> tuple[list[str], list[Sequence[Any]]]:
    """The names of the columns of a table, and the columns."""
    try:
        if file.suffix.lower() == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as text:
                header, *rows = filter(None, csv.reader(text, skipinitialspace=True, strict=True))
        else:
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as opened:
                table = opened.read()
            return table.column_names, [column.to_numpy() for column in table.columns]
    except ImportError:
        raise BadInput("takes pyarrow, which is not installed: pip install pyarrow") from None
    except Exception as error:  # of csv, the text's encoding and pyarrow, a dozen kinds
        why = getattr(error, "strerror", None) or "is empty, damaged, or of another format"
        raise BadInput(f"cannot be read as {file.suffix}: {why}") from None
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise BadInput(f"row {i} has {len(row)} fields, and the header {len(header)}: it may be cut off")
    return header, [*zip(*rows, strict=True)] or [()] * len(header)


def _by_part(names: Sequence[str], columns: Sequence[Sequence[Any]], files: Files) -> dict[str, Array]:
    """The columns of a table as the arrays of an .npz file."""
    rows, keys = len(columns[0]) if columns else 0, {n: c for n, c in zip(names, columns, strict=True) if n in KEYS}
    if {"file", "index"} <= keys.keys():
        raise BadInput("tells whose its rows are twice, by file and by index: remove a column")
    own = [name for name in names if name not in KEYS]
    numbers = [_floats(c) for name, c in zip(names, columns, strict=True) if name not in KEYS]
    values = np.array(numbers, np.float64).reshape(len(own), rows).T
    parts = [str(part) for part in keys.get("split", ["train"] * rows)]
    if "file" in keys and "split" not in keys:
        parts = [part for part, _ in _found(keys["file"], files)]
    for i, part in enumerate(parts):
        if part not in PARTS:
            raise BadInput(f"row {i}, column split: must be {', '.join(PARTS)}, not {part!r}")
    arrays, of = {"classes": np.array(own, str)}, np.array(parts, str)
    for part in ["train", *sorted({*parts} - {"train"})]:
        arrays[part] = values[of == part]
        for key in keys.keys() - {"split"}:
            whose = np.array(keys[key], str) if key == "file" else _floats(keys[key])
            arrays[part + KEYS[key]] = whose[of == part]
    return arrays


def _floats(column: Sequence[Any]) -> Array:
    """A column of numbers, float64; what is none is NaN, whose place is told with that of others."""

    def one(field: Any) -> float:
        try:
            return float(field)
        except (ValueError, TypeError):
            return np.nan

    try:
        return np.asarray(column, np.float64)
    except (ValueError, TypeError):
        return np.array([one(field) for field in column])


def _understood(
    arrays: dict[str, Array],
    sizes: Mapping[str, int],
    classes: Sequence[str],
    order: Sequence[str] | None,
    files: Files,
) -> Answers:
    """The answers in the arrays of an .npz file, for parts that all have images."""
    if "train" not in arrays:
        have = ", ".join(arrays) or "nothing"
        raise BadInput(f"must hold train [{sizes['train']}, {len(classes)}], one row per training image, not {have}")
    columns, logits, said = _columns(arrays.get("classes"), classes, order), dict[str, Tensor](), list[str]()
    pick = [columns.index(name) for name in classes] if columns else list(range(len(classes)))
    if not columns:
        said.append("Its columns have no names: they are taken to be the classes of the data, in their order.")
    elif more := [name for name in columns if name not in classes]:
        said.append(f"Its columns {_some(more)} are not classes of the data and are left out.")
    for part in (part for part in PARTS if part in sizes):
        if part not in arrays:
            said.append(f"It has no answers for the {sizes[part]:,} {PARTS[part]} images.")
            continue
        rows, how = _logits(part, arrays, columns, pick)
        logits[part] = torch.from_numpy(_ordered(part, rows, arrays, sizes[part], files))
        said.append(f"Of the {PARTS[part]} images it holds {how}.")
    used = {"classes", *(f"{part}{of}" for part in logits for of in ("", "_classes", "_index", "_files"))}
    if others := [name for name in arrays if name not in used]:
        said.append(f"Ignored: its {_some(others)}.")
    return Answers(logits, said)


def _columns(own: Array | None, classes: Sequence[str], order: Sequence[str] | None) -> list[str] | None:
    """The names of the columns: the file's own or, where these are no classes of the data, those given; None: none."""
    names = list(order) if order else None
    if own is not None:
        mine = _words(own)
        if names and len(mine) != len(names):
            raise BadInput(f"has {len(mine)} classes, and teacher.classes {len(names)}: name each of them")
        if names and mine != names and set(classes) <= set(mine):
            raise BadInput(f"names its columns {_some(mine)}, and teacher.classes {_some(names)}: remove that key")
        names = names or mine
    if names is None:
        return None
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise BadInput(f"has more than one column {_some(twice)}: give each class one")
    if missing := [name for name in classes if name not in names]:
        have = f"has columns {_some(names)}" if names else "has no columns"
        raise BadInput(f"{have} and none for the classes {_some(missing)}: name them, in order, in teacher.classes")
    return names


def _logits(
    part: str, arrays: Mapping[str, Array], columns: Sequence[str] | None, pick: Sequence[int]
) -> tuple[Array, str]:
    """The rows of a part as float32 logits of the data's classes, at `pick` among the columns; what they were."""
    rows, numbers, width = arrays[part], arrays.get(f"{part}_classes"), len(columns or pick)
    if numbers is not None and not columns:
        raise BadInput(f"{part}_classes number the classes: name these in an array classes, or in teacher.classes")
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or (numbers is None and rows.shape[1] != width):
        instead = "" if columns else "; teacher.classes names the columns where it knows more classes"
        raise BadInput(f"{part} must be numbers [images, {width}], one column per class, not {_kind(rows)}{instead}")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32, copy=False)
    for row, column in np.argwhere(~np.isfinite(rows))[:1].tolist():
        name = columns[column] if columns and numbers is None else column
        raise BadInput(f"{part}, row {row}, column {name}: is not a finite number: every image needs its answer")
    if numbers is not None:
        how = f"the log-probabilities of {rows.shape[1]} classes each; the others share evenly what these leave"
        return _spread(part, rows, numbers, width)[:, pick], how
    probabilities, rows = _are_probabilities(part, rows, pick), rows[:, pick]
    if not probabilities:
        return rows, "logits"
    zeros = int((rows < TINY).sum())
    counted = f", with {TINY:.2g} for {zeros:,} that are 0" if zeros else ""
    return np.log(np.maximum(rows, TINY)), f"probabilities, whose logarithm is taken{counted}"


def _spread(part: str, log_p: Array, numbers: Array, width: int) -> Array:
    """Log-probabilities [images, width] from those [images, k] of the classes that are numbered."""
    if numbers.shape != log_p.shape or numbers.dtype.kind not in "iu":
        raise BadInput(f"{part}_classes must be whole numbers {list(log_p.shape)}, as {part} is, not {_kind(numbers)}")
    twice = (np.diff(np.sort(numbers, 1), axis=1) == 0).any(1)
    for row in (twice | ((numbers < 0) | (numbers >= width)).any(1)).nonzero()[0][:1].tolist():
        must = f"must number different classes, 0 to {width - 1}"
        raise BadInput(f"{part}_classes, row {row}: {must}, not {', '.join(map(str, numbers[row].tolist()))}")
    sums = np.exp(log_p.astype(np.float64)).sum(1)
    for row in (sums > 1 + CLOSE).nonzero()[0][:1].tolist():
        raise BadInput(f"{part}, row {row}: must be log-probabilities, but what they stand for sums to {sums[row]:g}")
    rest = np.log(np.maximum((1 - sums) / max(width - log_p.shape[1], 1), TINY))
    rows = np.repeat(rest[:, None].astype(np.float32), width, 1)
    np.put_along_axis(rows, numbers.astype(np.int64), log_p, 1)
    return rows


def _are_probabilities(part: str, rows: Array, pick: Sequence[int]) -> bool:
    """Whether rows are probabilities, not logits. Raises BadInput for what is likely to be neither: as logits it would
    teach next to nothing, and nobody would see why."""
    sums, classes = rows.sum(1, dtype=np.float64), rows[:, pick]
    percent = bool((np.abs(sums - 100) <= 100 * CLOSE).all())
    if not rows.size or classes.min() < -CLOSE or (classes.max() > 1 + CLOSE and not percent):
        return False
    off = np.abs(sums - 1)
    if bad := int((off > CLOSE).sum()):
        what = f"its values are like probabilities, but the sums of {bad:,} of {len(rows):,} rows are not 1"
        instead = "divide each row by its sum; were they logits, subtract 100 from all, which changes no softmax"
        raise BadInput(f"{part}: {what}, at worst {sums[off.argmax()]:g} in row {off.argmax()}: {instead}")
    return True


def _ordered(part: str, rows: Array, arrays: Mapping[str, Array], size: int, files: Files) -> Array:
    """Rows in the order of the images, of which each has one."""
    paths, names, index = files.get(part, ()), arrays.get(f"{part}_files"), arrays.get(f"{part}_index")
    whose = index if names is None else names
    if whose is None:
        if len(rows) != size:
            instead = f"say whose they are, by {part}_index or {part}_files (in a table by index or file)"
            raise BadInput(f"{part} has {len(rows):,} rows for {size:,} {PARTS[part]} images: {instead}")
        return np.ascontiguousarray(rows)
    if whose.shape != rows.shape[:1] or (names is None and whose.dtype.kind not in "iuf"):
        kind = f"_index must be numbers [{len(rows)}]" if names is None else f"_files must be names [{len(rows)}]"
        raise BadInput(f"{part}{kind}, one per row, not {_kind(whose)}")
    index = whose if names is None else np.array([i for _, i in _found(_words(names), {part: paths})])
    for row in (~((index >= 0) & (index < size) & (index == np.round(index)))).nonzero()[0][:1].tolist():
        raise BadInput(f"{part}, row {row}: is of image {index[row]:g}: the {PARTS[part]} images are 0 to {size - 1}")
    index = index.astype(np.int64)
    times = np.bincount(index, minlength=size)
    for what, images in (("more than one row", (times > 1).nonzero()[0]), ("no row", (times == 0).nonzero()[0])):
        if len(images):
            some = _some([paths[i] if paths else f"image {i}" for i in images.tolist()])
            raise BadInput(f"{len(images):,} of the {size:,} {PARTS[part]} images have {what}: {some}: give each one")
    ordered = np.empty_like(rows)
    ordered[index] = rows
    return ordered


def _found(names: Sequence[str], files: Files) -> list[tuple[str, int]]:
    """The images of files, by their path below the folder of the data or, where one alone has it, their name."""
    places = {path: (part, i) for part, paths in files.items() for i, path in enumerate(paths)}
    if not places:
        raise BadInput("names its images by file, and the data are none: number them, from 0, by index")
    times = Counter(path.rpartition("/")[2] for path in places)
    alone = {path.rpartition("/")[2]: place for path, place in places.items()}
    for row, name in enumerate(names):
        if name not in places and times[name] != 1:
            some = next(iter(places))
            what = f"{times[name]} images are called {name}" if times[name] else f"there is no image {name}"
            raise BadInput(f"row {row}: {what}: give its path within the data folder, such as {some}")
    return [places.get(name) or alone[name] for name in names]


def _words(names: Array) -> list[str]:
    return [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.ravel().tolist()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _kind(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"
