"""What a run is, all that its result depends on; what it found; and how two differ."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from kdcli.config import Average, Data, Distill, Input, Model, Omission, Origin, Section, Train

SCHEMA = 2  # of what a run directory holds; those of another are refused
Settings = dict[str, Any]  # nested
Command = Literal["train-teacher", "ensemble", "baseline", "distill", "omit-classes"]
Pending = Literal["missing", "running", "interrupted", "failed", "diverged"]
Status = Pending | Literal["completed"]
TEACHERS: tuple[Command, ...] = ("train-teacher", "ensemble")
STUDENTS: tuple[Command, ...] = ("baseline", "distill", "omit-classes")
COMMANDS = (*TEACHERS, *STUDENTS)


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
    test_errors: int | None = None  # of some epochs, and of the last
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

    def digest(self) -> str:
        """The checksum that the document must have."""
        content = self.model_dump_json(exclude={"checksum"}, exclude_defaults=True)
        return hashlib.sha256(content.encode()).hexdigest()

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
    if spec.model and spec.dataset.given:
        where |= {"mean": spec.dataset.mean, "std": spec.dataset.std}
    return kept | {"data": where | content}


def data_settings(spec: Spec) -> dict[str, Any]:
    """What two runs must share to be compared: the images, and which of them are trained and counted on."""
    data: dict[str, Any] = settings(spec)["data"]
    if spec.data.evaluate_on == "test":
        data.pop("heldout", None)
    for key in ("transfer", "unlabelled", "mean", "std"):
        data.pop(key, None)
    return data


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
    """`key found instead of wanted` for every setting in which two nested documents differ, by key; of images, that
    they are others."""
    unlike = {"data.content": "other images or classes", "data.unlabelled": "other unlabelled images"}
    return [
        unlike.get(key) or f"{f'no {key}' if b is None else f'{key} {b}'} instead of {'none' if a is None else a}"
        for key, (a, b) in sorted(changes(wanted, found, prefix))
    ]
