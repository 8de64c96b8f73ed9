"""The runs of an experiment, described once: dry-run, training, resuming, tables and report all read this list."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kdcli import BadInput, BadKeys, code, models
from kdcli.config import Experiment, Kind, Model, Row, Section, nearest
from kdcli.data import Dataset
from kdcli.device import seeded
from kdcli.runs import STUDENTS, TEACHERS, Command, Places, Run, Spec, differences, list_runs, open_run, settings
from kdcli.teacher import members, weights_checksum

COMMANDS: dict[Kind, Command] = {
    "teacher": "train-teacher",
    "member": "train-teacher",
    "ensemble": "ensemble",
    "baseline": "baseline",
    "student": "distill",
    "omission": "omit-classes",
}
KINDS: dict[Command, Kind] = {command: kind for kind, command in COMMANDS.items() if kind != "member"}


@dataclass(frozen=True)
class Job:
    """One run, in its row of the table and, of a grid, its point. `teacher` is the run that it learns from or, of a
    baseline, that the student beside it learns from."""

    row: Row
    spec: Spec
    point: int = 0
    teacher: str | None = None


def plan(points: Sequence[Experiment], dataset: Dataset, teacher: Run | None = None) -> list[Job]:
    """Every run that the points of a grid describe (without one, the only point), those that others need first.
    `teacher`: the run that students learn from in place of the one that the file describes."""
    jobs = [job for i, point in enumerate(points) for job in _Planner(point, dataset, i, teacher).jobs()]
    order = ("teacher", "member", "baseline", "ensemble", "student", "omission")
    return sorted(jobs, key=lambda job: order.index(job.row.kind))


@dataclass(frozen=True)
class _Planner:
    """The specs of one point."""

    experiment: Experiment
    dataset: Dataset
    point: int
    named: Run | None

    def jobs(self) -> list[Job]:
        return [job for row in self.experiment.rows for seed in self.experiment.seed for job in self._jobs(row, seed)]

    def _jobs(self, row: Row, seed: int) -> list[Job]:
        """The job of a row with a seed; of a row of members, one each."""
        match row.kind:
            case "teacher":
                specs = [self._teacher(seed)]
            case "member":
                specs = self._members(seed, row.of_baselines)
            case "ensemble":
                specs = [self._ensemble(seed, row.of_baselines)]
            case "baseline":
                specs = [self._baseline(seed)]
            case _:
                specs = [self._student(row, seed)]
        taught = [self._taught_by(row, s.seed) if s.command in STUDENTS else None for s in specs]
        return [Job(row, spec, self.point, teacher) for spec, teacher in zip(specs, taught, strict=True)]

    def _spec(self, command: Command, seed: int, **more: Any) -> Spec:
        e, data = self.experiment, self.experiment.data
        held = more.pop("heldout", data.evaluate_on == "heldout")
        where = data.model_copy(
            update={"heldout": self.dataset.held if held else None, "transfer": more.pop("transfer", None)}
        )
        model: Model | None = more.get("model")
        if model and model.name:
            more["code"] = code.digest(model.name)
        return Spec(experiment=e.name, command=command, seed=seed, dataset=self.dataset.facts, data=where, **more)

    def _teacher(self, seed: int, model: Model | None = None) -> Spec:
        teacher = self.experiment.teacher
        return self._spec("train-teacher", seed, model=model or teacher.model, train=teacher.train)

    def _members(self, seed: int, of_baselines: bool) -> list[Spec]:
        """The members with this seed, the next, …"""
        ensemble = self.experiment.ensemble
        assert ensemble
        if of_baselines:
            return [self._baseline(seed + i) for i in range(ensemble.members)]
        models = ensemble.models or [self.experiment.teacher.model]
        return [self._teacher(seed + i, models[i % len(models)]) for i in range(ensemble.members)]

    def _ensemble(self, seed: int, of_baselines: bool) -> Spec:
        ensemble = self.experiment.ensemble
        assert ensemble
        names = [member.name for member in self._members(seed, of_baselines)]
        return self._spec("ensemble", seed, average=ensemble.average, parents=names)

    def _taught_by(self, row: Row, seed: int) -> str:
        """The teacher of the same seed, the one ensemble, that of the first seed, or the run that was named."""
        described = self.experiment.distill.teacher
        if self.named and (row.learns_from or described) == described:
            return self.named.name
        if (row.learns_from or described) == "ensemble":
            return self._ensemble(self.experiment.seed[0], of_baselines=False).name
        return self._teacher(seed).name

    def _baseline(self, seed: int) -> Spec:
        e = self.experiment
        train, count = e.baseline.train or e.student.train, e.data.transfer
        return self._spec("baseline", seed, model=e.student.model, train=train, transfer=count)

    def _student(self, row: Row, seed: int) -> Spec:
        e, teacher = self.experiment, self._taught_by(row, seed)
        more: dict[str, Any] = {"distill": e.distill.model_copy(update={"teacher": "teacher"}), "parents": [teacher]}
        more |= {"model": e.student.model, "train": e.student.train, "transfer": e.data.transfer}
        if row.kind == "omission":
            entry = e.omit_classes[row.entry]
            omitted = entry.omitted(self.dataset.facts.classes)
            more |= {"train": entry.train or e.student.train, "omitted": omitted, "heldout": True}
        return self._spec(COMMANDS[row.kind], seed, **more)


def part(jobs: Sequence[Job], command: str, baseline: bool = True) -> list[Job]:
    """The jobs that a command is about, and of `ensemble` and `run` those that they are made from."""
    first = jobs[0].spec.seed

    def wanted(job: Job) -> bool:
        row = job.row
        match command:
            case "train-teacher":
                return row.kind == "teacher"
            case "ensemble":
                return row.kind == "ensemble" and not row.of_baselines
            case "distill":
                return row.name == "student" or (baseline and row.kind == "baseline")
            case "omit-classes":
                return row.kind == "omission"
        return row.kind != "member" and (row.kind != "ensemble" or job.spec.seed == first)

    chosen = [job for job in jobs if wanted(job)]
    if command in ("ensemble", "run", "report"):
        needed = {name for job in chosen for name in job.spec.parents}
        have = {job.spec.name for job in chosen}
        chosen = [job for job in jobs if job.row.kind == "member" and job.spec.name in needed - have] + chosen
    return chosen


def distinct(jobs: Iterable[Job]) -> list[Spec]:
    """The specs of jobs, each once, in order."""
    return list({job.spec.name: job.spec for job in jobs}.values())


# What depends on the data and the nets, checked before anything is trained.


def check(experiment: Experiment, dataset: Dataset) -> None:
    """Raise BadKeys for what cannot be done with this dataset: all of it at once."""
    found = [*_of_nets(experiment, dataset), *_of_omissions(experiment, dataset.facts.classes)]
    if found := found or list(_of_sizes(experiment, dataset)):
        raise BadKeys(*found)


def _of_nets(e: Experiment, dataset: Dataset) -> Iterator[tuple[str, str]]:
    student, (_, height, width) = e.student.model, dataset.facts.shape
    trains = {"teacher": (e.teacher.train, e.teacher.model), "student": (e.student.train, student)}
    own = {"baseline": e.baseline.train} | {f"omit_classes.{i}": entry.train for i, entry in enumerate(e.omit_classes)}
    trains |= {section: (train, student) for section, train in own.items() if train}
    for section, (train, model) in trains.items():
        if 2 * train.jitter >= min(height, width):
            yield f"{section}.train.jitter", f"is too far for images of {height} x {width} pixels"
        if train.max_norm and model.name:
            yield f"{section}.train.max_norm", "is for multi-layer perceptrons (hidden: …): remove it"
    nets = {"teacher.model": e.teacher.model, "student.model": student}
    nets |= {f"ensemble.models.{i}": m for i, m in enumerate((e.ensemble and e.ensemble.models) or [])}
    for key, model in nets.items():
        shape, classes = tuple(dataset.facts.shape), len(dataset.facts.classes)
        if model.name and (message := _net_problem(model.model_dump_json(exclude_unset=True), shape, classes)):
            yield f"{key}.name", message


@cache
def _net_problem(model: str, shape: tuple[int, ...], classes: int) -> str:
    """Why the net of a model section (as JSON) cannot classify images of this shape; empty if it can."""
    section = Model.model_validate_json(model)
    try:
        models.fits(sample_net(section, shape, classes), section, shape, classes)
    except BadInput as error:
        return str(error).removeprefix("model: ")
    return ""


def _of_omissions(experiment: Experiment, classes: list[str]) -> Iterator[tuple[str, str]]:
    seen: dict[tuple[str, ...], str] = {}
    for i, entry in enumerate(experiment.omit_classes):
        key, omitted = f"omit_classes.{i}.{'omit' if entry.omit else 'keep'}", tuple(entry.omitted(classes))
        if unknown := [c for c in entry.named if c not in classes]:
            yield key, f"there is no class {unknown[0]}{nearest(unknown[0], classes)}"
        elif len(omitted) in (0, len(classes)):
            yield key, f"must leave one class out and one in, not {entry.named}"
        elif omitted in seen:
            yield "omit_classes", f"names the same classes twice: {seen[omitted]}, {entry.label}"
        seen.setdefault(omitted, entry.label)


def _of_sizes(e: Experiment, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Held-out images and transfer sets that leave a class without any."""
    key = "data.heldout"
    try:
        if e.omit_classes:
            _ = dataset.heldout
        key = "data.transfer"
        for omitted in [[], *(entry.omitted(dataset.facts.classes) for entry in e.omit_classes)]:
            dataset.transfer_set(omitted, e.data.transfer)
    except BadInput as error:
        yield key, str(error)
    if e.data.transfer and e.data.transfer > len(dataset.train):
        yield "data.transfer", f"must be at most {len(dataset.train)}; left out it is all images"


