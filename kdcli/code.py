"""Code that is not kd's: a Python file that an experiment names (`nets.py:make`), run and told apart by its content;
libraries that may not be installed."""

import contextlib
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kdcli import BadInput


def digest(reference: str) -> str:
    """The sha256 of the file of `file.py:function`. Raises BadInput when it cannot be read."""
    path = Path(reference.rpartition(":")[0])
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


@lru_cache
def _module(path: str, content: str) -> ModuleType:
    """The module in a file, run once for each content of it."""
    module = ModuleType(f"kd_{content[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where a class defined in it looks for itself
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), module.__dict__)
    return module


def unchanged(reference: str, content: str | None) -> bool:
    """Whether the file of `file.py:function` is there and has this sha256."""
    return Path(reference.rpartition(":")[0]).is_file() and digest(reference) == content


def function(reference: str) -> Callable[..., Any]:
    """The function of `file.py:function`. Raises BadInput when it is not there or its file fails, with its line."""
    path, _, name = reference.rpartition(":")
    with quiet(), blaming(path, path):
        found: Callable[..., Any] | None = getattr(_module(path, digest(reference)), name, None)
        if not callable(found):
            raise BadInput(f"{path}: has no function {name}")
        return found


def call(reference: str, /, **arguments: Any) -> Any:
    """What the function of `file.py:function` returns. Raises BadInput when it is not there or fails, with its line."""
    path = reference.rpartition(":")[0]
    with quiet(), blaming(path, path):  # a call with the wrong arguments has no line of the file
        return function(reference)(**arguments)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what somebody's code prints to stderr, past sys.stdout too: stdout is for kd's own document."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(own, 1)
        os.close(own)


@contextlib.contextmanager
def blaming(path: str, otherwise: str = "") -> Iterator[None]:
    """Raise what fails in somebody's file as BadInput with the line of that file; other failures pass or, with
    `otherwise`, are BadInput that begins so."""
    try:
        yield
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename in (path, None):  # None: of a file with a zero byte
            lines.append(error.lineno or 1)
        text = " ".join(str(error).split())
        said = f"{type(error).__name__}{f': {text}' if text else ''}"
        if not lines and not otherwise:
            raise
        raise BadInput(f"{path}:{lines[-1]}: {said}" if lines else f"{otherwise}: {text or said}") from error


def library(name: str, extra: str = "onnx") -> Any:
    """A module of an extra. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"{name} is not installed: pip install 'kdcli[{extra}]'") from None
