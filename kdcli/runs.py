"""Run directories: `runs/<experiment>/<command>/<seed>-<hash>/`, one for each distinct thing that can be trained.

    config.yaml          the command, seed, settings and parents that the hash is taken of
    environment.json     versions, device, threads, command line, git commit
    metrics.jsonl        one line an epoch; where tensorboard is installed, events.out.tfevents.… hold the same
    state                and state.previous, while it trains: the training state to continue from
    weights.safetensors  and logits.safetensors (of the test images, a teacher's of the training images too)
    result.json          the status, the errors, the checksums of the files above; completed runs are never overwritten
    report.md            the same for a reader

A file is written aside and renamed, so that it is whole or absent. Nothing read here can execute code.
"""

import contextlib
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
from typing import TYPE_CHECKING, Any

import yaml

from kdcli import BadInput, __version__, failure

if TYPE_CHECKING:
    from torch import Tensor

Document = dict[str, Any]
UNFINISHED = ("missing", "running", "failed", "interrupted", "diverged")
TEACHERS = ("train-teacher", "ensemble")
STUDENTS = ("baseline", "distill", "omit-classes")
STATES = ("state", "state.previous")  # the newest first


@dataclass(frozen=True)
class Spec:
    """What a run is. `settings` hold all that its result depends on besides its parents; `parents` are run names."""

    experiment: str
    command: str
    seed: int
    settings: Document
    parents: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`<experiment>/<command>/<seed>-<hash>`, the run's directory below the runs folder."""
        identity = [self.command, self.seed, self.settings, self.parents]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{self.experiment}/{self.command}/{self.seed}-{digest[:10]}"


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
    def result(self) -> Document:
        """What result.json says; an absent one says that the run is missing. Raises BadInput when it is damaged."""
        try:
            result = json.loads((self.path / "result.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {"status": "missing"}
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(f"{self.path / 'result.json'}: cannot be read ({error}): {self.remedy}") from None
        needed = {"run", "seed", "device", "seconds", "test", "evaluated_on", "sha256"}
        if not isinstance(result, dict) or not (result.get("status") in UNFINISHED or needed <= result.keys()):
            raise BadInput(f"{self.path / 'result.json'}: is not a run's result: {self.remedy}")
        if result["status"] not in UNFINISHED and result.pop("checksum", "") != _checksum(result):
            raise BadInput(f"{self.path / 'result.json'}: is damaged or edited (its checksum differs): {self.remedy}")
        return result

    @property
    def completed(self) -> bool:
        return bool(self.result["status"] == "completed")

    @property
    def status(self) -> str:
        """completed, failed, diverged, interrupted, missing, or running; a run whose process died says interrupted."""
        status = str(self.result["status"])
        if status == "running":
            with contextlib.suppress(OSError), (self.path / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return "interrupted"
        return status

    @contextlib.contextmanager
    def writing(self, device: str, threads: int) -> Iterator[None]:
        """Hold the run for writing, all of it anew but what it can continue from; the status is right however the body
        ends.

        Raises BadInput when another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = self.path if self.root.is_dir() and os.access(self.root, os.W_OK) else f"--runs-dir {self.root}"
            raise BadInput(f"{what}: cannot be written: {error.strerror}") from None
        with (self.path / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(
                    f"{self.name}: is being written by another kd; wait for it, or change a setting"
                ) from None
            if self.completed:
                raise BadInput(f"{self.name}: was finished by another kd in the meantime; ask again to see it")
            for leftover in self.path.iterdir():
                if leftover.is_dir():
                    raise BadInput(f"{leftover}: kd makes no such folder: remove it")
                if leftover.suffix in (".safetensors", ".tmp") or leftover.name in ("result.json", "report.md"):
                    leftover.unlink()
            self._write_json("result.json", self._header("running"))
            self._write("config.yaml", yaml.safe_dump(self._config(), sort_keys=False).encode())
            self._write_json("environment.json", environment(device, threads))
            try:
                yield
            except BaseException as error:
                status = "failed" if isinstance(error, Exception) else "interrupted"
                if self.result["status"] == "running":
                    with contextlib.suppress(OSError):  # of a full disk the error itself is the one to tell
                        self.end(status, failure(error))
                raise

    def end(self, status: str, error: str) -> None:
        """Say how the run ended, if not completed."""
        self._write_json("result.json", self._header(status) | {"error": error})

    def save_state(self, epoch: int, tensors: "dict[str, Tensor]") -> None:
        """Keep the training state after so many epochs, whole or not at all, and the one before it."""
        import torch
        from safetensors.torch import save

        content = save({name: t.cpu().contiguous() for name, t in tensors.items()} | {"epoch": torch.tensor(epoch)})
        newest, previous = (self.path / name for name in STATES)
        write_aside(newest, hashlib.sha256(content).digest() + content, keep=previous)

    def load_state(self, note: Callable[[str], None]) -> "tuple[int, dict[str, Tensor]]":
        """The epochs and the state that training continues from, with the metrics cut back to them; 0 and nothing at
        the start. Of a damaged state it is noted, and the one before is used."""
        from safetensors.torch import load

        for name in STATES:
            try:
                content = (self.path / name).read_bytes()
                lines = (self.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            except FileNotFoundError:
                continue
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                tensors = load(content[32:])
                epochs = int(tensors.pop("epoch"))
                if len(lines) >= epochs and lines[epochs - 1].endswith(b"\n"):
                    self._write("metrics.jsonl", b"".join(lines[:epochs]))
                    return epochs, tensors
            note(f"{self.path / name}: is damaged and not used")
        if self.metrics():
            note(f"{self.name}: begun anew: it had no state saved to continue from")
        return self.restart()

    def restart(self) -> "tuple[int, dict[str, Tensor]]":
        """The state at the start, before any epoch: nothing; with no metrics."""
        self._write("metrics.jsonl", b"")
        return 0, {}

    @contextlib.contextmanager
    def logging(self) -> "Iterator[Callable[[Document], None]]":
        """How to log the metrics of an epoch: a line of metrics.jsonl and, where tensorboard is installed, scalars for
        it, those of the epochs before a continuation included."""
        for old in self.path.glob("events.out.tfevents.*"):
            old.unlink()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            yield self.log
            return
        with contextlib.closing(SummaryWriter(str(self.path), flush_secs=10)) as writer:

            def board(metrics: Document) -> None:
                for key in metrics.keys() - {"epoch"}:
                    writer.add_scalar(key, metrics[key], metrics["epoch"])

            def both(metrics: Document) -> None:
                self.log(metrics)
                board(metrics)

            for metrics in self.metrics():
                board(metrics)
            yield both

    def log(self, metrics: Document) -> None:
        """Append a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def metrics(self) -> list[Document]:
        """The lines of metrics.jsonl, one an epoch. Raises BadInput when it is damaged."""
        path = self.path / "metrics.jsonl"
        if not path.is_file() and "metrics.jsonl" not in self.result.get("sha256", {}):
            return []
        content = self._verified(path.name) if self.completed else path.read_bytes()
        try:
            lines = [json.loads(line) for line in content.splitlines()]
        except (ValueError, RecursionError):
            lines = [None]
        if not all(isinstance(line, dict) and isinstance(line.get("seconds"), int | float) for line in lines):
            raise BadInput(f"{path}: is damaged: {self.remedy}")
        return lines

    def save(self, kind: str, tensors: "dict[str, Tensor]") -> None:
        """Write `<kind>.safetensors`."""
        from safetensors.torch import save

        self._write(f"{kind}.safetensors", save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))

    def load(self, kind: str) -> "dict[str, Tensor]":
        """The tensors of `<kind>.safetensors`. Raises BadInput when the file is absent, damaged or truncated."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        name = f"{kind}.safetensors"
        try:
            return load(self._verified(name))
        except SafetensorError as error:
            raise BadInput(f"{self.path / name}: cannot be read ({error}): {self.remedy}") from None

    def _verified(self, name: str) -> bytes:
        """The content of a file of a completed run. Raises BadInput when it is not the one that was written."""
        path = self.path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise BadInput(f"{path}: is missing: {self.remedy}") from None
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror}): {self.remedy}") from None
        if hashlib.sha256(content).hexdigest() != self.result.get("sha256", {}).get(name):
            raise BadInput(f"{path}: is damaged or truncated (its checksum differs): {self.remedy}")
        return content

    @property
    def remedy(self) -> str:
        return f"delete {self.path} and train it again"

    @property
    def how_to_finish(self) -> str:
        """What to do about a run that is not completed."""
        if self.status == "diverged":
            return "lower its lr, or let it rise over a warmup"
        command = self.environment.get("command_line")
        return f"train it first{f': {command}' if command else ''}"

    def finish(self, result: Document, report: str) -> None:
        """Write the report and, last of all, the result that makes the run completed."""
        self._write("report.md", report.encode())
        files = [*sorted(self.path.glob("*.safetensors")), *self.path.glob("metrics.jsonl")]
        checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        document = self._header("completed") | result | {"sha256": checksums}
        self._write_json("result.json", document | {"checksum": _checksum(document)})
        for name in STATES:
            (self.path / name).unlink(missing_ok=True)

    @property
    def environment(self) -> Document:
        """The record of where and by what the run was made; empty when it is gone or damaged."""
        try:
            record = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def _config(self) -> Document:
        spec = self.spec
        head = {
            "command": spec.command,
            "experiment": spec.experiment,
            "seed": spec.seed,
            "parents": list(spec.parents),
        }
        return head | {"settings": spec.settings}

    def _header(self, status: str) -> Document:
        spec = self.spec
        return {
            "command": spec.command,
            "experiment": spec.experiment,
            "run": self.name,
            "seed": spec.seed,
            "status": status,
        }

    def _write_json(self, name: str, document: Document) -> None:
        self._write(name, (json.dumps(document, indent=1) + "\n").encode())

    def _write(self, name: str, content: bytes) -> None:
        write_aside(self.path / name, content)


def _checksum(document: Document) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_aside(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed. The file that it replaces is renamed
    to `keep`, if that is given. Raises OSError with the file's name, and leaves what was there."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            with contextlib.suppress(FileNotFoundError):
                path.replace(keep)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def open_run(root: Path, name: str, flag: str = "") -> Run:
    """The run called `<experiment>/<command>/<id>`, or so far as only one is, or in the directory at that path. Raises
    BadInput, with the flag that named it if one did."""
    said = f"{flag} {name}".strip() or repr(name)
    path = root / name if os.path.isdir(root / name) else Path(name)  # false too of an unusable name
    folder, _, start = name.rpartition("/")
    if start and not os.path.isdir(path) and os.path.isdir(root / folder):
        begun = sorted(run for run in (root / folder).iterdir() if run.is_dir() and run.name.startswith(start))
        if len(begun) > 1:
            raise BadInput(f"{said}: is the beginning of {len(begun)} runs:", *(f"  {folder}/{b.name}" for b in begun))
        path = begun[0] if begun else path
    path = Path(os.path.abspath(path))
    if not os.path.isdir(path) or path.parent.name not in (*TEACHERS, *STUDENTS):
        group = os.path.isdir(path) and path.name in (*TEACHERS, *STUDENTS)
        what = "is a group of runs: name one of them" if group else "there is no such run"
        raise BadInput(f"{said}: {what}; `kd runs` lists what there is")
    run = _open(path)
    if run.root != Path(os.path.abspath(root)):
        raise BadInput(f"{said}: lies outside the runs folder: add --runs-dir {run.root}")
    return run


def _open(path: Path) -> Run:
    """The run in a directory. Raises BadInput when its config.yaml is not the one that kd wrote there."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
        parents = tuple(str(parent) for parent in config["parents"])
        settings = dict(config["settings"])
        spec = Spec(str(config["experiment"]), str(config["command"]), int(config["seed"]), settings, parents)
        run = Run(path.parents[2], spec)
    except (OSError, ValueError, TypeError, KeyError, IndexError, yaml.YAMLError, RecursionError):
        what = "is not a run's configuration" if os.path.isfile(path / "config.yaml") else "is missing"
        raise BadInput(f"{path / 'config.yaml'}: {what}: delete {path} and train it again") from None
    if run.path != path:
        raise BadInput(f"{path / 'config.yaml'}: does not belong in this folder: {run.name} was expected")
    return run


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


def survey(root: Path) -> list[Document]:
    """What `kd runs` lists: every run directory below `root`, those included that cannot be read (`damaged`)."""
    root = Path(os.path.abspath(root))
    folders = [
        folder for command in (*TEACHERS, *STUDENTS) for folder in root.glob(f"*/{command}/*") if folder.is_dir()
    ]
    return [_surveyed(root, folder) for folder in sorted(folders)]


def _surveyed(root: Path, folder: Path) -> Document:
    files = {}
    with contextlib.suppress(OSError):  # it may be removed meanwhile
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                files[file.name] = file.stat()
    begun = (folder / "config.yaml").exists() or (folder / "result.json").exists()
    document: Document = {"run": str(folder.relative_to(root)), "status": "damaged" if begun else "missing"}
    document |= {"errors": None, "parents": [], "epoch": None, "epochs": None}
    document["bytes"] = sum(file.st_size for file in files.values())
    trained = [file.st_mtime for name, file in files.items() if name != "report"]
    document["age_s"] = round(time.time() - max(trained, default=time.time()))
    with contextlib.suppress(BadInput, AttributeError, TypeError, KeyError, OSError):
        run = _open(folder)
        document |= {"parents": list(run.spec.parents), "status": run.status}
        if run.spec.command != "ensemble":
            document |= {"epoch": len(run.metrics()), "epochs": run.spec.settings["train"]["epochs"]}
        document["errors"] = run.result["test"]["errors"] if run.completed else None
    return document


def dependents(listed: Sequence[Document], names: Sequence[str]) -> list[str]:
    """The runs that were made from those named, or from runs made from them, themselves not named."""
    reached = set(names)
    while more := {d["run"] for d in listed if reached & set(d["parents"])} - reached:
        reached |= more
    return sorted(reached - set(names))


def find_folders(root: Path, names: Sequence[str]) -> list[Path]:
    """The run directories of these names or paths, readable or not. Raises BadInput when one is none of `root`'s."""
    root, folders = Path(os.path.abspath(root)), []
    for name in names:
        path = Path(os.path.abspath(root / name if os.path.isdir(root / name) else name))
        parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if len(parts) != 3 or parts[1] not in (*TEACHERS, *STUDENTS) or not os.path.isdir(path) or path.is_symlink():
            raise BadInput(f"{name}: is not the whole name of a run in {root}; `kd runs` lists what there is")
        folders.append(path)
    return list(dict.fromkeys(folders))


def remove(folders: Sequence[Path]) -> None:
    """Delete run directories, in order. Raises BadInput when a kd is writing one, before any is deleted, or when the
    system does not let one go."""
    with contextlib.ExitStack() as held:
        for folder in folders:
            try:
                if not (folder / "lock").is_dir():
                    fcntl.flock(held.enter_context((folder / "lock").open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{folder}: is being written by a kd: stop that first; nothing was removed") from None
            except OSError as error:
                raise BadInput(f"{folder}: cannot be removed: {error.strerror}; nothing was removed") from None
        for folder in folders:
            try:
                if (folder / "result.json").is_file():
                    (folder / "result.json").unlink()  # first: what is half removed is not completed
                shutil.rmtree(folder)
            except OSError as error:
                raise BadInput(f"{error.filename}: cannot be removed: {error.strerror}") from None
            for parent in (folder.parent, folder.parent.parent):
                with contextlib.suppress(OSError):  # not empty
                    parent.rmdir()


def environment(device: str, threads: int) -> Document:
    """Where and by what a run was made."""
    packages = ("torch", "numpy", "pydantic", "safetensors")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "kd": __version__,
        "git_commit": git_commit(),
        "command_line": shlex.join(["kd", *sys.argv[1:]]),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "platform": platform.platform(),
        "device": device,
        "threads": threads,
        "cores": os.cpu_count(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that kd runs from, `-dirty` when it was changed since; None when installed."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def differences(wanted: Document, found: Document, prefix: str = "") -> list[str]:
    """`key: found instead of wanted` for every setting in which two nested documents differ."""
    lines = []
    for key in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(key), found.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} is {'not set' if b is None else b}, not {'unset' if a is None else a}")
    return lines
