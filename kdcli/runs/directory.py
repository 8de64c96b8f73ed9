"""Run directories: `runs/<experiment>/<command>/<seed>-<hash>/`, one for each distinct thing that can be trained.

    config.yaml          what the run is: the Spec that the hash is taken of
    environment.json     versions, device, threads, command line, git commit
    metrics.jsonl        one line an epoch; where tensorboard is installed, events.out.tfevents.… hold the same
    state                and state.previous, while it trains: the training state to continue from
    weights.safetensors  and logits.safetensors (of the test images; mostly of the training images too)
    result.json          the status, the errors, the checksums of the files above; completed runs are never overwritten

A file is written aside and renamed, so that it is whole or absent. Reading executes no code, but a spec
may name a file of somebody's own that a later command calls (docs/security.md).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import ValidationError

from kdcli import BadInput, Note, __version__, cores, failure
from kdcli.config import nearest
from kdcli.runs.spec import COMMANDS, RESULT, SCHEMA, TEACHERS, Epoch, Result, Spec, Status, Unfinished

if TYPE_CHECKING:
    from torch import Tensor

SAVE_EVERY = 30.0  # seconds of training, and the rest of an epoch, that an interruption may cost
ONNX = "net.onnx"  # of a teacher that is one
READER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # six times as fast where PyYAML has it
STATES = ("state", "state.previous")  # the newest first


class Diverged(RuntimeError):
    """The loss of a training, or what its net says, is not finite."""


class Places(NamedTuple):
    """Where and how to work; none of it changes what a run is."""

    runs_dir: Path
    data_dir: Path | None = None  # left out: $KD_DATA, else data
    device: str = "cpu"
    threads: int = 1
    save_every: float = SAVE_EVERY
    remote: str = ""  # the address of which runs_dir is a copy

    def open(self, name: str, flag: str = "") -> "Run":
        return open_run(self.runs_dir, name, flag)


class State(NamedTuple):
    """Where a training continues: the epochs done, and the tensors after them."""

    epochs: int
    tensors: "dict[str, Tensor]"


@dataclass(frozen=True)
class Run:
    """One run directory, finished, half-way or not there yet."""

    root: Path
    spec: Spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def remedy(self) -> str:
        return remedy(self.path)

    def read(self) -> Result | Unfinished:
        """What result.json says; an absent one says that the run is missing. Raises BadInput when it is damaged."""
        path = self.path / "result.json"
        if not path.exists():
            return Unfinished(status="missing", run=self.name)
        with contextlib.suppress(OSError, ValidationError):
            found = RESULT.validate_json(path.read_bytes())
            if isinstance(found, Unfinished) or found.checksum == found.digest():
                return found
        raise BadInput(f"{path}: is damaged or edited: {self.remedy}")

    def finished(self) -> Result | None:
        """The result of a completed run; None of another. Raises BadInput when it is damaged."""
        found = self.read()
        return found if isinstance(found, Result) else None

    def result(self, role: str = "used") -> Result:
        """The result of a completed run. Raises BadInput, which says that it cannot be `role`, when it is not."""
        if found := self.finished():
            return found
        status, command = self.status(), self.environment().get("command_line")
        remedy = f"train it first{f': {command}' if command else ''}"
        if status == "diverged":
            remedy = "lower its lr, or add a warmup"
        raise BadInput(f"{self.name}: {'has' if status == 'diverged' else 'is'} {status}: cannot be {role}; {remedy}")

    def counted(self, role: str) -> Result:
        """The result of a completed run whose errors were counted. Raises BadInput as `result` does, and of a teacher
        that has no answers for the test images."""
        found = self.result(role)
        if not found.test.total:
            raise BadInput(f"{self.name}: has no answers for the test images: it cannot be {role}")
        return found

    def status(self) -> Status:
        """How far the run is; one whose process died is interrupted."""
        status = self.read().status
        if status == "running":
            with contextlib.suppress(OSError), (self.path / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return "interrupted"
        return status

    @contextlib.contextmanager
    def writing(self, device: str, threads: int, parents: dict[str, str]) -> Iterator[None]:
        """Hold the run for writing, all of it anew but what it can continue from; the status is right however the body
        ends. `parents`: the checksums of the weights that it is made from. Raises BadInput when another process holds
        it, or when it was begun with other weights of its parents."""
        with self._locked():
            before = self.read()
            if isinstance(before, Result):
                raise BadInput(f"{self.name}: was finished by another kd in the meantime; repeat the command to see it")
            if any((self.path / name).exists() for name in STATES) and before.parents != parents:
                raise BadInput(f"{self.name}: was begun with other weights than its teacher has now: {self.remedy}")
            begun = Unfinished(status="running", run=self.name, parents=parents)
            self._write_result(begun)
            config = {"schema": SCHEMA} | self.spec.model_dump(exclude_none=True)
            write_aside(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
            record = json.dumps(environment(device, threads), indent=1) + "\n"
            write_aside(self.path / "environment.json", record.encode())
            try:
                yield
            except BaseException as error:
                status = "failed" if isinstance(error, Exception) else "interrupted"
                how = {"status": "diverged" if isinstance(error, Diverged) else status, "error": failure(error)}
                with contextlib.suppress(OSError):  # of a full disk the error itself is the one to tell
                    if self.read() == begun:
                        self._write_result(begun.model_copy(update=how))
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the directory, which is made if it is not there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a")
        except OSError as error:
            where = f"--runs-dir {self.root}: cannot be written"
            raise BadInput(f"{where}: {error.filename}: {error.strerror}") from None
        with lock:
            if not hold(lock.fileno()) or not os.fstat(lock.fileno()).st_nlink:  # without a link it is being removed
                raise BadInput(f"{self.name}: is being written by another kd; wait for it, or change a setting")
            yield

    def check_writable(self) -> None:
        """Raise BadInput where the directory cannot be made or written; it is not made."""
        folder = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            why = os.strerror(errno.EACCES if folder.is_dir() else errno.ENOTDIR)
            raise BadInput(f"--runs-dir {self.root}: cannot be written: {folder}: {why}")

    def save_state(self, state: State) -> None:
        """Keep the training state, whole or not at all, and the one before it."""
        import torch

        content = _packed(state.tensors | {"epoch": torch.tensor(state.epochs)})
        newest, previous = (self.path / name for name in STATES)
        write_aside(newest, hashlib.sha256(content).digest() + content, keep=previous)

    def load_state(self, note: Note) -> State:
        """Where training continues, with the metrics cut back to there. Of a damaged state it is noted, and the one
        before is used."""
        from safetensors.torch import load

        log = self.path / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        for path in filter(Path.exists, [self.path / name for name in STATES]):
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                tensors = load(content[32:])
                epochs = int(tensors.pop("epoch"))
                if len(lines) >= epochs and lines[epochs - 1].endswith(b"\n"):
                    write_aside(log, b"".join(lines[:epochs]))
                    return State(epochs, tensors)
            note(f"{path}: is damaged and not used")
        if lines:
            note(f"{self.name}: restarted from epoch 0: no training state was found")
        write_aside(log, b"")
        return State(0, {})

    @contextlib.contextmanager
    def tensorboard(self) -> Iterator[Callable[[Epoch], None]]:
        """How to show an epoch in TensorBoard, where it is installed; those before a continuation are shown anew."""
        for old in self.path.glob("events.out.tfevents.*"):
            old.unlink()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            yield lambda _: None
            return
        with contextlib.closing(SummaryWriter(str(self.path), flush_secs=10)) as writer:

            def show(epoch: Epoch) -> None:
                for key, value in epoch.model_dump(exclude_none=True, exclude={"epoch"}).items():
                    writer.add_scalar(key, value, epoch.epoch)

            for epoch in self.metrics():
                show(epoch)
            yield show

    def log(self, epoch: Epoch) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(epoch.model_dump_json(exclude_none=True) + "\n")

    def metrics(self) -> list[Epoch]:
        """The epochs in metrics.jsonl. Raises BadInput when it is damaged."""
        path = self.path / "metrics.jsonl"
        if not path.exists() and not (self.spec.train and self.finished()):
            return []
        try:
            return [Epoch.model_validate_json(line) for line in self.content(path.name).splitlines()]
        except ValidationError:
            raise BadInput(f"{path}: is damaged: {self.remedy}") from None

    def save(self, kind: str, tensors: "dict[str, Tensor]") -> None:
        """Write `<kind>.safetensors`."""
        write_aside(self.path / f"{kind}.safetensors", _packed(tensors))

    def load(self, kind: str) -> "dict[str, Tensor]":
        """The tensors of `<kind>.safetensors`. Raises BadInput unless the run is completed and the file as it was."""
        from safetensors.torch import load

        self.result()
        return load(self.content(f"{kind}.safetensors"))

    def content(self, name: str) -> bytes:
        """The content of a file. Raises BadInput when it cannot be read or, of a completed run, is not as it was."""
        path, result = self.path / name, self.finished()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror}): {self.remedy}") from None
        if result and hashlib.sha256(content).hexdigest() != result.sha256.get(name):
            raise BadInput(f"{path}: is damaged or truncated (its checksum differs): {self.remedy}")
        return content

    def finish(self, result: Result) -> None:
        """Write, last of all, the result that makes the run completed."""
        files = [*sorted(self.path.glob("*.safetensors")), *self.path.glob("metrics.jsonl"), *self.path.glob(ONNX)]
        checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        result = result.model_copy(update={"sha256": checksums})
        self._write_result(result.model_copy(update={"checksum": result.digest()}))
        for state in self.path.glob("state*"):
            state.unlink()

    def environment(self) -> dict[str, Any]:
        """The record of where and by what the run was made; empty when it is gone or damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            return dict(json.loads((self.path / "environment.json").read_text()))
        return {}

    def _write_result(self, document: Result | Unfinished) -> None:
        write_aside(self.path / "result.json", (document.model_dump_json(indent=1, exclude_none=True) + "\n").encode())