def sample_net(model: Model, shape: Sequence[int], classes: int) -> torch.nn.Module:
    """A net to count and to try, not to train: a perceptron without memory for its weights."""
    with torch.device("meta" if model.hidden is not None else "cpu"), seeded(0, "sample"):
        return models.build(model, shape, classes)


class Planned(Section):
    """A run as `--dry-run` shows it."""

    run: str
    row: str
    status: str
    parameters: int | None = None
    samples: int | None = None
    steps: int | None = None
    batch_size: int | None = None


def describe(jobs: Sequence[Job], dataset: Dataset, runs_dir: Path) -> list[Planned]:
    """Each run of some jobs, once: what it is, whether it is there, and its size."""

    @cache
    def parameters(model: str) -> int:
        net = sample_net(Model.model_validate_json(model), dataset.facts.shape, len(dataset.facts.classes))
        return sum(p.numel() for p in net.parameters())

    rows, found = {job.spec.name: job.row.name for job in reversed(jobs)}, []
    for spec in distinct(jobs):
        more: dict[str, int] = {}
        if spec.model and spec.train:
            n, size = len(dataset.transfer_set(spec.omitted, spec.data.transfer)), spec.train.batch_size
            more = {"samples": n, "batch_size": size, "steps": math.ceil(n / size) * spec.train.epochs}
            more["parameters"] = parameters(spec.model.model_dump_json(exclude_unset=True))
        status = Run(runs_dir, spec).status()
        found.append(Planned(run=spec.name, row=rows[spec.name], status=status, **more))
    return found


