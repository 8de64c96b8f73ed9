"""Reading an experiment file: where each key stands, what overrides it, the points of a grid, and errors with file,
line and key.

Precedence, highest first: a flag, then `--set a.b=c`, then the grid and the experiment file, then the defaults.
"""

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from kdcli import BadInput, BadKeys
from kdcli.config import Experiment, Omission, Section

Key = tuple[str | int, ...]


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
    """The entry that `--omit 3` or `--keep cat,dog` describes. Raises BadInput."""
    flags = " ".join(f"--{flag} {text}" for flag, text in (("omit", omit), ("keep", keep)) if text is not None)
    try:
        return Omission(omit=omit.split(",") if omit else None, keep=keep.split(",") if keep else None)
    except ValidationError as error:
        raise BadInput(*(f"{flags}: {_message(e, e['loc'])}" for e in error.errors())) from None


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
            f"{name or repr(name)}: neither an experiment's name nor a .yaml file{nearest(name, list(experiments()))}"
        )
    return experiments()[name]


@dataclass(frozen=True)
class Loaded:
    """An experiment, or a point of its grid (`at` are the values there), and where each key was given."""

    experiment: Experiment
    file: str
    origins: dict[Key, str]
    at: dict[str, str]

    @contextmanager
    def located(self) -> Iterator[None]:
        """Raise BadKeys of the body as BadInput that names file and line."""
        try:
            yield
        except BadKeys as error:
            lines = [f"{_origin(_split(key), self.origins, self.file)}: {key}: {text}" for key, text in error.problems]
            raise BadInput(*dict.fromkeys(lines)) from None


def load(name: str, overrides: Sequence[Override] = ()) -> Loaded:
    """The experiment of a file given by name or path, its grid for the keys that no override sets.

    Raises BadInput with every problem found, each as `file:line: key: problem`.
    """
    return _load(name, overrides, ())


def points(name: str, overrides: Sequence[Override] = ()) -> list[Loaded]:
    """The experiments that the grid of a file describes; without one the only one there is. Raises BadInput as `load`
    does, or where two points are the same."""
    whole = load(name, overrides)
    grid, found = whole.experiment.grid, list[Loaded]()
    for values in itertools.product(*grid.values()):
        chosen = [
            Override(key, value, f"{whole.origins.get(('grid', key), whole.file)}: grid: {key}={value}")
            for key, value in zip(grid, values, strict=True)
        ]
        point = _load(name, overrides, chosen)
        if any(point.experiment == other.experiment for other in found):
            raise BadInput(f"{chosen[-1].origin}: is there twice")
        found.append(point)
    return found


def _load(name: str, overrides: Sequence[Override], grid: Sequence[Override]) -> Loaded:
    """Later overrides beat earlier ones, and all of them the grid's values."""
    path = find(name)
    values, origins, problems = _read(path)
    for override in (*grid, *overrides):
        _apply(override, values, origins)
    if isinstance(varied := values.get("grid"), dict):  # what is set by hand does not vary
        by_hand = [override.key for override in overrides]
        values["grid"] = {k: v for k, v in varied.items() if not any(f"{k}.".startswith(f"{key}.") for key in by_hand)}
    try:
        experiment = Experiment.model_validate(values, context={"folder": path.parent})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += [_describe(e, origins, str(path)) for e in errors if not _misspelled(e, errors)]
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    at = {override.key: _shown(override.value) for override in grid}
    return Loaded(experiment, str(path), origins, at)


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
        values = _apart(yaml.load(text, _Loader))
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


def _apart(value: Any) -> Any:
    """A copy in which what an anchor and its aliases share is there once for each: an override is for one of them."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


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
        place[last] = deepcopy(override.value)  # a later override may reach into it
    except (TypeError, IndexError, KeyError):
        raise BadInput(f"{override.origin}: {override.key}: there is no such key to set") from None
    for old in [k for k in origins if k[: len(key)] == key]:
        del origins[old]
    origins[key] = override.origin


def _split(dotted: str, most: int = -1) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split(".", most))


def _dotted(key: Sequence[str | int]) -> str:
    return ".".join(map(str, key))


def nearest(word: str, known: Sequence[str]) -> str:
    """What a misspelled word may have meant, or what is known."""
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {lower[close[0]]}?"
    among = ("; " if any("," in k for k in known) else ", ").join(known[:20])
    return f" (known: {among}{', …' if len(known) > 20 else ''})"


def _fields(key: Key) -> Sequence[str]:
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


def _origin(key: Key, origins: dict[Key, str], file: str) -> str:
    """Where a key, or the section that it is missing from, was given."""
    while key and key not in origins:
        key = key[:-1]
    return origins.get(key, f"{file}:1")


def _describe(error: Any, origins: dict[Key, str], file: str) -> str:
    """One line, `file:line: key: problem`, for one of pydantic's errors."""
    key: Key = error["loc"]
    if error["type"] in ("kd", "unknown_row") and error["ctx"]["key"]:
        rows = error["ctx"]["key"].startswith(("expect.", "paper.", "grid."))  # whose keys may hold dots
        key = (*key, *_split(error["ctx"]["key"], 1 if rows else -1))
    return f"{_origin(key, origins, file)}: {_dotted(key) or 'experiment'}: {_message(error, key)}"


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
        case "unknown_row":
            return f"is not a row of this experiment{nearest(str(key[-1]), ctx['known'])}"
        case "extra_forbidden":
            return f"unknown key{nearest(str(key[-1]), _fields(key[:-1]))}"
        case "missing":
            return "is missing"
        case "too_short":
            return "must not be empty"
        case "invalid_key":
            return "is not a word: keys are words"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", ctx["expected"])
            return f"must be one of {', '.join(choices)}, not {shown}" + (
                nearest(given, choices).partition(" (known")[0] if isinstance(given, str) else ""
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
