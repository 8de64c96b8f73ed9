"""The experiment file: typed sections, overrides, and errors that name file, line and key.

Precedence, highest first: a flag, then `--set a.b=c`, then the experiment file, then the defaults below.
"""

import difflib
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kdcli import BadInput

CLASSES = 10
Key = tuple[str | int, ...]


class DatasetFacts(NamedTuple):
    """What is known of a dataset before it is read: counts of images, those held out unless the file says otherwise,
    pixels a side, the value that becomes 1.0."""

    train: int
    test: int
    heldout: int
    side: int
    white: int


DATASETS = {"mnist": DatasetFacts(60_000, 10_000, 5_000, 28, 255), "digits": DatasetFacts(1_297, 500, 200, 8, 16)}


def _problem(key: str, message: str) -> PydanticCustomError:
    """An error about one key of the section being validated (`key` may be empty: the section itself)."""
    return PydanticCustomError("kd", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A part of the experiment file: unknown keys are errors, and "5" is not 5."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    name: Literal["mnist", "digits"]
    heldout: int = Field(default=0, ge=CLASSES)  # training images, stratified, that choose the bias of omit-classes
    evaluate_on: Literal["test", "heldout"] = "test"  # heldout: train without those images and count errors on them
    transfer: int | None = Field(default=None, ge=CLASSES)  # students see so many training images, stratified; else all

    @model_validator(mode="before")
    @classmethod
    def _default_heldout(cls, values: Any) -> Any:
        if isinstance(values, dict) and "heldout" not in values and str(values.get("name")) in DATASETS:
            return {**values, "heldout": DATASETS[values["name"]].heldout}
        return values

    @model_validator(mode="after")
    def _leaves_images_to_train_on(self) -> Self:
        if self.heldout > (most := DATASETS[self.name].train // 3):
            raise _problem("heldout", f"must be at most {most}, a third of the training images, not {self.heldout}")
        if self.transfer and self.transfer > (most := self.trained_on - CLASSES):
            raise _problem("transfer", f"must be at most {most}, not {self.transfer}; left out it is all images")
        return self

    @property
    def trained_on(self) -> int:
        """The number of images that teachers are trained on."""
        return DATASETS[self.name].train - (self.heldout if self.evaluate_on == "heldout" else 0)


def _dropout(p: Any) -> Any:
    number = isinstance(p, int | float) and not isinstance(p, bool) and math.isfinite(p)
    if number and p and not 1 <= round(256 * p) <= 255:
        raise _problem("", f"is a probability of dropping, drawn in steps of 1/256: 0, or 1/256 to 255/256, not {p}")
    return p


Dropout = Annotated[float, BeforeValidator(_dropout)]


class Model(Section):
    """A multi-layer perceptron with ReLU hidden layers."""

    hidden: list[Annotated[int, Field(ge=1, le=100_000)]] = Field(max_length=20)
    dropout: Dropout = 0.0  # probability of dropping a hidden unit
    input_dropout: Dropout = 0.0  # probability of dropping a pixel


class Train(Section):
    epochs: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(default=128, ge=1, le=1_000_000)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0, le=1e38)
    momentum: float | None = Field(default=None, ge=0, lt=1)  # sgd alone; left out it is 0.9
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # linear and cosine fall to zero at the last step
    warmup: float = Field(default=0.0, ge=0)  # epochs over which the learning rate rises from zero
    jitter: int = Field(default=0, ge=0, le=7)  # each image shifts by up to so many pixels each way, anew every epoch
    max_norm: float | None = Field(
        default=None, ge=1e-3, le=1e38
    )  # bound on the norm of the weights into each hidden unit
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of the weights' exponential average, at most

    @model_validator(mode="before")
    @classmethod
    def _momentum_is_for_sgd(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("momentum") is None and values.get("optimizer", "sgd") == "sgd":
            return {**values, "momentum": 0.9}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.momentum is not None and self.optimizer != "sgd":
            raise _problem("momentum", f"belongs to sgd, not to {self.optimizer}: remove it")
        if self.warmup >= self.epochs:
            raise _problem("warmup", f"must be shorter than the {self.epochs} epochs, not {self.warmup:g}")
        return self


class Network(Section):
    model: Model
    train: Train


class Ensemble(Section):
    members: int = Field(ge=2, le=1_000)
    average: Literal["arithmetic", "geometric"] = "arithmetic"
    models: list[Model] | None = Field(default=None, min_length=1)  # member i has models[i % n]; else the teacher's

    @model_validator(mode="after")
    def _all_models_are_used(self) -> Self:
        if len(self.models or []) > self.members:
            raise _problem("models", f"has {len(self.models or [])} entries for only {self.members} members")
        return self


class Baseline(Section):
    train: Train | None = None  # replaces the student's, whole


class Distill(Section):
    teacher: Literal["teacher", "ensemble"] = "teacher"
    T: float = Field(ge=1e-3, le=1e4)
    lambda1: float = Field(ge=0, le=1e6)
    lambda2: float = Field(ge=0, le=1e6)  # left out it is 1 - lambda1
    t_squared: bool = True  # false: the talk's formula, without the paper's factor T^2

    @model_validator(mode="before")
    @classmethod
    def _lambda2_completes_lambda1(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("lambda2") is not None:
            return values
        lambda1 = values.get("lambda1")
        if not isinstance(lambda1, int | float) or not math.isfinite(lambda1):
            return {**values, "lambda2": 0.0}
        if lambda1 > 1:
            raise _problem("lambda1", f"is {lambda1:g}; above 1 it needs a lambda2 too (left out, that is 1 - lambda1)")
        return {**values, "lambda2": round(1 - max(lambda1, 0), 12)}

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.lambda1 == self.lambda2 == 0:
            raise _problem("lambda1", "and lambda2 are both 0: the student would learn nothing")
        return self


class Omission(Section):
    """Classes missing from the transfer set: those in `omit`, or all but those in `keep`."""

    omit: list[int] | None = None
    keep: list[int] | None = None
    train: Train | None = None  # replaces the student's, whole

    @model_validator(mode="after")
    def _some_classes_stay(self) -> Self:
        if (self.omit is None) == (self.keep is None):
            raise _problem("", "needs either omit or keep, and only one of them")
        key, classes = ("omit", self.omit) if self.omit is not None else ("keep", self.keep)
        assert classes is not None
        if unknown := [c for c in classes if not 0 <= c < CLASSES]:
            raise _problem(key, f"there is no class {unknown[0]}: the classes are 0 to {CLASSES - 1}")
        if len(set(classes)) < len(classes):
            raise _problem(key, f"names a class twice: {classes}")
        if not classes or len(classes) == CLASSES:
            raise _problem(key, f"must name at least one class and leave one out, not {classes}")
        return self

    @property
    def omitted(self) -> list[int]:
        """The classes absent from the transfer set, ascending."""
        return [c for c in range(CLASSES) if (c in self.omit if self.omit is not None else c not in (self.keep or []))]

    @property
    def label(self) -> str:
        """The row's name: `omit 3`, `keep 7,8`."""
        verb, classes = ("omit", self.omit) if self.omit is not None else ("keep", self.keep)
        return f"{verb} {','.join(map(str, sorted(classes or [])))}"


Count = Annotated[float, Field(ge=0)]


def _paper(given: Any) -> list[float]:
    numbers = given if isinstance(given, list) else [given]
    fine = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
    if not fine or not 1 <= len(numbers) <= 2:
        raise _problem("", f"must be a number of errors, or two: in all, and on the classes never seen; not {given!r}")
    return [float(n) for n in numbers]


class Experiment(Section):
    """One experiment; `seed` may be a number or a list of different ones."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        BeforeValidator(lambda seed: seed if isinstance(seed, list) else [seed]),
        Field(min_length=1),
    ] = [0]
    threads: int | None = Field(default=None, ge=1, le=4096)  # left out: all cores
    data: Data
    teacher: Network
    ensemble: Ensemble | None = None
    student: Network
    baseline: Baseline = Baseline()
    distill: Distill
    omit_classes: list[Omission] = []
    expect: dict[str, Count] = {}  # row of the final table: mean errors it may have at most
    paper: dict[str, Annotated[Any, BeforeValidator(_paper)]] = {}  # row: [errors] or [errors, errors on unseen]
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}  # dotted key: its values, which `kd run` walks

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.seed)) < len(self.seed):
            raise _problem("seed", f"names a seed twice: {self.seed}")
        if self.distill.teacher == "ensemble" and self.ensemble is None:
            raise _problem(
                "distill.teacher", "is ensemble, but there is no ensemble section: add `ensemble: {members: 5}`"
            )
        if len({tuple(entry.omitted) for entry in self.omit_classes}) < len(self.omit_classes):
            raise _problem("omit_classes", "names the same classes twice")
        trains = {"teacher": self.teacher.train, "student": self.student.train, "baseline": self.baseline.train}
        trains |= {f"omit_classes.{i}": entry.train for i, entry in enumerate(self.omit_classes)}
        side = DATASETS[self.data.name].side
        for section, train in trains.items():
            if train and 2 * train.jitter >= side:
                raise _problem(f"{section}.train.jitter", f"is too far for images of {side} x {side} pixels")
        for section, row in [*(("expect", row) for row in self.expect), *(("paper", row) for row in self.paper)]:
            if row not in self.rows:
                raise _problem(f"{section}.{row}", f"is not a row of this experiment{_nearest(row, self.rows)}")
        for key in self.grid:
            if key.split(".")[0] in ("name", "seed", "threads", "expect", "paper", "grid") or key in _FIXED:
                raise _problem(f"grid.{key}", "cannot vary within one experiment")
            if inside := [other for other in self.grid if other.startswith(f"{key}.")]:
                raise _problem(f"grid.{inside[0]}", f"lies within {key}, which varies too: keep one of them")
        for section in ("paper", "omit_classes"):
            if self.grid and getattr(self, section):
                raise _problem(section, "has no place in the table of a grid: leave it out")
        return self

    @property
    def rows(self) -> list[str]:
        """The rows of the final table, in order."""
        biased = [f"{e.label}{bias}" for e in self.omit_classes for bias in ("", *(f", {b} bias" for b in BIASES))]
        nets = ["teacher", "baseline", "student"]
        if self.ensemble:
            nets = ["teacher", "ensemble", "baseline", "ensemble of baselines", "student"]
            nets += ["student of ensemble"] if self.distill.teacher == "teacher" else []
        return [*nets, *biased]


_FIXED = (
    "data.name",
    "data.heldout",
    "data.evaluate_on",
)  # of a grid: all its runs are trained and scored on one dataset
BIASES = ("test", "heldout", "prior")  # the three ways to choose the bias correction of omit-classes


class Override(NamedTuple):
    """A value that replaces the experiment file's: `origin` is what the user typed."""

    key: str
    value: Any
    origin: str


def parse_set(text: str) -> Override:
    """`a.b=c` of a `--set`, its value read as YAML. Raises BadInput when there is no `=` or the value is broken."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput(f"--set {text}: write it as --set section.key=value, for example --set teacher.train.epochs=5")
    try:
        return Override(key, yaml.load(value, _Loader), f"--set {text}")
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BadInput(f"--set {text}: the value is not YAML") from None


def parse_seeds(text: str) -> list[int]:
    """`3`, `0-4` or `0,2,5` as a list of seeds. Raises BadInput."""
    seeds: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        range_ = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not 1 <= len(range_) <= 10_000:
            raise BadInput(f"--seeds {text}: must be a seed, a range or a list of 10,000 at most: 3, 0-4, or 0,2,5")
        seeds += range_
    return seeds


def omission(omit: str | None, keep: str | None) -> Omission:
    """The entry that `--omit 3` or `--keep 7,8` describes. Raises BadInput."""
    flags = " ".join(f"--{flag} {text}" for flag, text in (("omit", omit), ("keep", keep)) if text is not None)
    try:
        classes = {k: [int(c) for c in v.split(",")] for k, v in (("omit", omit), ("keep", keep)) if v is not None}
        return Omission.model_validate(classes)
    except ValidationError as error:
        raise BadInput(*(f"{flags}: {_message(e, e['loc'])}" for e in error.errors())) from None
    except ValueError:
        raise BadInput(f"{flags}: must be digits with commas between, such as 7,8") from None


def experiments() -> dict[str, Path]:
    """The experiments that ship with kd: name to file."""
    here = Path(__file__).parent
    folder = here / "experiments" if (here / "experiments").is_dir() else here.parent / "experiments"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of an experiment given by its path or, when it ships with kd, by its name. Raises BadInput."""
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml") or len(path.parts) > 1:
        if not os.path.isfile(path):  # false too of an unusable name
            raise BadInput(f"{name}: there is no such experiment file")
        return path
    if name not in experiments():
        raise BadInput(
            f"{name or repr(name)}: neither an experiment's name nor a .yaml file{_nearest(name, experiments())}"
        )
    return experiments()[name]


def load(name: str, overrides: Iterable[Override] = ()) -> Experiment:
    """Read, override and validate an experiment given by name or path; later overrides beat earlier ones.

    Raises BadInput with every problem found, each as `file:line: key: problem`.
    """
    path, overrides = find(name), list(overrides)
    values, origins, problems = _read(path)
    for override in overrides:
        _apply(override, values, origins)
    if isinstance(grid := values.get("grid"), dict):  # what is set by hand does not vary
        values["grid"] = {key: vs for key, vs in grid.items() if key not in {override.key for override in overrides}}
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += [_describe(e, origins, str(path)) for e in errors if not _misspelled(e, errors)]
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    return experiment


def points(name: str, overrides: Sequence[Override], grid: dict[str, list[Any]]) -> dict[Key, Experiment]:
    """The experiments that a grid describes, by the values of its keys; without a grid the one there is, at ().

    Raises BadInput as `load` does.
    """
    path = find(name)
    found: dict[Key, Experiment] = {}
    origins = _read(path)[1]
    for values in itertools.product(*grid.values()):
        chosen = [
            Override(key, value, f"{origins.get(('grid', key), path)}: grid: {key}={value}")
            for key, value in zip(grid, values, strict=True)
        ]
        if (point := tuple(map(_shown, values))) in found:
            raise BadInput(f"{chosen[-1].origin}: is there twice")
        found[point] = load(name, [*overrides, *chosen])
    return found


def _shown(value: Any) -> str:
    """A value of a grid as a table has room for it."""
    if isinstance(value, dict):
        return " ".join(f"{key}={_shown(v)}" for key, v in value.items())
    if isinstance(value, list):
        return " x ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: 1e-3 is one; 010, 1_000 and 1:30 are not."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)$",
    "tag:yaml.org,2002:float": r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, str], list[str]]:
    """The file's values, where each key stands (`file:line`), and the duplicate keys found."""
    origins: dict[Key, str] = {}
    problems: list[str] = []
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, _Loader)
        _locate(node, (), str(path), origins, problems)
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise BadInput(f"{path}: not valid YAML: nested too deeply") from None
    except BadInput:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}:1: an experiment file is a mapping (name: …, data: …, teacher: …)")
    return values, origins, problems


