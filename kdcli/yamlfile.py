"""Reading an experiment file: what overrides it, the points of its grid, and errors with file, line and key.

Precedence, highest first: a flag, then `--set a.b=c`, then the grid and the experiment file, then the defaults.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import ValidationError

from kdcli import BadInput, BadKeys
from kdcli.config import Experiment, Section, nearest


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
        return Override(key, yaml.load(value, Loader), f"--set {text}")
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BadInput(f"--set {text}: the value is not YAML") from None


def parse_seeds(text: str) -> list[int]:
    """`3`, `0-4` or `0,2,5` as a list of seeds. Raises BadInput."""
    seeds: list[int] = []
    for part in text.split(","):
        if not (range_ := _range(part)):
            raise BadInput(f"--seeds {text}: must be a seed, a range or a list of 10,000 at most: 3, 0-4, or 0,2,5")
        seeds += range_
    return seeds


def spelt(seeds: Sequence[int]) -> str:
    """Seeds as `--seeds` takes them: `0-4,7`."""
    firsts, lasts = ([s for s in sorted(seeds) if s + step not in seeds] for step in (-1, 1))
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts, strict=True))


def parse_classes(text: str, known: Sequence[str]) -> list[str]:
    """`3`, `7,8` or `0-4` as names of classes; what is the name of a `known` one is no range."""
    ranges = [range(0) if part in known or "-" not in part else _range(part) for part in text.split(",")]
    parts = [[*map(str, found)] or [part] for part, found in zip(text.split(","), ranges, strict=True)]
    return [name for names in parts for name in names]


def _range(text: str) -> range:
    """The numbers of `3` or `0-4`; none of another text, nor of more than 10,000."""
    ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    found = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
    return found if len(found) <= 10_000 else range(0)


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
            what = "is a folder, not an" if os.path.isdir(path) else "there is no such"
            raise BadInput(f"{name}: {what} experiment file")
        return path
    if name not in (known := experiments()):
        raise BadInput(f"{name or repr(name)}: neither an experiment's name nor a .yaml file{nearest(name, known)}")
    return known[name]


class Loaded(NamedTuple):
    """An experiment, or a point of its grid (`at` are the values there), and where each dotted key was given."""

    experiment: Experiment
    file: str
    origins: dict[str, str]
    at: dict[str, str]

    @contextmanager
    def located(self) -> Iterator[None]:
        """Raise BadKeys of the body as BadInput that names file and line."""
        try:
            yield
        except BadKeys as error:
            raise _told(error.problems, self.origins) from None


class _File(NamedTuple):
    """A file's values, where each key stands (`file:line`; of "" the first), and the duplicate keys found."""

    path: Path
    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[tuple[str, str]]


def load(name: str, overrides: Sequence[Override] = ()) -> Loaded:
    """The experiment of a file given by name or path; later overrides beat earlier ones. Raises BadInput with every
    problem found, each as `file:line: key: problem`."""
    return _loaded(_read(find(name)), overrides)


def points(name: str, overrides: Sequence[Override] = ()) -> list[Loaded]:
    """The points of a file's grid, or its one experiment. Raises BadInput as `load` does, or where two are the same."""
    file, found = _read(find(name)), list[Loaded]()
    whole = _loaded(file, overrides)
    grid = whole.experiment.grid
    places = {key: _origin(f"grid.{key}", whole.origins) for key in grid}
    for values in itertools.product(*(zip(given, _labels(given), strict=True) for given in grid.values())):
        at = zip(places.items(), values, strict=True)
        chosen = [Override(key, value, f"{place}: grid: {key}={value}") for (key, place), (value, _) in at]
        labels = [label for _, label in values]
        point = _loaded(file, overrides, chosen)._replace(at=dict(zip(grid, labels, strict=True)))
        if any(point.experiment == other.experiment for other in found):
            raise BadInput(f"{chosen[-1].origin}: is given twice")
        found.append(point)
    return found


def _labels(values: Sequence[Any]) -> list[str]:
    """What tells the values of one key apart: of sections the settings that not all of them have alike."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{key}={shown(v)}" for key, v in value.items())
        return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)

    sections = [value for value in values if isinstance(value, dict)]
    if len(sections) < len(values):
        return [shown(value) for value in values]
    alike = {key for key in sections[0] if all(key in s and s[key] == sections[0][key] for s in sections)}
    alike = alike if all(own.keys() - alike for own in sections) else set()
    return [" ".join(f"{key}={shown(v)}" for key, v in own.items() if key not in alike) for own in sections]


def _loaded(file: _File, overrides: Sequence[Override], point: Sequence[Override] = ()) -> Loaded:
    """The experiment with its overrides, which beat the values at a point of its grid."""
    values, origins, problems = dict(file.values), dict(file.origins), list(file.problems)
    for override in (*point, *overrides):
        _apply(override, values, origins)
    if isinstance(varied := values.get("grid"), dict):  # what is set by hand does not vary
        by_hand = [override.key for override in overrides]
        values["grid"] = {k: v for k, v in varied.items() if not any(f"{k}.".startswith(f"{key}.") for key in by_hand)}
    try:
        experiment = Experiment.model_validate(values, context={"folder": file.path.parent})
    except ValidationError as error:
        problems += map(_problem, error.errors(include_url=False))
    if problems:
        raise _told(problems, origins)
    return Loaded(experiment, str(file.path), origins, {})


class Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: 1e-3 is one; 010, 1_000 and 1:30 are not; and its booleans: yes, no, on and
    off, which may be classes, are words."""


