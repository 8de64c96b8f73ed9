"""`kd compare`: runs, or groups of runs that differ in seed alone, side by side, with a verdict against the first."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from kdcli import BadInput, Note
from kdcli.config import Row, Section
from kdcli.evidence.verdict import Judged, Spread, corrected, paired, spread
from kdcli.runs.directory import Run, list_runs, open_run, orphaned
from kdcli.runs.spec import STUDENTS, TEACHERS, Settings, Spec, changes, data_settings, differences, settings

if TYPE_CHECKING:
    from kdcli.plan import Job  # which needs torch; several seeds do without


class Group(Spread):
    """One run, or runs that differ in seed alone, so that a seed is there once."""

    group: str = ""  # A, B, …
    name: str = ""
    runs: list[str]
    seeds: list[int]
    described: Settings = Field(exclude=True)  # what they are but for their seeds


class Difference(Judged):
    """A group against the first: the settings that differ, by dotted key, as [the first's, its own]; the verdict over
    the seeds that both have, if there are any."""

    group: str
    changed: dict[str, list[Any]]
    seeds: list[int]


class Comparisons(Section):
    """The document of `kd compare`."""

    command: str = "compare"
    evaluated_on: str
    total: int
    groups: list[Group]
    comparisons: Annotated[list[Difference], AfterValidator(corrected)]


def compare(
    root: Path, names: Sequence[str], data_dir: Path | None, note: Note, match: str = "", by_errors: bool = False
) -> Comparisons:
    """The groups of runs that the names stand for, the settings in which they differ, and a verdict on each against the
    first. A name is a run's, a group by itself, or `<experiment>/<command>`: its finished runs, in groups that differ
    in seed alone. After the first come those with `match` in a name or a `key=value` of theirs, as they were named or
    by their mean errors. Raises BadInput when there are not two groups, of one dataset."""
    found, typed = [_groups(root, name, note) for name in names], " ".join(names)
    named = sorted(run for groups in found for run in {run for group in groups for run in group.runs})
    if twice := [run for run in named if named.count(run) > 1]:
        raise BadInput(f"{typed}: names {twice[0]} twice")
    first, *others = [group for groups in found for group in groups]
    texts = ["\n".join([g.name, *g.runs, *(f"{k}={v}" for k, v in _dotted(g.described))]) for g in others]
    others = [group for group, text in zip(others, texts, strict=True) if match.lower() in text.lower()]
    if not 1 <= len(others) < len(ascii_uppercase):
        what = f"groups of finished runs{f' (with {match})' if match else ''}"
        raise BadInput(f"{typed}: kd compare needs 2 to 26 {what}, not {len(others) + 1}")
    groups = [first, *sorted(others, key=lambda group: group.mean if by_errors else 0)]
    groups = [g.model_copy(update={"group": letter}) for letter, g in zip(ascii_uppercase, groups, strict=False)]
    reference, *runs = [open_run(root, group.runs[0]) for group in groups]
    for run in runs:
        if unlike := differences(data_settings(reference.spec), data_settings(run.spec), "data."):
            raise BadInput(f"{typed}: cannot be compared: {unlike[0]}")
    result, compared = reference.result(), [_compared(root, groups[0], group, data_dir) for group in groups[1:]]
    return Comparisons(evaluated_on=result.evaluated_on, total=result.test.total, groups=groups, comparisons=compared)


def _groups(root: Path, name: str, note: Note) -> list[Group]:
    """The groups that a name stands for. Students of teachers of their own seeds are one group, students of one and the
    same teacher another: a run may be in both. A group that lies within another is left out."""
    experiment, _, command = name.strip("/").partition("/")
    several = command in (*TEACHERS, *STUDENTS)
    found: dict[str, tuple[Settings, list[Run]]] = {}
    for run in list_runs(root, experiment, [command], note) if several else [open_run(root, name)]:
        if several and (why := orphaned(run) or _uncounted(run)):
            note(f"left out: {run.name}: {why}")
            continue
        for way in _ways(run):
            found.setdefault(json.dumps(way, sort_keys=True), (way, []))[1].append(run)
    if not found:
        raise BadInput(f"{name}: there are no finished runs; `kd runs` lists what there is")
    groups: dict[frozenset[str], Group] = {}
    for way, alike in found.values():
        names, seeds = [run.name for run in alike], [run.spec.seed for run in alike]
        errors = spread([run.counted("compared").test.errors for run in alike])
        groups.setdefault(frozenset(names), Group(runs=names, seeds=seeds, described=way, **dict(errors)))
    widest = [group for runs, group in groups.items() if not any(runs < other for other in groups)]
    return [group.model_copy(update={"name": _name(group, widest)}) for group in widest]


def _uncounted(run: Run) -> str:
    """Why a run has no errors to compare; empty if it has."""
    if not (result := run.finished()):
        return f"status {run.status()}"
    return "" if result.test.total else "has no answers for the test images"


def _name(group: Group, groups: Sequence[Group]) -> str:
    """A group's only run, or the folder of its runs, with the settings that set it apart from the others."""
    unlike = {key: own for other in groups for key, (_, own) in changes(other.described, group.described)}
    run = group.runs[0]
    return _with(run if len(group.runs) == 1 else run.rpartition("/")[0], unlike)


def _with(name: str, unlike: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={own}" for key, own in unlike.items())])


def in_rows(jobs: "Sequence[Job]", planned: "Sequence[Job]", root: Path) -> "list[Job]":
    """Jobs in the rows of a plan, whatever their seeds; one that is not of the plan, in a row that says how it differs
    from the closest there or, of a command without any, from the first."""
    from kdcli.plan import distinct

    last = sorted(planned, key=lambda job: job.row.kind == "member")  # most are teachers with other seeds
    rows = {job.spec.name: job for job in distinct(last)}
    way = cache(lambda name: _way(Run(root, rows[name].spec)))
    first: dict[str, Settings] = {}

    def row(job: "Job") -> str:
        own = rows.get(job.spec.name)
        if own and own.row.kind != "member":
            return own.row.name
        mine = _way(Run(root, job.spec))
        ways = [(other.row.name, way(name)) for name, other in rows.items() if other.spec.command == job.spec.command]
        ways = ways or [(job.row.name, first.setdefault(job.spec.command, mine))]
        close = [(named, {key: value for key, (_, value) in changes(theirs, mine)}) for named, theirs in ways]
        return _with(*min(close, key=lambda pair: len(pair[1])))

    return [replace(job, row=Row(row(job), job.row.kind)) for job in jobs]


def _ways(run: Run) -> list[Settings]:
    """What a run is but for its seed; a student in two ways: with its teacher's seed against its own, and as it is. Of
    the members of an ensemble, of each key the value that all have, else the list of theirs."""
    found, parents = {"command": run.spec.command} | settings(run.spec), []
    for name in run.spec.parents:
        try:
            parent = _ways(open_run(run.root, name))[0]
        except BadInput:
            parent = _gone(run.root, name)
        seed = int(name.rpartition("/")[2].partition("-")[0])
        offset = seed - run.spec.seed
        parents.append([parent | {"seed": s} for s in (f"own {offset:+d}" if offset else "own", seed)])
    if run.spec.command != "ensemble":
        return [found | {"teacher": teacher} for teacher in parents[0]] if parents else [found]
    flat = [{key: value for key, value in _dotted(ways[0]) if key != "seed"} for ways in parents]
    columns = {key: [member.get(key) for member in flat] for key in dict.fromkeys(key for m in flat for key in m)}
    merged = {key: values[0] if values.count(values[0]) == len(values) else values for key, values in columns.items()}
    return [found | {"members": {"number": len(parents)} | merged}]


def _gone(root: Path, name: str) -> Settings:
    """What a run was that is gone: what another of its group is, if but for its seed it has the same name."""
    experiment, command, own = name.split("/")
    for run in list_runs(root, experiment, [command], lambda _: None):
        twin = run.spec.model_dump() | {"seed": int(own.partition("-")[0])}
        if Spec.model_validate(twin, context={"reading": True}).name == name:
            return _ways(run)[0]
    return {"command": f"{command} (gone)"}


def _way(run: Run) -> Settings:
    """What a run is but for its seed: students have teachers of their own seeds or, all of them, one ensemble or one
    that was trained elsewhere."""
    ways = _ways(run)
    teacher = ways[0].get("teacher", {})
    one = teacher.get("command", "").startswith("ensemble") or ("origin" in teacher and "train" not in teacher)
    return ways[-1 if one else 0]


def _dotted(found: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        yield from _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _compared(root: Path, first: Group, own: Group, data_dir: Path | None) -> Difference:
    """The verdict on a group against the first: over the seeds that they share, or of two single runs."""
    changed = dict(changes(first.described, own.described))
    pairs = [(i, own.seeds.index(seed)) for i, seed in enumerate(first.seeds) if seed in own.seeds]
    pairs = [(i, j) for i, j in pairs if first.runs[i] != own.runs[j]]  # a run in both tells nothing
    if len(first.runs) == len(own.runs) == 1:
        pairs, changed = [(0, 0)], dict(changes({"seed": first.seeds[0]}, {"seed": own.seeds[0]})) | changed
    only = (0, 0)
    if len(pairs) == 1:
        from kdcli import score  # these need torch, which several seeds do without
        from kdcli.evidence.results import log_probabilities
        from kdcli.teachers.teacher import dataset_of

        a, b = (open_run(root, group.runs[i]) for group, i in zip((first, own), pairs[0], strict=True))
        labels = dataset_of(a, data_dir).test.labels
        one, other = (log_probabilities(run, len(labels)) for run in (b, a))
        only = score.discordant(one, other, labels)
    fewer = [first.errors[i] - own.errors[j] for i, j in pairs]
    seeds = [first.seeds[i] for i, j in pairs if first.seeds[i] == own.seeds[j]]
    verdict = paired(fewer, *only) if pairs else None
    return Difference(group=own.group, changed=changed, seeds=seeds, verdict=verdict)
