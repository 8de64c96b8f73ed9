"""The cache: what is slow to read is decoded once, shard by shard, in processes here or on a cluster, into files that
are then mapped into memory."""

import errno
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress

from kdcli import BadInput, cache_folder, counted
from kdcli.data.images import T, Work, in_processes, open_image, refuse, to_bytes
from kdcli.machine.cluster import Cluster

SHARD = 10_000  # images that an interrupted kd decodes anew, at most; a task on a cluster
Array = NDArray[Any]


def free() -> str:
    """Where the cache lies, and the room there."""
    there = next(folder for folder in (cache_folder(), *cache_folder().parents) if folder.exists())
    return f"in {cache_folder()}, where {decimal(shutil.disk_usage(there).free)} are free"


def entry(key: str, make: Callable[[Path], None]) -> Path:
    """The folder of the cache with what a source was decoded into; the first time, or where it is damaged, it is made,
    aside, where an interrupted kd left what the next one goes on with. Raises BadInput when it cannot be written."""
    cache = cache_folder()
    folder, aside = cache / key, cache / f"{key}.part"
    if _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{key}.lock"):
            if not _is_whole(folder):
                aside.mkdir(exist_ok=True)
                try:
                    make(aside)
                except BadInput:
                    shutil.rmtree(aside, ignore_errors=True)  # files that are made good make another key
                    raise
                shutil.rmtree(folder, ignore_errors=True)
                aside.replace(folder)
    except OSError as error:
        where = f"decoded images go to {cache}; XDG_CACHE_HOME names another folder"
        raise BadInput(f"{error.filename or cache}: {error.strerror}: {where}") from None
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Whoever makes the same folder of the cache waits until it is made. The processes that decode have the lock too:
    where the one that waits for them is killed, they end first."""
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another kd decodes these images: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_whole(folder: Path) -> bool:
    """Whether a source was decoded into a folder, and its files are those that were written."""
    try:
        files = json.loads((folder / "facts.json").read_text())["files"]
        return bool(files) and all(written(folder / name) == before for name, before in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def keep(folder: Path, about: dict[str, Any]) -> None:
    """Write, last of all, what the decoded images in a folder are, and what tells whether its files are whole."""
    files = {file.name: written(file) for file in folder.iterdir() if file.name != "facts.json"}
    (folder / "facts.json").write_text(json.dumps(about | {"files": files}))


def written(file: Path) -> list[int]:
    """The size of a file and when it was written, which tell one that has changed without reading it."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def room(out: Path, what: str, count: int, shape: Sequence[int]) -> None:
    """Say how much is decoded into a folder. Raises OSError where the disk has too little room for it."""
    needed, left = count * math.prod(shape), shutil.disk_usage(out).free
    if needed - sum(file.stat().st_blocks * 512 for file in out.glob("x*.npy")) > left:
        line = f"{counted(count, 'image')} of {what} take {decimal(needed)}, and the disk has {decimal(left)} left"
        raise OSError(errno.ENOSPC, line, str(out.parent))
    print(f"{what}: decoding {counted(count, 'image')}, once: {decimal(needed)} {free()}", file=sys.stderr)


class Form(NamedTuple):
    """What images are decoded to."""

    shape: list[int]  # [C, H, W]
    size: int | None  # None: they have this shape
    white: int = 255


def array_in(file: Path, kind: DTypeLike, shape: Sequence[int]) -> "np.memmap[Any, Any]":
    """An array in a file, of its full size from the beginning; what was written to it before is there."""
    with suppress(Exception):  # of a damaged file numpy raises many
        there = np.load(file, mmap_mode="r")  # which refuses a file that is cut; r+ would extend it
        if (there.dtype, there.shape) == (kind, tuple(shape)):
            found: np.memmap[Any, Any] = np.load(file, mmap_mode="r+")
            return found
    file.with_suffix(".done").unlink(missing_ok=True)
    np.lib.format.open_memmap(file.with_suffix(".new"), "w+", kind, tuple(shape))
    file.with_suffix(".new").replace(file)
    return array_in(file, kind, shape)