_CORE = {
    "tag:yaml.org,2002:bool": r"(true|True|TRUE|false|False|FALSE)$",
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)$",
    "tag:yaml.org,2002:float": r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$",
}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CORE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _CORE.items():
    Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789tTfF"))


def _read(path: Path) -> _File:
    file = _File(path, {}, {"": f"{path}:1"}, [])
    try:
        text = path.read_text(encoding="utf-8")
        for count, (key, line, first) in enumerate(_keys(yaml.compose(text, Loader))):
            if count > 10_000 or key.count(".") > 50:
                raise RecursionError
            if first:
                file.problems.append((key, f"duplicate key, first given on line {first}"))
            file.origins[key] = f"{path}:{line}"
        values = yaml.load(text, Loader)
    except (UnicodeDecodeError, yaml.reader.ReaderError):
        raise BadInput(f"{path}: is not a text file: an experiment file is YAML; `kd init FOLDER` writes one") from None
    except RecursionError:
        raise BadInput(f"{path}: too large or too deep for an experiment file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        what = "holds a second document" if "another document" in str(error.problem) else error.problem or error.context
        raise BadInput(f"{path}{where}: not valid YAML: {what}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if values is None:
        raise BadInput(f"{path}: is empty: `kd init FOLDER` writes an experiment file")
    if not isinstance(values, dict):
        raise BadInput(f"{path}:1: an experiment file is a mapping (name: …, data: …, teacher: …)")
    return file._replace(values=values)


def _keys(node: yaml.Node | None, above: str = "") -> Iterator[tuple[str, int, int]]:
    """Every dotted key below a node, its line and, of one that is given twice, its first line, else 0."""
    below: list[tuple[Any, yaml.Node, yaml.Node]] = []  # key, where it stands, its value
    if isinstance(node, yaml.SequenceNode):
        below = [(i, item, item) for i, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        below = [(name.value, name, value) for name, value in node.value if isinstance(name, yaml.ScalarNode)]
    lines: dict[Any, int] = {}
    for name, place, value in below:
        line = place.start_mark.line + 1
        yield f"{above}{name}", line, lines.get(name, 0)
        lines.setdefault(name, line)
        yield from _keys(value, f"{above}{name}.")


def _apply(override: Override, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Set one dotted key, creating the sections above it. Copies what it changes: an anchor's aliases share it."""
    section = override.key.partition(".")[0]
    parts = override.key.split(".", 1 if section in ("grid", "expect", "paper") else -1)  # their keys may have points
    path = [int(part) if part.isdecimal() else part for part in parts]
    place: Any = values
    try:
        for i, part in enumerate(path[:-1], start=1):
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
                origins[".".join(map(str, path[:i]))] = override.origin
            place[part] = inner = copy(place[part])
            place = inner
        place[path[-1]] = override.value
    except (TypeError, IndexError, KeyError):
        raise BadInput(f"{override.origin}: {override.key}: there is no such key to set") from None
    key = ".".join(map(str, path))
    for old in [k for k in origins if k.startswith(f"{key}.")]:
        del origins[old]
    origins[key] = override.origin


def _sections(annotation: Any) -> list[Any]:
    """The kinds of section in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _sections(inner)]


def _origin(key: str, origins: dict[str, str]) -> str:
    """Where a dotted key, or the section that it is missing from, was given."""
    while key not in origins:
        key = key.rpartition(".")[0]
    return origins[key]


def _told(problems: Iterable[tuple[str, str]], origins: dict[str, str]) -> BadInput:
    """Problems of dotted keys, a line each: `file:line: key: problem`."""
    return BadInput(*dict.fromkeys(f"{_origin(key, origins)}: {key or 'experiment'}: {text}" for key, text in problems))


_MESSAGES = {
    "kd": "{message}",
    "missing": "is missing",
    "too_short": "must not be empty",
    "list_type": "must be a list, such as [{given}], not {shown}",
    "model_type": "must be a section of keys and values, not {shown}",
    "dict_type": "must be a section of keys and values, not {shown}",
    "bool_type": "must be true or false, not {shown}",
    "string_pattern_mismatch": "must begin with a letter or digit and hold only letters, digits, '.', '_' and '-', "
    "not {shown}",
    "too_long": "must have at most {max_length} entries, not {actual_length}",
}


def _problem(error: Any) -> tuple[str, str]:
    """The dotted key of one of pydantic's errors, and what is wrong with it."""
    kind, ctx, given = error["type"], error.get("ctx", {}), error["input"]
    place = [part for part in error["loc"] if not str(part).startswith("<")]  # the kinds of a value that may be several
    key = ".".join(str(part) for part in (*place, ctx.get("key", "")) if part != "")
    shown = "nothing" if given is None else repr(given) if len(repr(given)) <= 40 else repr(given)[:37] + "…"
    if kind == "too_short" and ctx["min_length"] > 1:
        return key, f"must have {ctx['min_length']} entries or more, not {ctx['actual_length']}"
    if kind in _MESSAGES:
        return key, _MESSAGES[kind].format(shown=shown, given=given, **ctx)
    if kind != "extra_forbidden":
        return key, re.sub("^Input should ", "must ", error["msg"]) + f", not {shown}"
    section: Any = Experiment
    for part in place[:-1]:
        section = _sections(section.model_fields[part].annotation)[0] if isinstance(part, str) else section
    return key, f"unknown key{nearest(str(place[-1]), section.model_fields)}"