def _packed(tensors: "dict[str, Tensor]") -> bytes:
    """Of copies on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    from safetensors.torch import save

    return save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})


def hold(descriptor: int) -> bool:
    """Take the lock of an open file, unless another has it. `kd runs` has it for an instant, to look, and must stand in
    nobody's way: so it is tried for half a second."""
    for _ in range(25):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def write_aside(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed. The file that it replaces is renamed
    to `keep`, if that is given. Raises OSError with the file's name, and leaves what was there."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def open_run(root: Path, name: str, flag: str = "") -> Run:
    """The run of a name (see `find_folder`). Raises BadInput, with the flag that named it if one did."""
    return run_in(find_folder(root, name, flag))


def find_folder(root: Path, name: str, flag: str = "") -> Path:
    """The directory of the run called `<experiment>/<command>/<id>`, or so far as only one is, or at that path. Raises
    BadInput, with the flag that named it if one did."""
    said = f"{flag} {name}".strip() or repr(name)
    root, path = Path(os.path.abspath(root)), Path(os.path.abspath(root / name))
    if not os.path.isdir(path) and name.count("/") == 2:  # false too of an unusable name
        begun = [root]
        for start in name.split("/"):
            begun = [one for folder in begun for one in _begun(folder, start)]
        if len(begun) > 1:
            several = f"{said}: is the beginning of {len(begun)} runs:"
            raise BadInput(several, *(f"  {run.relative_to(root)}" for run in begun))
        path = begun[0] if begun else path
    path = path if os.path.isdir(path) else Path(os.path.abspath(name))
    if not os.path.isdir(path) or path.parent.name not in COMMANDS:
        groups = [f"{one.parent.name}/{one.name}" for command in COMMANDS for one in root.glob(f"*/{command}")]
        meant = nearest("/".join(name.split("/")[:2]), groups).partition(" (known")[0] if groups else ""
        what = f"there is no such run{meant.rstrip('?')}{meant and '/…?'}"
        if os.path.isdir(path) and path.name in COMMANDS:
            what = "is a group of runs: name one of them"
        elif os.path.isfile(name):
            what = "is a file, not a run"
        raise BadInput(f"{said}: {what}; `kd runs` lists what there is")
    if path.parents[2] != root or path.is_symlink():
        real = path.resolve() if path.is_symlink() else path
        where = f": add --runs-dir {real.parents[2]}" if len(real.parents) > 2 else ""
        raise BadInput(f"{said}: lies outside the runs folder{where}")
    return path


def _begun(folder: Path, start: str) -> list[Path]:
    """The folders in a folder whose names begin so; one that is called so, alone."""
    found = sorted(one for one in folder.glob("*/") if start and one.name.startswith(start))
    return [one for one in found if one.name == start] or found


def run_in(path: Path) -> Run:
    """The run in a directory. Raises BadInput when its config.yaml is not one that this kd wrote there."""
    file, wrong = path / "config.yaml", "is missing, damaged, or of another run"
    with contextlib.suppress(Exception):  # a damaged file may hold anything
        config = yaml.load(file.read_text(), READER)
        if (schema := config.pop("schema", 1)) != SCHEMA:
            wrong = f"is of another kd (its runs have schema {schema}, this one's {SCHEMA})"
        elif (run := Run(path.parents[2], Spec.model_validate(config, context={"reading": True}))).path == path:
            return run
    raise BadInput(f"{file}: {wrong}: {remedy(path)}")


def remedy(path: Path) -> str:
    """What to do about the damaged run in a directory."""
    root = path.parents[2].absolute()
    words = ["kd", "runs", "rm", "/".join(path.parts[-3:])]
    words += ["--force"] if path.parts[-2] in TEACHERS else []  # what was made from it may be there, and may stay
    words += [] if root == Path("runs").absolute() else ["--runs-dir", str(root)]
    return f"remove it, {shlex.join(words)}, and train it again"


def list_runs(root: Path, experiment: str, commands: Sequence[str], note: Note) -> list[Run]:
    """The runs of an experiment made by these commands, by command, then seed; what is no run is noted."""
    runs = []
    for command in commands:
        for folder in sorted((Path(os.path.abspath(root)) / experiment / command).glob("*/")):
            try:
                runs.append(run_in(folder))
            except BadInput as error:
                note(f"left out: {error}")
    return sorted(runs, key=lambda run: (commands.index(run.spec.command), run.spec.seed, run.name))


def environment(device: str, threads: int) -> dict[str, Any]:
    """Where and by what a run was made."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "kd": __version__,
        "git_commit": git_commit(),
        "command_line": shlex.join(["kd", *sys.argv[1:]]),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "pydantic", "safetensors")},
        "platform": platform.platform(),
        "device": device,
        "threads": threads,
        "cores": cores(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that kd runs from, `-dirty` when it was changed since; None when installed."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def orphaned(run: Run) -> str:
    """The members that an ensemble needs and that are gone; empty if all are there."""
    names = run.spec.parents if run.spec.command == "ensemble" else []
    return ", ".join(f"its member {name} is gone" for name in names if not (run.root / name).is_dir())
