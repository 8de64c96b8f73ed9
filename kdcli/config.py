"""The experiment file's sections: what can be said in one, with types, bounds and a description of each key."""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

Average = Literal["arithmetic", "geometric"]
BIASES = ("test", "heldout", "prior")  # the three ways to choose the bias correction of omit-classes
Kind = Literal["teacher", "member", "ensemble", "baseline", "student", "omission"]


def problem(key: str, message: str) -> PydanticCustomError:
    """An error about one key of the section being validated (`key` may be empty: the section itself)."""
    return PydanticCustomError("kd", "{message}", {"key": key, "message": message})


def nearest(word: str, known: Collection[str]) -> str:
    """What a misspelled word may have meant, or what is known."""
    lower = {k.lower(): k for k in known}
    if close := difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6):
        return f"; did you mean {lower[close[0]]}?"
    among = ("; " if any("," in k for k in known) else ", ").join(list(known)[:20])
    return f" (known: {among}{', …' if len(known) > 20 else ''})"


def some(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Section(BaseModel):
    """A part of the experiment file: unknown keys are errors, "5" is not 5, and of `one_of` one key is given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
    one_of: ClassVar[tuple[str, ...]] = ()

    def __hash__(self) -> int:  # pydantic's own refuses sections with lists
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.one_of and sum(getattr(self, key) is not None for key in self.one_of) != 1:
            raise problem("", f"needs either {' or '.join(self.one_of)}, and only one of them")
        for key, message in self._contradictions():
            raise problem(key, message)
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Each key whose value does not go with the others, and what is wrong; the first is told."""
        yield from ()


def _beside(path: str, info: ValidationInfo) -> str:
    """A path made absolute: it is beside the experiment file."""
    return os.path.abspath(Path((info.context or {}).get("folder", ""), path))


def _file(path: str, info: ValidationInfo) -> str:
    file = _beside(path, info)
    if not (info.context or {}).get("reading") and not os.path.isfile(file):  # that of a run may be gone
        raise problem("", f"{file} is a folder, not a file" if os.path.isdir(file) else f"there is no file {file}")
    return file


def _function(reference: str, info: ValidationInfo) -> str:
    path, _, function = reference.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise problem("", f"must be FILE.py:FUNCTION, not {reference!r}")
    return f"{_file(path, info)}:{function}"


def _source(name: str) -> str:
    if name not in ("digits", "mnist") and not name.startswith("torchvision:"):
        meant = nearest(name, ("digits", "mnist")).partition(" (known")[0]
        such = "digits, mnist or torchvision:CLASS, such as torchvision:CIFAR10"
        raise problem("", f"must be {such}, not {name!r}{meant}")
    return name


def _net(name: str, info: ValidationInfo) -> str:
    """A net's name; of somebody's own function, with its path."""
    if name.startswith(("torchvision:", "timm:")) or NET.fullmatch(name):
        return name
    if ".py:" in name:
        return _function(name, info)
    known = "resnet8 (…20, 56, 110), resnet8x4, wrn-40-2, torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
    raise problem("", f"must be {known}, not {name!r}")


# The nets of the distillation literature: of depth 6n + 2 and, wide ones, 6n + 4, which the check of the nets asks for.
NET = re.compile(r"resnet(?P<depth>[1-9]\d*)(x(?P<times>[1-9]\d*))?|wrn-(?P<wide_depth>[1-9]\d*)-(?P<width>[1-9]\d*)")
Function = Annotated[str, AfterValidator(_function)]  # of somebody's own Python file
File = Annotated[str, AfterValidator(_file)]
Word = BeforeValidator(lambda name: str(name) if type(name) is int else name, json_schema_input_type=str | int)
ClassName = Annotated[str, Word]  # 3 is "3"
Numbers = Annotated[list[float], Field(min_length=1, max_length=100_000)]


def _of_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> Iterator[tuple[str, str]]:
    if bool(mean) != bool(std):
        yield ("std" if mean else "mean"), f"is missing: {'mean' if mean else 'std'} needs it"
    elif len(mean or []) != len(std or []):
        yield "std", "must have as many numbers as mean"
    if min(std or [1]) <= 0:
        yield "std", "must be above 0"


class Data(Section):
    """The images and their classes."""

    one_of = ("name", "folder", "arrays", "function")
    name: Annotated[str, AfterValidator(_source)] | None = Field(None, description="digits, mnist, torchvision:CLASS")
    split: str | None = Field(None, description="for torchvision datasets that have several: balanced for EMNIST")
    folder: Annotated[str, AfterValidator(_beside)] | None = Field(
        None, description="of image files: train/CLASS/… and test/CLASS/… (or val, valid), or CLASS/…"
    )
    arrays: Annotated[str, AfterValidator(_beside)] | None = Field(
        None, description="an .npz file with x_train, y_train, x_test, y_test, or MedMNIST's names"
    )
    function: Function | None = Field(None, description="FILE.py:FUNCTION that returns the images and labels")
    size: int | None = Field(None, ge=1, le=4096, description="pixels: shorter side after resizing; the centre is kept")
    channels: Literal[1, 3] | None = Field(None, description="default: 1 if all images are grey, else 3")
    test: float | None = Field(None, gt=0, lt=1, description="test share, for folders without a test set (0.2)")
    mean: Numbers | None = Field(None, description="of the inputs in [0, 1], one per channel; default: measured")
    std: Numbers | None = Field(None, description="of the inputs; without both, perceptrons get images in [0, 1]")
    unlabelled: Annotated[str, AfterValidator(_beside)] | None = Field(
        None, description="a folder of images that only the teacher labels, for students to see as well"
    )
    heldout: int | None = Field(None, ge=1, description="images to choose the bias of omit_classes; default: a tenth")
    evaluate_on: Literal["test", "heldout"] = Field("test", description="heldout: count errors on held-out images")
    transfer: int | None = Field(None, ge=1, description="training images that students see; default: all")

    @property
    def files(self) -> bool:
        """Whether its images are files of any size, not arrays."""
        return bool(self.folder) or (self.name or "").startswith("torchvision:")

    @property
    def images(self) -> str:
        """What says which the labelled images are and how they are read, as JSON."""
        size = {"size"} if self.files else set()  # else it is of unlabelled images alone
        return self.model_dump_json(include={*self.one_of, "split", "channels", "test"} | size)

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        files, of_folder = self.files, "a folder or a torchvision dataset"
        belongs = {"channels": (files, of_folder), "test": (self.folder, "a folder")}
        belongs["size"] = files or self.unlabelled, of_folder
        belongs["split"] = (self.name and files, "a torchvision dataset")
        for key, (there, what) in belongs.items():
            if getattr(self, key) is not None and not there:
                yield key, f"belongs to {what}: remove it"
        yield from _of_normalisation(self.mean, self.std)


FIXED = ("data", *(f"data.{key}" for key in Data.model_fields if key != "transfer"))  # a grid's runs share a dataset


def _dropout(p: float) -> float:
    if p and not 0.5 < 256 * p < 255.5:
        raise problem("", f"is a probability of dropping, drawn in steps of 1/256: 0, or 1/256 to 255/256, not {p}")
    return p


Width = Annotated[int, Field(ge=1, le=100_000)]
Dropout = Annotated[float, AfterValidator(_dropout)]


class Model(Section):
    """A multi-layer perceptron with ReLU hidden layers, or a net by its name."""

    one_of = ("hidden", "name")
    hidden: list[Width] | None = Field(None, max_length=20, description="widths of the hidden layers")
    dropout: Dropout = Field(0.0, description="probability of dropping a hidden unit")
    input_dropout: Dropout = Field(0.0, description="probability of dropping a pixel")
    name: Annotated[str, AfterValidator(_net)] | None = Field(
        None, description="resnet8, wrn-40-2, torchvision:NAME, timm:NAME or FILE.py:FUNCTION(classes, channels, …)"
    )
    args: dict[str, JsonValue] = Field({}, description="arguments for the function or the library's net")
    pretrained: bool = Field(False, description="teachers only: use torchvision's or timm's weights")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        for key in ("dropout", "input_dropout") if self.name else ("args",):
            if getattr(self, key):
                yield key, f"belongs to {'hidden' if self.name else 'name'}: remove it"
        if self.args and NET.fullmatch(self.name or ""):
            yield "args", f"belongs to functions, torchvision and timm: {self.name} has none"
        if self.file and (given := sorted({"classes", "channels"} & self.args.keys())):
            yield f"args.{given[0]}", "is what kd itself calls the function with: remove it"
        if self.pretrained and not (self.name or "").startswith(("torchvision:", "timm:")):
            yield "pretrained", "belongs to torchvision:NAME and timm:NAME: remove it, or name a file of `weights`"

    @property
    def file(self) -> str:
        """The file of somebody's own net; else empty."""
        path = (self.name or "").rpartition(":")[0]
        return path if path.endswith(".py") else ""


COUNTLESS = ("crop", "elastic", "cutout", "mixup")  # of these no view of an image is like another
AUGMENTATION = ("jitter", "flip", *COUNTLESS)  # what a view depends on


class Train(Section):
    """How a net is trained."""

    epochs: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(128, ge=1, le=1_000_000)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0, le=1e38)
    momentum: float | None = Field(None, ge=0, lt=1, description="sgd only; default: 0.9")
    weight_decay: float = Field(0.0, ge=0, le=1e6)
    nesterov: bool = Field(False, description="sgd only")
    schedule: Literal["constant", "linear", "cosine", "step"] = Field("linear", description="linear, cosine: to zero")
    milestones: list[Annotated[int, Field(ge=1)]] | None = Field(None, description="of step: when the rate falls")
    gamma: float | None = Field(None, gt=0, lt=1, description="factor by which step lowers the rate (0.1)")
    clip: float | None = Field(None, gt=0, le=1e38, description="bound on the norm of the gradient of all weights")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each hard label spread over all classes")
    warmup: float = Field(0.0, ge=0, description="epochs over which the learning rate rises from zero")
    jitter: int = Field(0, ge=0, le=7, description="largest shift of an image in pixels, anew every epoch")
    flip: bool = Field(False, description="each image is mirrored left to right half of the time")
    crop: float | None = Field(None, gt=0, lt=1, description="each image is cropped to at least this share of it")
    elastic: float | None = Field(None, gt=0, le=4096, description="4 x 4 places of an image move up to so many pixels")
    cutout: int | None = Field(None, ge=1, le=4096, description="side of the square blotted out of each image")
    mixup: float | None = Field(None, gt=0, le=100, description="alpha: two images are blended, by Beta(alpha, alpha)")
    max_norm: float | None = Field(None, ge=1e-3, le=1e38, description="bound on the norm of a hidden unit's weights")
    ema: float | None = Field(None, gt=0, lt=1, description="maximal decay of the weights' exponential average")

    @model_validator(mode="before")
    @classmethod
    def _momentum_is_for_sgd(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("momentum") is None and values.get("optimizer", "sgd") == "sgd":
            return {**values, "momentum": 0.9}
        return values

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        for key in ("momentum", "nesterov") if self.optimizer != "sgd" else ():
            if getattr(self, key) is not None and getattr(self, key) is not False:
                yield key, f"belongs to sgd, not to {self.optimizer}: remove it"
        if self.nesterov and not self.momentum:
            yield "nesterov", "needs a momentum above 0"
        for key in ("milestones", "gamma") if self.schedule != "step" else ():
            if getattr(self, key) is not None:
                yield key, f"belongs to the schedule step, not to {self.schedule}: remove it"
        falls = self.milestones or []
        if self.schedule == "step" and (not falls or sorted(set(falls)) != falls):
            what = "must be" if falls else "is missing: the schedule step needs"
            yield "milestones", f"{what} ascending epochs, such as [60, 80]"
        if self.warmup >= self.epochs:
            yield "warmup", f"is {self.warmup:g}, and must be less than train.epochs, {self.epochs}"

    def steps(self, samples: int) -> int:
        """Batches an epoch: a lone last sample joins the batch before, since BatchNorm cannot be trained on one."""
        return max(samples // self.batch_size + (samples % self.batch_size > 1), 1)

    def tested_every(self, samples: int, tested: int) -> int:
        """After how many epochs on so many samples the errors on so many other images are counted: some twenty times in
        a training, and of no more images than it was trained on meanwhile; else counting would take most of the time
        where these are few. After the last epoch they are counted in any case."""
        return max(self.epochs // 20, -(-tested // samples), 1)

    @property
    def augmented(self) -> bool:
        """Whether a net never sees an image twice as it is: its teacher must see what it sees."""
        return any(getattr(self, key) for key in AUGMENTATION)


class Network(Section):
    """A net and how it is trained."""

    model: Model
    train: Train


class Input(Section):
    """How a teacher that was trained elsewhere sees its images, whatever the student sees."""

    size: int | None = Field(None, ge=1, le=4096, description="pixels: images are resized to a square of this side")
    channels: Literal[1, 3] | None = Field(None, description="default: those of the data")
    range: Literal[1, 255] = Field(1, description="255 for a net that takes bytes, before mean and std")
    mean: Numbers | None = Field(None, description="of its inputs: one number, or one per channel")
    std: Numbers | None = Field(None, description="of its inputs; without both, the data's or its library's")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from _of_normalisation(self.mean, self.std)


class Origin(Section):
    """Where a teacher that was trained elsewhere comes from, and how it is read."""

    weights: File | None = Field(None, description="checkpoint: .safetensors, or .pt, .pth, .th read without code")
    onnx: File | None = Field(None, description="an ONNX file, run by onnxruntime")
    logits: File | None = Field(None, description="its logits or probabilities: .npz, .npy, .csv or .parquet")
    head: Literal["new"] | None = Field(None, description="new: a fresh last layer for the classes of the data")
    freeze: Literal["backbone"] | None = Field(None, description="backbone: only the last layer is trained")
    input: Input | None = None
    classes: list[ClassName] | None = Field(None, min_length=2, description="names of its outputs, in order")

    @property
    def file(self) -> str:
        """The file that it is read from; empty where a library has the weights."""
        return self.weights or self.onnx or self.logits or ""


class TeacherSection(Origin):
    """A net and how it is trained; or one that was trained elsewhere, as it is or, with `train`, trained further."""

    one_of = ("model", "onnx", "logits")
    model: Model | None = None
    train: Train | None = Field(None, description="default: the net is used as it is")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        library = bool(self.model and self.model.pretrained)
        if self.weights and library:
            yield "weights", "and model.pretrained name two sources of weights: remove one"
        for key in ("head", "freeze", "input", "classes"):
            if getattr(self, key) is not None and not (self.file or library):
                yield key, "belongs to a net that was trained elsewhere: name its weights, or remove it"
        for key in ("weights", "head", "freeze", "train"):
            if getattr(self, key) is not None and not self.model:
                yield key, f"belongs to a model and its weights, not to {'onnx' if self.onnx else 'logits'}: remove it"
        if not self.train and (self.head or self.freeze):
            yield "train", f"is missing: {'a fresh head' if self.head else 'freeze'} needs training"
        if not self.train and self.model and not (self.weights or library):
            yield "train", "is missing: say how the net is trained, or name its weights"
        if self.input and self.logits:
            yield "input", "belongs to a net, not to logits: remove it"
        if self.classes and self.head:
            yield "classes", "belongs to a net with its own head: with a new one they are the data's; remove it"
        if twice := [c for c in self.classes or [] if (self.classes or []).count(c) > 1]:
            yield "classes", f"names {twice[0]} twice"

    @property
    def origin(self) -> Origin | None:
        """Where it comes from; None of a net that is trained here from scratch."""
        if not self.file and not (self.model and self.model.pretrained):
            return None
        return Origin(**{key: getattr(self, key) for key in Origin.model_fields})


class Member(TeacherSection):
    """A member of an ensemble."""

    weight: float = Field(1.0, gt=0, le=1e6, description="weight in the average, relative to the others")


Members = Annotated[
    Annotated[int, Field(ge=2, le=1_000), Tag("<number>")]
    | Annotated[list[Member], Field(min_length=2, max_length=1_000), Tag("<list>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list) else "<number>"),
]


class Ensemble(Section):
    """Several teachers and the average of their predictions."""

    members: Members = Field(description="how many teachers; or a list of `teacher` sections")
    average: Average = "arithmetic"
    models: list[Model] | None = Field(None, min_length=1, description="member i has models[i % n]; else the teacher's")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.models and isinstance(self.members, list):
            yield "models", "belongs to a number of members, and each of these has a model of its own: remove it"
        elif len(self.models or []) > self.number:
            yield "models", f"has {len(self.models or [])} entries for only {self.members} members"

    @property
    def number(self) -> int:
        """How many members there are."""
        return self.members if isinstance(self.members, int) else len(self.members)

    def teachers(self, teacher: TeacherSection) -> list[TeacherSection]:
        """What each member is, beside the experiment's `teacher`."""
        if isinstance(self.members, list):
            return list(self.members)
        models: Sequence[Model | None] = self.models or [teacher.model]
        return [teacher.model_copy(update={"model": models[i % len(models)]}) for i in range(self.members)]

    @property
    def weights(self) -> list[float]:
        """Of the members in the average, as they were given; empty where all weigh the same."""
        weights = [member.weight for member in self.members] if isinstance(self.members, list) else []
        return weights if len(set(weights)) > 1 else []


class Baseline(Section):
    """The student's net on hard labels alone."""

    train: Train | None = Field(None, description="replaces the student's entirely")


class LogitLoss(NamedTuple):
    """A loss of the field: its formula, where it is from, and what its authors set. p and q are the teacher's and the
    student's distributions, softened by T where the loss has one; y the label; a hat: the softmax without y."""

    formula: str  # a mean over the samples, before lambda1
    source: str
    T: float | None  # None: it has none
    parameters: dict[str, float] = {}  # what it is called with besides
    lambda1: float | None = None  # weights, None where its authors recommend none
    lambda2: float | None = None
    warmup: int = 0  # epochs
    labels: bool = False  # whether it needs the label of every sample
    standardize: bool = False  # whether it was published with standardised logits too


LOSSES = {
    "kd": LogitLoss("T² KL(p‖q)", "arXiv:1503.02531, section 2", 4, {}, 0.9, 0.1, standardize=True),
    "mse": LogitLoss("‖z_student - z_teacher‖²", "arXiv:2105.08919, L_MSE", None),
    "dkd": LogitLoss(
        "T² [alpha KL((p_y, 1-p_y)‖(q_y, 1-q_y)) + beta KL(p̂‖q̂)]",
        "arXiv:2203.08679, eq. 7",
        4,
        {"alpha": 1, "beta": 8},
        lambda1=1,
        lambda2=1,
        warmup=20,
        labels=True,
        standardize=True,
    ),
    "dist": LogitLoss(
        "T² [beta (1 - mean of rho(q, p) over samples) + gamma (1 - mean of rho(q, p) over classes)], rho: Pearson's",
        "arXiv:2205.10536, section 3",
        4,
        {"beta": 1, "gamma": 1},
        lambda1=2,
        lambda2=1,
    ),
    "ttm": LogitLoss("KL(p^gamma / Σ p^gamma‖q)", "arXiv:2402.11148, section 3", None, {"gamma": 0.1}, 45, 1),
    "wttm": LogitLoss("Σ p^gamma KL(p^gamma / Σ p^gamma‖q)", "arXiv:2402.11148, section 4", None, {"gamma": 0.2}, 4, 1),
    "nkd": LogitLoss(
        "-p_y log q_y (T = 1) - gamma T² Σ p̂ log q̂",
        "arXiv:2303.13005, section 3",
        1,
        {"gamma": 1.5},
        lambda1=1,
        lambda2=1,
        labels=True,
    ),
}
STANDARDIZE = LogitLoss(
    "kd or dkd of z <- (z - mean) / (std + 1e-7), both nets' logits, over the classes",
    "arXiv:2403.01427, algorithm 1",
    2,
    lambda1=9,
    lambda2=0.1,
)


def _loss(name: str, info: ValidationInfo) -> str:
    """A loss's name; of somebody's own function, with its path."""
    if name in LOSSES:
        return name
    if ".py:" in name:
        return _function(name, info)
    meant = nearest(name, LOSSES).partition(" (known")[0]
    raise problem("", f"must be {', '.join(LOSSES)} or FILE.py:FUNCTION, not {name!r}{meant}")


Parameter = Annotated[float | None, Field(ge=0, le=1e6)]


class Distill(Section):
    """The loss of a student: lambda1 * soft + lambda2 * cross-entropy, where soft is T^2 * KL(teacher || student),
    softened by T, unless `loss` names another."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema["required"].remove("lambda2"))
    teacher: Literal["teacher", "ensemble"] = "teacher"
    T: float | None = Field(None, ge=1e-3, le=1e4, description="temperature, for losses that have one")
    lambda1: float = Field(ge=0, le=1e6, description="weight of the soft targets")
    lambda2: float = Field(ge=0, le=1e6, description="weight of the hard labels; default: 1 - lambda1")
    loss: Annotated[str, AfterValidator(_loss)] = Field("kd", description=f"{', '.join(LOSSES)} or FILE.py:FUNCTION")
    alpha: Parameter = Field(None, description="for dkd; the default of these is their authors': `kd losses`")
    beta: Parameter = Field(None, description="for dkd and dist")
    gamma: Parameter = Field(None, description="for dist, ttm, wttm and nkd")
    standardize: bool = Field(False, description="kd and dkd only: logits of each image scaled to mean 0, std 1")
    warmup: float = Field(0.0, ge=0, description="epochs over which lambda1 rises from zero")
    t_squared: bool = Field(True, description="kd only; false: without the paper's factor T^2")
    views: int | None = Field(None, ge=1, le=10_000, description="fixed views per image, whose teacher logits are kept")
    half: bool = Field(False, description="keep the logits of the views in float16")

    @model_validator(mode="before")
    @classmethod
    def _lambda2_completes_lambda1(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("lambda2") is not None:
            return values
        lambda1 = values.get("lambda1")
        if not isinstance(lambda1, int | float) or not 0 <= lambda1 <= 1e6:  # told by its type or bounds
            return {**values, "lambda2": 0.0}
        if lambda1 > 1:
            raise problem("lambda1", f"is {lambda1:g}; above 1 it needs a lambda2 too (left out, that is 1 - lambda1)")
        return {**values, "lambda2": round(1 - lambda1, 12)}

    @model_validator(mode="before")
    @classmethod
    def _parameters_are_its_authors(cls, values: Any) -> Any:
        known = LOSSES.get(str(values.get("loss", "kd"))) if isinstance(values, dict) else None
        left_out = {key: float(v) for key, v in (known.parameters if known else {}).items() if values.get(key) is None}
        return {**values, **left_out} if left_out else values

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.lambda1 == self.lambda2 == 0:
            yield "lambda1", "and lambda2 are both 0: the student would learn nothing"
        known, name = LOSSES.get(self.loss), self.loss.rpartition("/")[2]
        for key in ("alpha", "beta", "gamma"):
            if getattr(self, key) is not None and not (known and key in known.parameters):
                yield key, f"is not a parameter of {name}: remove it"
        if self.T is None and not (known and known.T is None):
            yield "T", f"is missing: {name} has a temperature"
        if self.T is not None and known and known.T is None:
            yield "T", f"has no role in {name}: remove it"
        if self.standardize and not (known and known.standardize):
            yield "standardize", f"belongs to kd and dkd, not to {name}: remove it"
        if not self.t_squared and self.loss != "kd":
            yield "t_squared", f"belongs to kd, not to {name}: remove it"
        if self.half and not self.views:
            yield "half", "belongs to views: remove it"

    @property
    def file(self) -> str:
        """The file of somebody's own loss; else empty."""
        return "" if self.loss in LOSSES else self.loss.rpartition(":")[0]

    @property
    def plain(self) -> bool:
        """Whether its soft term is the paper's, T^2 KL."""
        return self.loss == "kd" and not self.standardize

    @property
    def parameters(self) -> dict[str, float]:
        """What its loss is called with beside logits and labels."""
        return {key: value for key in ("T", "alpha", "beta", "gamma") if (value := getattr(self, key)) is not None}


class Omission(Section):
    """Classes missing from the transfer set: those in `omit`, or all but those in `keep`."""

    one_of = ("omit", "keep")
    omit: list[ClassName] | None = Field(None, min_length=1, description="these classes are missing")
    keep: list[ClassName] | None = Field(None, min_length=1, description="all classes but these are missing")
    train: Train | None = Field(None, description="replaces the student's entirely")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if len(set(self.named)) < len(self.named):
            yield "keep" if self.omit is None else "omit", f"names a class twice: {self.named}"

    @property
    def named(self) -> list[str]:
        """The classes that the entry names, to omit or to keep."""
        return self.omit or self.keep or []

    def omitted(self, classes: Sequence[str]) -> list[str]:
        """Which of all the `classes` are missing from the transfer set, in their order."""
        return [c for c in classes if (c in self.named) == (self.omit is not None)]

    @property
    def label(self) -> str:
        """The row's name, numbers by value before the other classes: `omit 3`, `keep 7,8,cat`."""
        names = sorted(self.named, key=lambda c: (0, int(c), c) if re.fullmatch(r"\d{1,18}", c) else (1, 0, c))
        return f"{'keep' if self.omit is None else 'omit'} {','.join(names)}"


class Row(NamedTuple):
    """A row of the final table: nets of one kind, one a seed."""

    name: str
    kind: Kind


Count = Annotated[float, Field(ge=0)]
OneOrMore = BeforeValidator(
    lambda given: given if isinstance(given, list) else [given], json_schema_input_type=float | list[float]
)
Paper = Annotated[list[Count], OneOrMore, Field(min_length=1, max_length=2)]
Values = Annotated[list[Any], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[list[Seed], OneOrMore, Field(min_length=1)]


class Resources(Section):
    """What each training takes of a Ray cluster (`--on`); no result depends on it."""

    cpus: int | None = Field(None, ge=1, le=4096, description="default: as many as threads, or one")
    gpus: float | None = Field(None, ge=0, le=1024, description="default: one where kd itself would use one")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if (self.gpus or 0) > 1 and self.gpus != int(self.gpus or 0):
            yield "gpus", f"must be a fraction of one, or a whole number, not {self.gpus:g}"


class Experiment(Section):
    """One experiment; `seed` may be a number or a list of different ones."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="name of the runs' folder")
    seed: Seeds = [0]
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads; default: all cores")
    resources: Resources = Resources()
    data: Data
    teacher: TeacherSection
    ensemble: Ensemble | None = None
    student: Network
    baseline: Baseline = Baseline()
    distill: Distill
    omit_classes: list[Omission] = []
    expect: dict[str, Count] = Field({}, description="row of the final table: the most mean errors it may have")
    paper: dict[str, Paper] = Field({}, description="row: errors, or [errors, errors on the classes never seen]")
    grid: dict[str, Values] = Field({}, description="dotted key: the values that kd run tries")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if len(set(self.seed)) < len(self.seed):
            yield "seed", f"names a seed twice: {self.seed}"
        if self.distill.teacher == "ensemble" and self.ensemble is None:
            yield "distill.teacher", "is ensemble, but there is no ensemble section: add `ensemble: {members: 5}`"
        if self.student.model.pretrained:
            yield "student.model.pretrained", "belongs to a teacher: remove it"
        if self.ensemble and isinstance(self.ensemble.members, int) and not self.teacher.train:
            yield "ensemble.members", "would all be the same net, which is not trained: name a list of teachers"
        augmented = [key for key, train in self.taught_trains.items() if train.augmented]
        teachers = [*self.teachers.values()]
        asked = teachers[1:] if self.distill.teacher == "ensemble" and len(teachers) > 1 else teachers
        for key in augmented if any(teacher.logits for teacher in asked) else ():
            yield f"{key}.train", "shows views of the images, and a file of logits has answers for none: remove them"
        if self.distill.views and not augmented:
            yield "distill.views", "has no use, since no student's train is augmented: remove it"
        yield from self._of_loss()
        for section, row in [*(("expect", row) for row in self.expect), *(("paper", row) for row in self.paper)]:
            if row not in self.table:
                yield f"{section}.{row}", f"is not a row of this experiment{nearest(row, self.table)}"
        for key in self.grid:
            if key.split(".")[0] in ("name", "seed", "threads", "resources", "expect", "paper", "grid") or key in FIXED:
                yield f"grid.{key}", "cannot vary within one experiment"
            if inside := [other for other in self.grid if other.startswith(f"{key}.")]:
                yield f"grid.{inside[0]}", f"lies within {key}, which varies too: keep one of them"
        for section in ("paper", "omit_classes"):
            if self.grid and getattr(self, section):
                yield section, "has no place in the table of a grid: leave it out"

    def _of_loss(self) -> Iterator[tuple[str, str]]:
        """What does not go with the loss of the students."""
        loss = self.distill.loss
        needs = loss in LOSSES and LOSSES[loss].labels
        if needs and self.data.unlabelled:
            yield "distill.loss", f"{loss} needs the label of every image, and data.unlabelled has none: use another"
        for key, train in self.taught_trains.items():
            if needs and train.mixup:
                yield "distill.loss", f"{loss} needs one label per image, and {key}.train.mixup blends two: use another"
            if self.distill.warmup >= train.epochs:
                yield "distill.warmup", f"must be less than {key}.train.epochs, {train.epochs}"

    @property
    def rows(self) -> list[Row]:
        """The kinds of nets that the experiment compares, in the order of the final table; then the members."""
        ensemble = self.ensemble is not None
        rows: list[tuple[str, Kind, bool]] = [
            ("teacher", "teacher", True),
            ("ensemble", "ensemble", ensemble),
            ("baseline", "baseline", True),
            ("ensemble of baselines", "ensemble", ensemble),
            ("student", "student", True),
            ("student of ensemble", "student", ensemble and self.distill.teacher == "teacher"),
            *((entry.label, "omission", True) for entry in self.omit_classes),
            ("member", "member", ensemble),
            ("member of the baselines", "member", ensemble),
        ]
        return [Row(name, kind) for name, kind, is_there in rows if is_there]

    @property
    def teachers(self) -> dict[str, TeacherSection]:
        """The sections that describe a teacher: the experiment's, and those of members that are listed."""
        members = self.ensemble.members if self.ensemble and isinstance(self.ensemble.members, list) else []
        return {"teacher": self.teacher} | {f"ensemble.members.{i}": member for i, member in enumerate(members)}

    @property
    def student_trains(self) -> dict[str, Train]:
        """The sections that say how a net of the student's kind is trained: the student's, and those of their own."""
        own = {"baseline": self.baseline.train}
        own |= {f"omit_classes.{i}": entry.train for i, entry in enumerate(self.omit_classes)}
        return {"student": self.student.train} | {section: train for section, train in own.items() if train}

    @property
    def taught_trains(self) -> dict[str, Train]:
        """Those among them of nets that learn from a teacher."""
        return {section: train for section, train in self.student_trains.items() if section != "baseline"}

    @property
    def table(self) -> list[str]:
        """The names of the final table's rows: a bias correction of omitted classes has one of its own."""
        rows = [row for row in self.rows if row.kind != "member"]
        return [n for r in rows for n in (r.name, *(bias_row(r.name, b) for b in BIASES if r.kind == "omission"))]


def bias_row(row: str, bias: str) -> str:
    """The name of the table's row of an omission after a bias correction: `omit 3, prior bias`."""
    return f"{row}, {bias} bias"
