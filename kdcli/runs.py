"""Run directories: `runs/<experiment>/<command>/<seed>-<hash>/`, one for each distinct thing that can be trained.

    config.yaml          what the run is: the Spec that the hash is taken of
    environment.json     versions, device, threads, command line, git commit
    metrics.jsonl        one line an epoch; where tensorboard is installed, events.out.tfevents.… hold the same
    state                and state.previous, while it trains: the training state to continue from
    weights.safetensors  and logits.safetensors (of the test images, a teacher's of the training images too)
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
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from kdcli import BadInput, __version__, cores, failure
from kdcli.config import Average, Data, Distill, Input, Model, Omission, Origin, Section, Train

if TYPE_CHECKING:
    from torch import Tensor

SAVE_EVERY = 30.0  # seconds of training that an interruption may cost
SCHEMA = 2  # of what a run directory holds; those of another are refused
READER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # six times as fast where PyYAML has it
Settings = dict[str, Any]  # nested
Command = Literal["train-teacher", "ensemble", "baseline", "distill", "omit-classes"]
Pending = Literal["missing", "running", "interrupted", "failed", "diverged"]
Status = Pending | Literal["completed"]
TEACHERS: tuple[Command, ...] = ("train-teacher", "ensemble")
STUDENTS: tuple[Command, ...] = ("baseline", "distill", "omit-classes")
COMMANDS = (*TEACHERS, *STUDENTS)
ONNX = "net.onnx"  # of a teacher that is one
STATES = ("state", "state.previous")  # the newest first


class Facts(Section):
    """What a dataset is: a run keeps it, so that its net can be used where the images are not."""

    fingerprint: str  # of all images and labels, the classes' names and their order
    classes: list[str]  # names, in the order of the logits
    shape: list[int]  # of an image: [C, H, W]
    white: int  # the value of a pixel that becomes 1.0
    table: bool = False  # rows of floats; a channel is a column
    mean: list[float] = []  # of each channel of the training images in [0, 1], or given (or one for all)
    std: list[float] = []
    unlabelled: str | None = None  # fingerprint of the images that only the teacher labels
    given: bool = False  # mean and std by the experiment: then perceptrons use them too

    def normalises(self, model: Model) -> bool:
        """Whether a net's inputs are normalised: not those of the paper's perceptron, which sees images in [0, 1]."""
        return bool(self.mean) and (model.hidden is None or self.table or self.given)


class Spec(Section):
    """What a run is: all that its result depends on. `parents` are the names of the runs that it is made from."""

    experiment: str
    command: Command
    seed: int
    dataset: Facts
    data: Data  # where the images are from; `heldout` and `transfer` where the result depends on them
    model: Model | None = None  # an ensemble has none, nor a training
    train: Train | None = None
    distill: Distill | None = None
    omitted: list[str] = []  # classes missing from the transfer set
    average: Average = "arithmetic"  # of an ensemble
    parents: list[str] = []
    weights: list[float] = []  # of its members, unless all weigh the same
    code: str | None = None  # sha256 of the file that makes the model
    loss_code: str | None = None  # sha256 of the file of somebody's own loss
    origin: Origin | None = None  # of a teacher that was trained elsewhere
    content: str | None = None  # sha256 of the file that it was read from, or its library's name for the weights

    @cached_property
    def name(self) -> str:
        """`<experiment>/<command>/<seed>-<hash>`, the run's directory below the runs folder. The hash is of content: of
        settings that are not the default, of what the dataset and files hold, not of where they are."""
        identity = self.model_dump(exclude_defaults=True, exclude={"experiment", "dataset"})
        identity["data"] = self.data.model_dump(include={"heldout", "transfer", "evaluate_on"}, exclude_defaults=True)
        identity |= {"schema": SCHEMA, "dataset": self.dataset.fingerprint}
        if self.model and self.model.file:
            identity["model"]["name"] = (self.model.name or "").rpartition(":")[2]
        if self.distill and self.distill.file:
            identity["distill"]["loss"] = self.distill.loss.rpartition(":")[2]
        if self.origin:
            files = {"weights", "onnx", "logits"}
            identity["origin"] = self.origin.model_dump(exclude_defaults=True, exclude=files)
        if self.dataset.unlabelled:
            identity["unlabelled"] = self.dataset.unlabelled
        if self.model and self.dataset.normalises(self.model):
            identity["inputs"] = [self.dataset.mean, self.dataset.std]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{self.experiment}/{self.command}/{self.seed}-{digest[:10]}"

    @property
    def omission(self) -> str:
        """The label of the classes missing from the transfer set or, where they are fewer, of those in it."""
        kept = [name for name in self.dataset.classes if name not in self.omitted]
        fewer = len(kept) < len(self.omitted)
        return (Omission(keep=kept) if fewer else Omission(omit=self.omitted)).label if self.omitted else ""

    @property
    def imported(self) -> bool:
        """Whether it is a teacher that was trained elsewhere, used as it is."""
        return bool(self.origin and not self.train)

    @property
    def trained(self) -> tuple[Model, Train]:
        """The net and its training, which all runs but ensembles have."""
        assert self.model
        assert self.train
        return self.model, self.train


class Counted(Section):
    """Errors over all samples and by the class of the label."""

    errors: int
    total: int  # 0 of a teacher that has no answers for the test images
    per_class_errors: list[int]


class Correction(Section):
    """The errors after `shift` was added to the logits of the omitted classes, and of those alone."""

    shift: float
    added_to: list[str] = []  # those classes, in documents
    errors: int
    per_class_errors: list[int]


class Brief(Section):
    """Another run, in short."""

    run: str
    errors: int
    seed: int | None = None


class Gain(Section):
    """Fewer errors of an ensemble than of its members."""

    best_member: int
    mean_member: float


class Reading(Section):
    """How a teacher that was trained elsewhere was read, and what speaks for its having been misread."""

    said: list[str] = []
    transfer: Counted | None = None  # its errors on the training images
    classes: list[str] = []  # of its outputs, in the order that would explain its errors
    input: Input | None = None  # the normalisation that would
    warnings: list[str] = []


class Epoch(Section):
    """What metrics.jsonl holds of an epoch: means over the samples trained on, as they were seen; the hard loss and the
    errors are of the labelled ones."""

    epoch: int  # from 1
    loss: float
    hard_loss: float
    t2_kl: float | None = None  # T^2 KL(teacher || student), of students
    soft: float | None = None  # the value of their loss, where that is another
    train_errors: int
    test_errors: int | None = None  # of some epochs, where there are more test images than it trains on
    seconds: float  # since the training began
    images_per_s: int


class Result(Section):
    """What a completed run found, and how it was made."""

    command: Command
    experiment: str
    run: str
    seed: int
    status: Literal["completed"] = "completed"
    seconds: float
    evaluated_on: str
    test: Counted
    samples: int | None = None  # with labels, that were trained on
    unlabelled: int | None = None  # that a student saw besides
    last_epoch: Epoch | None = None
    warning: str | None = None  # of a training that learned nothing
    reading: Reading | None = None  # of a teacher that was trained elsewhere
    omitted: list[str] = []
    bias: dict[str, Correction] = {}  # of omissions, by how it was chosen
    average: Average | None = None  # of ensembles, and the errors of both averages
    averages: dict[str, Counted] = {}
    members: list[Brief] = []
    fewer_errors_than: Gain | None = None
    device: str = ""
    threads: int = 0
    parents: dict[str, str] = {}  # and the checksum of the weights that each had
    sha256: dict[str, str] = {}
    checksum: str = ""  # of this document without this key

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before using the net."""
        return [*([f"{self.warning}."] if self.warning else []), *(self.reading.warnings if self.reading else [])]

    @property
    def on(self) -> str:
        """What the errors were counted on: `10,000 test images`."""
        return f"{self.test.total:,} {self.evaluated_on}"


