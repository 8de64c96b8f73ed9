"""`kd compare`: runs, or groups of runs that differ in seed alone, side by side, with a verdict against the first."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_uppercase

import torch

from kdcli import BadInput
from kdcli.config import Data
from kdcli.recipes import discordant, loaded
from kdcli.runs import STUDENTS, TEACHERS, Document, Run, differences, list_runs, open_run
from kdcli.verdict import paired, spread


def compare(
    root: Path,
    names: Sequence[str],
    data_dir: Path | None,
    note: Callable[[str], None],
    match: str = "",
    by_errors: bool = False,
) -> Document:
    """The groups of runs that the names stand for, the settings in which they differ, and a verdict on each against the
    first. A name is a run's, which is a group by itself, or `<experiment>/<command>`: its finished runs, in a group
    those that differ in seed alone. After the first come those with `match` in a name or a `key=value` of theirs, as
    they were named or by their mean errors. Raises BadInput when there are not two groups, of one dataset."""
    reference, *others = [group for name in names for group in _groups(root, name, note)]
    others = [group for group in others if any(match.lower() in text.lower() for text in _texts(group))]
    if by_errors:
        others.sort(key=lambda group: statistics.mean(run.result["test"]["errors"] for run in group))
    groups = [reference, *others]
    named = [run.name for group in groups for run in group]
    if twice := [name for name in named if named.count(name) > 1]:
        raise BadInput(f"{' '.join(names)}: names {twice[0]} twice")
    if not 2 <= len(groups) <= len(ascii_uppercase):
        matching = f" (with {match})" if match else ""
        raise BadInput(
            f"{' '.join(names)}: kd compare needs 2 to 26 groups of finished runs{matching}, not {len(groups)}"
        )
    data = [group[0].spec.settings["data"] for group in groups]
    if unlike := [line for other in data[1:] for line in differences(data[0], other, "data.")]:
        raise BadInput(f"{' '.join(names)}: cannot be compared: {unlike[0]}")
    described = [_described(group[0]) for group in groups]
    first = groups[0][0].result
    return {
        "command": "compare",
        "evaluated_on": first["evaluated_on"],
        "total": first["test"]["total"],
        "groups": [_group(letter, group) for letter, group in zip(ascii_uppercase, groups, strict=False)],
        "comparisons": [
            {"group": letter, "changed": _seeds(groups[0], group) | _changed(described[0], settings)}
            | _compared(groups[0], group, data_dir)
            for letter, settings, group in zip(ascii_uppercase[1:], described[1:], groups[1:], strict=False)
        ],
    }


def _groups(root: Path, name: str, note: Callable[[str], None]) -> list[list[Run]]:
    experiment, _, command = name.strip("/").partition("/")
    if command not in (*TEACHERS, *STUDENTS):
        run = open_run(root, name)
        if not run.completed:
            raise BadInput(f"{run.name}: is {run.status}: cannot be compared")
        return [[run]]
    groups: dict[str, list[Run]] = {}
    for run in list_runs(root, experiment, [command], note):
        if not run.completed:
            note(f"left out: {run.name}: is {run.status}")
        else:
            groups.setdefault(json.dumps(_described(run), sort_keys=True), []).append(run)
    if not groups:
        raise BadInput(f"{name}: there are no finished runs; `kd runs` lists what there is")
    return list(groups.values())


def _texts(group: Sequence[Run]) -> list[str]:
    """What `--match` looks through: the names of a group's runs, and its settings as `a.b=value`."""

    def flat(settings: Document, prefix: str) -> list[str]:
        return [
            line
            for key, value in settings.items()
            for line in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"])
        ]

    return [*(run.name for run in group), *flat(_described(group[0]), "")]


def _described(run: Run) -> Document:
    """What a run is but for its seed and those of its parents."""
    parents = []
    for name in run.spec.parents:
        try:
            parents.append(_described(open_run(run.root, name)))
        except BadInput:
            parents.append({"command": name.split("/")[1]})
    role = "members" if run.spec.command == "ensemble" else "teacher"
    of_parents = {role: {"number": len(parents)} | parents[0]} if parents else {}
    return {"command": run.spec.command} | run.spec.settings | of_parents


def _changed(reference: Document, settings: Document, prefix: str = "") -> Document:
    """The settings that differ, by dotted key, as [reference's, its own]; of a teacher that only one has, its kind."""
    changed: Document = {}
    for key in dict.fromkeys([*reference, *settings]):
        a, b = reference.get(key), settings.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= _changed(a, b, f"{prefix}{key}.")
        elif a != b:
            kinds = [v["command"] if isinstance(v, dict) and "command" in v else v for v in (a, b)]
            changed[prefix + key] = kinds
    return changed


def _seeds(reference: Sequence[Run], group: Sequence[Run]) -> Document:
    """The seeds of two single runs, where they differ."""
    pair = [reference[0].spec.seed, group[0].spec.seed]
    return {"seed": pair} if len(reference) == len(group) == 1 and pair[0] != pair[1] else {}


def _group(letter: str, runs: Sequence[Run]) -> Document:
    return {
        "group": letter,
        "name": runs[0].name if len(runs) == 1 else runs[0].name.rpartition("/")[0],
        "runs": [run.name for run in runs],
        "seeds": [run.spec.seed for run in runs],
        **spread([run.result["test"]["errors"] for run in runs]),
    }


def _compared(reference: Sequence[Run], group: Sequence[Run], data_dir: Path | None) -> Document:
    """The verdict on a group against another: over the seeds that they share, or of two single runs."""
    pairs = [(a, b) for a in reference for b in group if a.spec.seed == b.spec.seed]
    if len(reference) == len(group) == 1:
        pairs = [(reference[0], group[0])]
    if not pairs:
        return {"why_not": "The groups share no seed: nothing to pair, so no verdict."}
    fewer = [a.result["test"]["errors"] - b.result["test"]["errors"] for a, b in pairs]
    only = {"fixed": 0, "broken": 0}
    if len(pairs) == 1:
        data = Data(**pairs[0][0].spec.settings["data"])
        labels = loaded(data, data_dir, torch.device("cpu")).test.labels
        only = discordant(labels, pairs[0][1], pairs[0][0])
    return {"seeds": [run.spec.seed for run, _ in pairs]} | paired(fewer, **only)._asdict()