def _locate(node: yaml.Node | None, key: Key, file: str, origins: dict[Key, str], problems: list[str]) -> None:
    """Record where every key below `node` stands, and every key that stands twice."""
    if len(origins) > 10_000 or len(key) > 50:
        raise BadInput(f"{file}: too large or too deep for an experiment file")
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            origins[*key, i] = f"{file}:{item.start_mark.line + 1}"
            _locate(item, (*key, i), file, origins, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if name.value == "<<":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _locate(merged, key, file, origins, problems)
        elif isinstance(name, yaml.ScalarNode):
            if name.value in seen:
                dotted = _dotted((*key, name.value))
                problems.append(f"{file}:{line}: {dotted}: duplicate key, first given on line {seen[name.value]}")
            seen.setdefault(name.value, line)
            origins[*key, name.value] = f"{file}:{line}"
            _locate(value, (*key, name.value), file, origins, problems)


def _apply(override: Override, values: dict[str, Any], origins: dict[Key, str]) -> None:
    """Set one dotted key, creating the sections above it."""
    *sections, last = key = _split(override.key)
    place: Any = values
    try:
        for i, part in enumerate(sections):
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
                origins[key[: i + 1]] = override.origin
            place = place[part]
        place[last] = override.value
    except (TypeError, IndexError, KeyError):
        raise BadInput(f"{override.origin}: {override.key}: there is no such key to set") from None
    for old in [k for k in origins if k[: len(key)] == key]:
        del origins[old]
    origins[key] = override.origin


def _split(dotted: str, most: int = -1) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split(".", most))