class Unfinished(Section):
    """What result.json says while there is no result."""

    status: Pending
    run: str
    parents: dict[str, str] = {}
    error: str | None = None


RESULT = TypeAdapter[Result | Unfinished](Result | Unfinished)


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
            if isinstance(found, Unfinished) or found.checksum == _checksum(found):
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

    def load_state(self, note: Callable[[str], None]) -> State:
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
        if self.metrics():
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

    def keep(self, file: Path) -> None:
        """Write a copy of an ONNX file."""
        write_aside(self.path / ONNX, file.read_bytes())

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
        self._write_result(result.model_copy(update={"checksum": _checksum(result)}))
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


def _checksum(result: Result) -> str:
    return hashlib.sha256(result.model_dump_json(exclude={"checksum"}, exclude_defaults=True).encode()).hexdigest()


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
    return _open(find_folder(root, name, flag))


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
        group = os.path.isdir(path) and path.name in COMMANDS
        missing = "is a file, not a run" if os.path.isfile(name) else "there is no such run"
        what = "is a group of runs: name one of them" if group else missing
        raise BadInput(f"{said}: {what}; `kd runs` lists what there is")
    if path.parents[2] != root or path.is_symlink():
        raise BadInput(f"{said}: lies outside the runs folder: add --runs-dir {path.parents[2]}")
    return path


