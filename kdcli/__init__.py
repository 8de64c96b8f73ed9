"""kd: knowledge distillation experiments from one YAML file (Hinton, Vinyals and Dean, arXiv:1503.02531)."""

import os
from collections.abc import Callable
from pathlib import Path

__version__ = "0.2.0"
Note = Callable[[str], None]  # of a line for whoever reads the terminal


class BadInput(ValueError):
    """Something the user gave cannot be used: each line says what and where; `kd` prints them and exits with 2."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class BadKeys(BadInput):
    """Values of an experiment that cannot be used, as (dotted key, what is wrong): whoever knows the file adds the
    line."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(*(f"{key}: {message}" for key, message in problems))
        self.problems = problems


class Failed(RuntimeError):
    """Runs failed while the others went on: a line each; `kd` prints them and exits with 1."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def cache_folder() -> Path:
    """Where kd keeps what it can make or fetch anew."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kd")


def cores() -> int:
    """How many cores this process may use: fewer than there are where it was lent some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def counted(n: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def failure(error: BaseException) -> str:
    """What went wrong while running, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, (RuntimeError, BadInput)) and text else f"{type(error).__name__}: {text}"