def _dotted(key: Sequence[str | int]) -> str:
    return ".".join(map(str, key))


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    lower = {k.lower(): k for k in known}
    among = ("; " if any("," in k for k in known) else ", ").join(known)
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]}?" if close else f" (known: {among})"


def _fields(key: Key) -> Iterable[str]:
    """The keys known in the section at `key`."""
    section: type[Section] = Experiment
    for part in key:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next(c for c in _leaves(annotation) if isinstance(c, type) and issubclass(c, Section))
    return list(section.model_fields)


def _leaves(annotation: Any) -> list[Any]:
    """The plain types in an annotation such as `list[Model] | None`."""
    inner = getattr(annotation, "__args__", None)
    return [leaf for arg in inner for leaf in _leaves(arg)] if inner else [annotation]


def _describe(error: Any, origins: dict[Key, str], file: str) -> str:
    """One line, `file:line: key: problem`, for one of pydantic's errors."""
    key: Key = error["loc"]
    if error["type"] == "kd" and error["ctx"]["key"]:
        rows = error["ctx"]["key"].startswith(("expect.", "paper.", "grid."))  # whose keys may hold dots
        key = (*key, *_split(error["ctx"]["key"], 1 if rows else -1))
    place = key
    while place and place not in origins:
        place = place[:-1]
    return f"{origins.get(place, f'{file}:1')}: {_dotted(key) or 'experiment'}: {_message(error, key)}"