def _begun(folder: Path, start: str) -> list[Path]:
    """The folders in a folder whose names begin so; one that is called so, alone."""
    found = sorted(one for one in folder.glob("*/") if start and one.name.startswith(start))
    return [one for one in found if one.name == start] or found


def _open(path: Path) -> Run:
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
    where = [] if root == Path("runs").absolute() else ["--runs-dir", str(root)]
    return f"remove it, {shlex.join(['kd', 'runs', 'rm', '/'.join(path.parts[-3:]), *where])}, and train it again"


def list_runs(root: Path, experiment: str, commands: Sequence[str], note: Callable[[str], None]) -> list[Run]:
    """The runs of an experiment made by these commands, by command, then seed; what is no run is noted."""
    runs = []
    for command in commands:
        for folder in sorted((Path(os.path.abspath(root)) / experiment / command).glob("*/")):
            try:
                runs.append(_open(folder))
            except BadInput as error:
                note(f"left out: {error}")
    return sorted(runs, key=lambda run: (commands.index(run.spec.command), run.spec.seed, run.name))


# Housekeeping.


class Listed(Section):
    """What `kd runs` says of a run directory; one that cannot be read is damaged."""

    run: str
    status: Status | Literal["damaged"]
    errors: int | None = None
    parents: list[str] = []
    epoch: int | None = None
    epochs: int | None = None
    bytes_: int = Field(0, serialization_alias="bytes")
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
            run = _open(folder)
            train, result = run.spec.train, run.finished()
            more = {"epoch": len(run.metrics()), "epochs": train.epochs} if train else {}
            errors = result.test.errors if result and result.test.total else None
            one |= {"parents": run.spec.parents, "status": run.status(), "errors": errors} | more
        age = time.time() - max((file.st_mtime for file in files.values()), default=time.time())
        found.append(Listed(**one, bytes_=sum(file.st_size for file in files.values()), age_s=round(age)))
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
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def settings(spec: Spec) -> Settings:
    """What a run is but for its names, its seed and its parents, nested: what is compared between two runs."""
    kept = spec.model_dump(exclude_none=True, exclude={"experiment", "seed", "parents", "dataset", "data", "omitted"})
    where = spec.data.model_dump(exclude_none=True, include={"evaluate_on", "heldout", "transfer"})
    kept.get("distill", {}).pop("teacher", None)  # the parents say which
    if spec.model and spec.model.name:
        kept["model"]["name"] = Path(spec.model.name).name
    if spec.distill:
        kept["distill"]["loss"] = Path(spec.distill.loss).name
    if spec.omitted:
        kept["omit_classes"] = spec.omission
    if spec.content:
        kept["content"] = spec.content[:12]
    for key in kept.get("origin", {}).keys() & {"weights", "onnx", "logits"}:
        kept["origin"][key] = Path(kept["origin"][key]).name
    content = {"content": spec.dataset.fingerprint[:12]}
    content |= {"unlabelled": spec.dataset.unlabelled[:12]} if spec.dataset.unlabelled else {}
    return kept | {"data": where | content}


def data_settings(spec: Spec) -> dict[str, Any]:
    """What two runs must share to be compared: the images, and which of them are trained and counted on."""
    data: dict[str, Any] = settings(spec)["data"]
    if spec.data.evaluate_on == "test":
        data.pop("heldout", None)
    for key in ("transfer", "unlabelled"):
        data.pop(key, None)
    return data


def orphaned(run: Run) -> str:
    """The members that an ensemble needs and that are gone; empty if all are there."""
    names = run.spec.parents if run.spec.command == "ensemble" else []
    return ", ".join(f"its member {name} is gone" for name in names if not (run.root / name).is_dir())


def changes(first: Settings, own: Settings, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The settings that differ, by dotted key, as [the first's, its own], None where it is not set; of teachers of two
    kinds, or one, their kind."""
    for key in dict.fromkeys([*first, *own]):
        a, b = first.get(key), own.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a.get("command") == b.get("command"):
            yield from changes(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, [v.get("command", v) if isinstance(v, dict) else v for v in (a, b)]


def differences(wanted: Settings, found: Settings, prefix: str = "") -> list[str]:
    """`key found instead of wanted` for every setting in which two nested documents differ, by key."""
    return [
        f"{f'no {key}' if b is None else f'{key} {b}'} instead of {'none' if a is None else a}"
        for key, (a, b) in sorted(changes(wanted, found, prefix))
    ]