# What is there and can be used.


def usable(run: Run, like: Spec, role: str) -> Run:
    """The run itself, if it is finished, whole, of the same data as `like`, and made from the weights that its parents
    have; else raises BadInput."""
    result = run.result(role)
    if unlike := differences(data_settings(like), data_settings(run.spec), "data."):
        raise BadInput(f"{run.name}: cannot be {role} in this experiment: {'; '.join(unlike)}")
    for member in members(run):
        member.result(f"{role}: {run.name} is made from it" if member.name != run.name else role)
        for kind in ("weights", "logits"):
            member.load(kind)
    for name, checksum in result.parents.items():
        parent = there(run.root, name)
        if parent and weights_checksum(parent) != checksum:
            raise BadInput(f"{run.name}: was made from other weights than {name} has now: {run.remedy}")
    return run


def data_settings(spec: Spec) -> dict[str, Any]:
    """What two runs must share to be compared: the images, and which of them are trained and counted on."""
    data: dict[str, Any] = settings(spec)["data"]
    if spec.data.evaluate_on == "test":
        data.pop("heldout", None)
    data.pop("transfer", None)
    return data


def orphaned(run: Run) -> str:
    """The members that an ensemble needs and that are gone; empty if all are there."""
    names = run.spec.parents if run.spec.command == "ensemble" else []
    return ", ".join(f"its member {name} is gone" for name in names if not (run.root / name).is_dir())


def there(root: Path, name: str) -> Run | None:
    """The run of this name, if it is finished and, of an ensemble, so are its members; None if it is not."""
    run = open_run(root, name) if (root / name).is_dir() else None
    return run if run and run.finished() and not orphaned(run) else None