def _misspelled(missing: Any, errors: Sequence[Any]) -> bool:
    """Whether a missing key is there under a name much like it, which has an error of its own."""
    *place, name = missing["loc"] or [""]
    unknown = [str(e["loc"][-1]) for e in errors if e["type"] == "extra_forbidden" and [*e["loc"][:-1]] == place]
    return missing["type"] == "missing" and bool(difflib.get_close_matches(str(name), unknown, n=1, cutoff=0.6))


def _message(error: Any, key: Key) -> str:
    kind, ctx, given = error["type"], error.get("ctx", {}), error["input"]
    shown = "nothing" if given is None else repr(given) if len(repr(given)) <= 40 else repr(given)[:37] + "…"
    match kind:
        case "kd":
            return str(ctx["message"])
        case "extra_forbidden":
            return f"unknown key{_nearest(str(key[-1]), _fields(key[:-1]))}"
        case "missing":
            return "is missing"
        case "too_short":
            return "must not be empty"
        case "invalid_key":
            return "is not a word: keys are words"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", ctx["expected"])
            return f"must be one of {', '.join(choices)}, not {shown}" + (
                _nearest(given, choices).partition(" (known")[0] if isinstance(given, str) else ""
            )
        case "int_type" | "int_from_float":
            return f"must be a whole number, not {shown}"
        case "float_type":
            return f"must be a number, not {shown}"
        case "bool_type":
            return f"must be true or false, not {shown}"
        case "list_type":
            return f"must be a list, such as [7, 8], not {shown}"
        case "model_type" | "dict_type":
            return f"must be a section of keys and values, not {shown}"
        case "string_pattern_mismatch":
            return f"must begin with a letter or digit and hold only letters, digits, '.', '_' and '-', not {shown}"
        case "string_too_long":
            return f"must have at most {ctx['max_length']} characters, not {len(given)}"
        case "string_type":
            return f"must be a word, not {shown}"
    text = str(error["msg"]).removeprefix("Input should ")
    return f"{'must ' + text if text != error['msg'] else text}, not {shown}"
