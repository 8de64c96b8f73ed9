"""All runs of a folder: listed, who was made from whom, removed."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from kdcli import BadInput
from kdcli.config import Section
from kdcli.runs.directory import hold, run_in
from kdcli.runs.spec import COMMANDS, Status


class Listed(Section):
    """What `kd runs` says of a run directory; one that cannot be read is damaged."""

    run: str
    status: Status | Literal["damaged"]
    errors: int | None = None
    parents: list[str] = []
    epoch: int | None = None
    epochs: int | None = None
    bytes: int = 0
    age_s: int = 0


def survey(root: Path) -> list[Listed]:
    """What `kd runs` lists: every run directory below `root`, those included that cannot be read."""
    root, found = Path(os.path.abspath(root)), []
    for folder in sorted(folder for command in COMMANDS for folder in root.glob(f"*/{command}/*/")):
        files = {}
        with contextlib.suppress(OSError):  # it may be removed meanwhile
            for file in folder.iterdir():
                with contextlib.suppress(OSError):
                    files[file.name] = file.stat()
        status = "damaged" if files.keys() - {"lock"} else "missing"
        one: dict[str, Any] = {"run": str(folder.relative_to(root)), "status": status}
        with contextlib.suppress(BadInput, OSError):
            run = run_in(folder)
            train, result = run.spec.train, run.finished()
            more = {"epoch": len(run.metrics()), "epochs": train.epochs} if train else {}
            errors = result.test.errors if result and result.test.total else None
            one |= {"parents": run.spec.parents, "status": run.status(), "errors": errors} | more
        age = time.time() - max((file.st_mtime for file in files.values()), default=time.time())
        found.append(Listed(**one, bytes=sum(file.st_size for file in files.values()), age_s=round(age)))
    return found


def dependents(listed: Sequence[Listed], names: Sequence[str]) -> list[str]:
    """The runs that were made from those named, or from runs made from them, themselves not named."""
    reached = set(names)
    while more := {one.run for one in listed if reached & set(one.parents)} - reached:
        reached |= more
    return sorted(reached - set(names))


def remove(folders: Sequence[Path]) -> None:
    """Delete run directories, in order. Raises BadInput when a kd is writing one, before any is deleted, or when the
    system does not let one go."""
    with contextlib.ExitStack() as held:
        try:
            for folder in folders:
                if not os.access(folder.parent, os.W_OK | os.X_OK):
                    raise BadInput(f"{folder}: cannot be removed: {os.strerror(errno.EACCES)}; nothing was removed")
                lock = folder / "lock"
                if lock.is_file() and not hold(held.enter_context(lock.open("a")).fileno()):
                    raise BadInput(f"{folder}: is being written by a kd: stop that first; nothing was removed")
            for folder in folders:
                with contextlib.suppress(OSError):  # first: what is half removed is not completed
                    (folder / "result.json").unlink()
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # not empty
                    folder.parent.rmdir()
                    folder.parent.parent.rmdir()
        except OSError as error:
            raise BadInput(f"{error.filename}: cannot be removed: {error.strerror}") from None