def find_teacher(places: Places, name: str | None) -> Run | None:
    """The run that --teacher names. Raises BadInput when there is none, or it is no teacher."""
    if name is None:
        return None
    run = places.open(name, "--teacher")
    if run.spec.command not in TEACHERS:
        kind = run.spec.command
        raise BadInput(f"--teacher {name}: is a {kind} run; a teacher is a train-teacher or ensemble run")
    run.result("a teacher")
    return run


def require_teachers(
    jobs: Sequence[Job], planned: Sequence[Job], places: Places, retype: str, note: Callable[[str], None]
) -> None:
    """Raise BadInput where a run that jobs are made from is neither one of them nor finished: with the runs that come
    close, how they differ, and what to type."""
    have, specs = {job.spec.name for job in jobs}, {job.spec.name: job.spec for job in planned}
    needed = dict.fromkeys(name for job in jobs for name in job.spec.parents if name not in have)
    lines: list[str] = []
    absent = [name for name in needed if name in specs and Run(places.runs_dir, specs[name]).finished() is None]
    seeds = ",".join(dict.fromkeys(str(specs[name].seed) for name in absent))
    for name in absent:
        run = Run(places.runs_dir, specs[name])
        if run.status() == "running":
            lines.append(f"teacher {name}: is being trained; wait for it")
            continue
        typed = f"kd {run.spec.command} {retype} --seed {seeds}"
        lines += [f"teacher {name}: is {run.status()}; train it: {typed}"]
        lines += [f"  close: {line}" for line in _close_runs(run, note)]
    if lines:
        raise BadInput(*lines)
    for name in needed:
        usable(places.open(name), jobs[0].spec, "a teacher")


def _close_runs(wanted: Run, note: Callable[[str], None]) -> list[str]:
    """The runs of the same command that differ least from the wanted one, and how."""

    def described(spec: Spec) -> dict[str, Any]:
        return settings(spec) | {"seed": spec.seed} | ({"members": len(spec.parents)} if spec.parents else {})

    found = []
    for run in list_runs(wanted.root, wanted.spec.experiment, [wanted.spec.command], note):
        unlike = differences(described(wanted.spec), described(run.spec)) or ["its members differ"]
        if run.name != wanted.name:
            status = run.status()
            found.append((len(unlike), status != "completed", f"{run.name} ({status}): {'; '.join(unlike)}"))
    return [line for _, _, line in sorted(found)[:3]]


def evaluable(
    planned: Sequence[Job],
    places: Places,
    names: Sequence[str],
    seeds: Sequence[int] | None,
    note: Callable[[str], None],
    retype: str,
) -> list[Job]:
    """Every finished run of the experiment (of these seeds, if any are given), or the named ones, each with the run
    that it is compared with, and a point of its own: they are of no one plan. Unnamed runs of other data or without
    their parents are noted and left out. Raises BadInput when there is none."""
    experiment, facts = planned[0].spec.experiment, data_settings(planned[0].spec)
    runs = [places.open(name, "--run") for name in dict.fromkeys(names)]
    for run in [] if names else list_runs(places.runs_dir, experiment, (*TEACHERS, *STUDENTS), note):
        if run.finished() and (seeds is None or run.spec.seed in seeds):
            reason = "; ".join(differences(facts, data_settings(run.spec), "data.")) or orphaned(run)
            if reason:
                note(f"left out: {run.name}: {reason}")
            else:
                runs.append(run)
    if not runs:
        of = f" of seed {', '.join(map(str, seeds))}" if seeds is not None else ""
        raise BadInput(f"{places.runs_dir / experiment}: no finished runs{of}; train some: kd run {retype}")
    for run in runs:
        usable(run, planned[0].spec, "evaluated")
    described = {job.spec.seed: job.teacher for job in planned if job.spec.command == "baseline"}

    def beside(spec: Spec) -> str | None:
        if spec.command == "baseline":  # is held against the teacher that the experiment describes
            return described.get(spec.seed)
        return spec.parents[0] if spec.command in STUDENTS else None

    kinds = [KINDS[run.spec.command] for run in runs]
    rows = [Row(name=kind, kind=kind) for kind in kinds]
    return [Job(row, run.spec, i, beside(run.spec)) for i, (row, run) in enumerate(zip(rows, runs, strict=True))]
