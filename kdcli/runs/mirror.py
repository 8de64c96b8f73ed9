"""A runs folder elsewhere, such as `--runs-dir s3://bucket/runs`: a folder here is a copy of it, which is worked in."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdcli import BadInput, cache_folder, failure
from kdcli.runs.directory import Places, hold, run_in
from kdcli.runs.spec import COMMANDS, Spec

RESULT = "result.json"


def elsewhere(address: str) -> bool:
    """Whether a runs folder is at an address of fsspec's; file:// is a path."""
    return "://" in address and not address.startswith("file://")


def folder(address: str) -> Path:
    """The folder here of a runs folder, wherever it is."""
    if not elsewhere(address):
        return Path(address.removeprefix("file://"))
    return cache_folder() / "runs" / hashlib.sha256(address.encode()).hexdigest()[:10]


@contextmanager
def _reached(address: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address, and the path there. Raises BadInput for all that goes wrong with it."""
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(address, use_listings_cache=False)
        yield fs, path.rstrip("/")
    except ImportError as error:
        raise BadInput(f"--runs-dir {address}: {failure(error)}: pip install 'kdcli[s3]'") from None
    except FileNotFoundError:
        raise BadInput(f"--runs-dir {address}: there is no such bucket or folder") from None
    except Exception as error:  # each library has its own
        raise BadInput(f"--runs-dir {address}: {failure(error)}") from None


def pull(address: str, name: str = "") -> None:
    """Make all runs here, or one, what they are there, but those that a kd on this machine is writing."""
    root = folder(address)
    root.mkdir(parents=True, exist_ok=True)
    with _reached(address) as (fs, there):
        fs.info(there.split("/")[0] or "/")  # a bucket that is not there would pass for an empty one
        found = {path: at["size"] for path, at in fs.find(f"{there}/{name}".rstrip("/"), detail=True).items()}
        runs = {str(lock.parent.relative_to(root)): dict[str, int]() for lock in root.glob(f"{name or '*/*/*'}/lock")}
        for path, size in found.items():
            run, _, file = path.removeprefix(f"{there}/").rpartition("/")
            if run.count("/") == 2 and run.split("/")[1] in COMMANDS:
                runs.setdefault(run, {})[file] = size
        for run, sizes in sorted(runs.items()):
            (root / run).mkdir(parents=True, exist_ok=True)
            with (root / run / "lock").open("a") as lock:
                if hold(lock.fileno()):
                    _make_alike(fs, f"{there}/{run}", root / run, sizes)


def _make_alike(fs: Any, there: str, run: Path, sizes: dict[str, int]) -> None:
    """Make a run here what it is there, where its files have these sizes; or there what it is here, where that went
    wrong half-way."""
    result, finished = run / RESULT, False
    with suppress(BadInput):  # it is not there, or damaged
        finished = run_in(run).finished() is not None
    if not sizes:  # another kd has removed it
        shutil.rmtree(run)
    elif finished and (RESULT not in sizes or b'"completed"' not in fs.cat_file(f"{there}/{RESULT}")):
        _put(fs, run, there)
    elif not finished or sizes.get(RESULT) != result.stat().st_size:
        for file in sorted(sizes, key=_order):
            fs.get_file(f"{there}/{file}", f"{run / file}.tmp")
            os.replace(f"{run / file}.tmp", run / file)


def _order(file: str) -> int:
    return {"state": 1, RESULT: 2}.get(file, 0)  # copied after what they speak of


def _put(fs: Any, run: Path, there: str) -> None:
    fs.makedirs(there, exist_ok=True)
    files = [file.name for file in run.iterdir() if file.is_file() and file.suffix != ".tmp"]
    for file in sorted((file for file in files if file not in ("lock", "state.previous")), key=_order):
        fs.put_file(str(run / file), f"{there}/{file}")
    if RESULT in files and "state" not in files and fs.exists(f"{there}/state"):
        fs.rm_file(f"{there}/state")


def send(address: str, run: Path) -> None:
    """Copy the files of a run, or of a report, to where they belong."""
    with _reached(address) as (fs, there):
        _put(fs, run, f"{there}/{run.relative_to(folder(address))}")


def remove(address: str, name: str) -> None:
    with _reached(address) as (fs, there), suppress(FileNotFoundError):
        fs.rm(f"{there}/{name}", recursive=True)


@contextmanager
def mirrored(spec: Spec, places: Places, tell: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """While a run is trained: first fetch it and what it is made from; send what it saves, when an epoch is told, and
    what it becomes."""
    if not places.remote:
        yield tell
        return
    asked, run, sent = [*spec.parents], places.runs_dir / spec.name, set[int]()
    for name in asked:
        pull(places.remote, name)
        asked += places.open(name).spec.parents
    pull(places.remote, spec.name)

    def told(*epoch: Any) -> None:
        tell(*epoch)
        stamp = (run / "state").stat().st_mtime_ns if (run / "state").exists() else 0
        if stamp not in sent:
            sent.add(stamp)
            send(places.remote, run)

    try:
        yield told
    except Exception:
        send(places.remote, run)
        raise
    send(places.remote, run)