def fill(
    file: Path, items: Sequence[Any], form: Form, what: str, image: Callable[[Any], Image.Image] | None = None
) -> None:
    """Decode images into a file of bytes [N, C, H, W], shard by shard: beside it lies which of them are done. Raises
    BadInput with the images that are bad, OSError."""
    array_in(file, np.uint8, [len(items), *form.shape])
    shards = [range(len(items))[i : i + SHARD] for i in range(0, len(items), SHARD)]
    done, problems = array_in(file.with_suffix(".done"), np.uint8, [len(shards)]), list[str]()
    work = partial(_decoded, file, form, what, image or partial(open_image, least=form.size or 0))
    ray = CLUSTER.get() if image is None else None  # `image` may write in memory that processes share, and nodes do not
    spread = partial(on_cluster, ray) if ray else in_processes
    with _progress(what, len(items)) as progress:
        progress(sum(len(shard) for shard, ended in zip(shards, done, strict=True) if ended))
        for part, wrong in spread(work, items, [s for s, ended in zip(shards, done, strict=True) if not ended]):
            if isinstance(wrong, OSError):
                raise wrong
            problems += wrong
            if not problems and part.stop == shards[part.start // SHARD].stop:
                with file.open("rb") as decoded:
                    os.fsync(decoded)
                done[part.start // SHARD] = 1
                done.flush()
            progress(len(part))
    refuse(problems)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many images are decoded: on a terminal a bar, elsewhere a line a minute."""
    console, so_far, printed = Console(stderr=True), 0, time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(count: int) -> None:
            nonlocal so_far, printed
            so_far += count
            bar.advance(task, count)
            if not console.is_terminal and time.monotonic() - printed > 60:
                printed = time.monotonic()
                print(f"{what}: {so_far:,} of {total:,} images", file=sys.stderr)

        yield advance


def _decoded(
    file: Path, form: Form, what: str, image: Callable[[Any], Image.Image], start: int, items: Sequence[Any]
) -> list[str] | OSError:
    """Decode images into the rows of a file from `start` on; what is wrong with those that are bad, or with the file.
    It is written to, not mapped: of a page that two nodes map, one would write the rows of the other back as zeros."""
    (channels, height, width), problems = form.shape, list[str]()
    try:
        first, row = np.load(file, mmap_mode="r").offset, math.prod(form.shape)
        with os.fdopen(os.open(file, os.O_WRONLY), "wb", buffering=1 << 20) as out:
            out.seek(first + start * row)
            for i, item in enumerate(items, start):
                try:
                    one = to_bytes(image(item), (width, height) if form.size else None, channels, form.white)
                    if one.shape != tuple(form.shape):
                        is_, first_ = (f"{w} x {h}" for _, h, w in (one.shape, form.shape))
                        raise BadInput(f"{what}: image {i} is {is_}, the first {first_}: set data.size")
                except BadInput as error:
                    problems += error.lines
                    out.seek(row, os.SEEK_CUR)
                else:
                    out.write(one.tobytes())
    except OSError as error:
        return error
    return problems


CLUSTER: ContextVar[Any] = ContextVar("CLUSTER", default=None)  # ray, while image files are decoded there


@contextmanager
def on_ray(address: str) -> Iterator[None]:
    """Image files that are decoded in the body are so on the nodes of a Ray cluster, which share the folders. Raises
    BadInput where no cluster answers."""
    with Cluster(address).connected() as (ray, _):
        before = CLUSTER.set(ray)
        try:
            yield
        finally:
            CLUSTER.reset(before)


def on_cluster(ray: Any, work: Work[T], items: Sequence[Any], parts: Iterable[range]) -> Iterator[tuple[range, T]]:
    """What `work` makes of parts of the items, each a task of Ray's, as they end; a few wait for a core."""
    task, ahead, begun = ray.remote(lambda *part: work(*part)), iter(parts), dict[Any, range]()
    while True:
        for part in islice(ahead, max(2 * int(ray.cluster_resources()["CPU"]) - len(begun), 0)):
            begun[task.remote(part.start, items[part.start : part.stop])] = part
        if not begun:
            return
        (ended,), _ = ray.wait([*begun])
        yield begun.pop(ended), ray.get(ended)
