"""The runs of an experiment, described once: dry-run, training, resuming, tables and report all read this list."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from kdcli import BadInput, BadKeys, Note, code, losses, yamlfile
from kdcli.config import AUGMENTATION, Ensemble, Experiment, Kind, Model, Omission, Origin, Row, Section, nearest
from kdcli.data.dataset import Dataset
from kdcli.machine.device import seeded
from kdcli.nets import models
from kdcli.runs.directory import Places, Run, list_runs, open_run, orphaned
from kdcli.runs.spec import (
    COMMANDS,
    STUDENTS,
    TEACHERS,
    Command,
    Facts,
    Result,
    Spec,
    data_settings,
    differences,
    settings,
)
from kdcli.teachers import imports
from kdcli.teachers.teacher import check_code, members, weights_checksum

KINDS: dict[Command, Kind] = {
    "train-teacher": "teacher",
    "ensemble": "ensemble",
    "baseline": "baseline",
    "distill": "student",
    "omit-classes": "omission",
}


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
    jobs = [job for i, point in enumerate(points) for job in _Planner(point, dataset, teacher).jobs(i)]
    order = ("teacher", "member", "baseline", "ensemble", "student", "omission")
    return sorted(jobs, key=lambda job: order.index(job.row.kind))


class _Planner:
    """The specs of one point; those that others are made from are built once."""

    def __init__(self, experiment: Experiment, dataset: Dataset, named: Run | None) -> None:
        self.experiment, self.dataset, self.named = experiment, dataset, named
        self.of = experiment.ensemble or Ensemble(members=2)  # the latter for no row
        self.net, self.ensemble = cache(self._net), cache(self._ensemble)

    def jobs(self, point: int) -> Iterator[Job]:
        e, teacher = self.experiment, self.experiment.distill.teacher
        makers: dict[str, Callable[[int], list[Spec]]] = {
            "teacher": lambda seed: [self.net("teacher", seed)],
            "baseline": lambda seed: [self.net("baseline", seed)],
            "member": partial(self.members, "teacher"),
            "member of the baselines": partial(self.members, "baseline"),
            "ensemble": lambda seed: [self.ensemble("teacher", seed)],
            "ensemble of baselines": lambda seed: [self.ensemble("baseline", seed)],
            "student": partial(self.student, teacher, None),
            "student of ensemble": partial(self.student, "ensemble", None),
        }
        makers |= {entry.label: partial(self.student, teacher, entry) for entry in e.omit_classes}
        for row, seed in product(e.rows, e.seed):
            if row.kind == "teacher" and seed != e.seed[0] and not e.teacher.train:
                continue  # it is the same for all
            for spec in makers[row.name](seed):
                beside = self.taught_by(teacher, spec.seed) if spec.command == "baseline" else None
                yield Job(row, spec, point, spec.parents[0] if spec.distill else beside)

    def spec(self, command: Command, seed: int, **more: Any) -> Spec:
        e, data, facts = self.experiment, self.experiment.data, self.dataset.facts
        held = command == "omit-classes" or data.evaluate_on == "heldout"
        seen: dict[str, Any] = {"heldout": self.dataset.held if held else None}
        seen["transfer"] = data.transfer if command in STUDENTS else None
        origin: Origin | None = more.get("origin")
        if "distill" not in more and not (origin and origin.logits):  # only students see what nobody labelled
            seen["unlabelled"], facts = None, facts.model_copy(update={"unlabelled": None})
        model: Model | None = more.get("model")
        if model and model.file:
            more["code"] = code.digest(model.name or "")
        where = data.model_copy(update=seen)
        return Spec(experiment=e.name, command=command, seed=seed, dataset=facts, data=where, **more)

    def _net(self, kind: str, seed: int, number: int = 0) -> Spec:
        """A baseline, or the teacher of this number: the experiment's, then its members. One that is not trained here
        has no seed."""
        e = self.experiment
        if kind == "baseline":
            return self.spec("baseline", seed, model=e.student.model, train=e.baseline.train or e.student.train)
        teacher = [e.teacher, *self.of.teachers(e.teacher)][number]
        more: dict[str, Any] = {"model": teacher.model, "train": teacher.train}
        if origin := teacher.origin:
            more["origin"], more["content"] = imports.resolved(origin, teacher.model)
        return self.spec("train-teacher", seed if teacher.train else 0, **more)

    def members(self, kind: str, seed: int) -> list[Spec]:
        """The members with this seed, the next, …"""
        own = kind == "teacher" and bool(self.of.models or isinstance(self.of.members, list))
        return [self.net(kind, seed + i, i + 1 if own else 0) for i in range(self.of.number)]

    def _ensemble(self, kind: str, seed: int) -> Spec:
        names = [member.name for member in self.members(kind, seed)]
        weights = self.of.weights if kind == "teacher" else []
        return self.spec("ensemble", seed, average=self.of.average, parents=names, weights=weights)

    def taught_by(self, teacher: str, seed: int) -> str:
        """The teacher of the same seed, the one ensemble, that of the first seed, or the run that was named."""
        if self.named and teacher == self.experiment.distill.teacher:
            return self.named.name
        if teacher == "ensemble":
            return self.ensemble("teacher", self.experiment.seed[0]).name
        return self.net("teacher", seed).name

    def student(self, teacher: str, entry: Omission | None, seed: int) -> list[Spec]:
        e = self.experiment
        more: dict[str, Any] = {"model": e.student.model, "train": (entry and entry.train) or e.student.train}
        how: dict[str, Any] = {"teacher": "teacher"}  # the parents say which
        how |= {} if more["train"].augmented else {"views": None, "half": False}
        more["distill"] = e.distill.model_copy(update=how)
        more["parents"] = [self.taught_by(teacher, seed)]
        if e.distill.file:
            more["loss_code"] = code.digest(e.distill.loss)
        if entry:
            more["omitted"] = entry.omitted(self.dataset.facts.classes)
        return [self.spec("omit-classes" if entry else "distill", seed, **more)]


def part(jobs: Sequence[Job], command: str, baseline: bool = True) -> list[Job]:
    """The jobs that a command is about, and of `ensemble` and `run` those that they are made from."""
    rows = {"train-teacher": ["teacher"], "ensemble": ["ensemble"], "distill": ["student"]}
    if command == "distill" and baseline:
        rows["distill"].append("baseline")
    chosen = [job for job in jobs if job.row.name in rows.get(command, ())]
    if command == "omit-classes":
        chosen = [job for job in jobs if job.row.kind == "omission"]
    elif command not in rows:  # of an ensemble only that of the first seed
        others = [job for job in jobs if job.row.kind != "member"]
        first = next((job.spec.seed for job in jobs if job.row.kind == "ensemble"), None)
        chosen = [job for job in others if job.row.kind != "ensemble" or job.spec.seed == first]
    if command in ("ensemble", "run", "report"):
        needed = {name for job in chosen for name in job.spec.parents} - {job.spec.name for job in chosen}
        chosen = [job for job in jobs if job.row.kind == "member" and job.spec.name in needed] + chosen
    return chosen


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Of the jobs of one and the same run the first alone."""
    found: dict[str, Job] = {}
    for job in jobs:
        found.setdefault(job.spec.name, job)
    return list(found.values())


# What depends on the data and the nets, checked before anything is trained.


def check(experiment: Experiment, dataset: Dataset) -> None:
    """Raise BadKeys for what cannot be done with this dataset: all of it at once."""
    found = [*_of_nets(experiment, dataset), *_of_omissions(experiment, dataset.facts.classes)]
    found += _of_loss(experiment, len(dataset.facts.classes))
    if found := found or list(_of_sizes(experiment, dataset)):
        raise BadKeys(*found)


def _of_nets(e: Experiment, dataset: Dataset) -> Iterator[tuple[str, str]]:
    student, (_, height, width) = e.student.model, dataset.facts.shape
    of_members, teachers = (e.ensemble and e.ensemble.models) or [], e.teachers
    of_teachers = {section: teacher.train for section, teacher in teachers.items() if teacher.train}
    for section, train in {**of_teachers, **e.student_trains}.items():
        for key, times, of in (("jitter", 2, "half of "), ("elastic", 2, "half of "), ("cutout", 1, "")):
            if times * (getattr(train, key) or 0) >= min(height, width) and not dataset.facts.table:
                yield f"{section}.train.{key}", f"must be less than {of}the {height} x {width} pixels of the images"
        for key in AUGMENTATION if dataset.facts.table else ():
            if key != "mixup" and getattr(train, key):
                yield f"{section}.train.{key}", "belongs to images, and this is a table: remove it"
        nets = [teachers[section].model if section in teachers else student]
        nets += of_members if section == "teacher" else []
        if train.max_norm and any(net and net.name for net in nets):
            yield f"{section}.train.max_norm", "is for multi-layer perceptrons (hidden: …): remove it"
    own = {f"{key}.model": t.model for key, t in teachers.items() if t.model and not t.origin}
    own |= {"student.model": student}
    made = {f"ensemble.models.{i}": e.teacher.model_copy(update={"model": m}) for i, m in enumerate(of_members)}
    own |= {key: teacher.model for key, teacher in made.items() if teacher.model and not teacher.origin}
    for key, teacher in teachers.items():
        yield from imports.problems(key, teacher, dataset)
    for key, teacher in made.items():  # its weights, input and classes are the teacher's
        yield from ((key, f"read as teacher says: {message}") for _, message in imports.problems(key, teacher, dataset))
    for key, model in own.items():
        if message := try_net(model, dataset.facts)[1]:
            yield f"{key}.name", message


@cache
def try_net(model: Model, facts: Facts) -> tuple[int, str]:
    """How many parameters the net of a model section has, and why it cannot classify the images of a dataset, empty if
    it can; a perceptron can, and is not built."""
    if model.hidden is not None:
        widths = [math.prod(facts.shape), *model.hidden, len(facts.classes)]
        return sum((n + 1) * m for n, m in pairwise(widths)), ""
    try:
        with seeded(0, "sample"):
            net = models.build(model, facts)
        models.fits(net, model, facts)
    except BadInput as error:
        return 0, str(error).removeprefix("model: ")
    return sum(p.numel() for p in net.parameters()), ""


def _of_loss(e: Experiment, classes: int) -> Iterator[tuple[str, str]]:
    mixed = {bool(train.mixup) for train in e.taught_trains.values()}
    try:
        for mixup in sorted(mixed):
            losses.try_loss(e.distill, classes, bool(e.data.unlabelled), mixup)
    except BadInput as error:
        yield "distill.standardize" if e.distill.standardize else "distill.loss", str(error)


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
        yield "data.transfer", f"must be at most {len(dataset.train)}; the default is all images"


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
    found = []
    for job in distinct(jobs):
        spec, more = job.spec, dict[str, int]()
        if spec.model and spec.train:
            n, size = len(dataset.seen(spec)), spec.train.batch_size
            more = {"samples": n, "batch_size": size, "steps": spec.train.steps(n) * spec.train.epochs}
            more["parameters"] = try_net(spec.model, spec.dataset)[0]
        found.append(Planned(run=spec.name, row=job.row.name, status=Run(runs_dir, spec).status(), **more))
    return found


# What is there and can be used.


def unfinished(jobs: Iterable[Job], places: Places) -> list[Run]:
    """The runs of some jobs that are still to be trained, each once."""
    runs = [Run(places.runs_dir, job.spec) for job in distinct(jobs)]
    return [run for run in runs if run.finished() is None]


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


def there(root: Path, name: str) -> Run | None:
    """The run of this name, if it is finished and, of an ensemble, so are its members; None if it is not."""
    run = open_run(root, name) if (root / name).is_dir() else None
    return run if run and run.finished() and not orphaned(run) else None


def find_teacher(places: Places, name: str) -> Run:
    """The run that --teacher names. Raises BadInput when there is none, or it is no teacher."""
    run = places.open(name, "--teacher")
    if (kind := run.spec.command) not in TEACHERS:
        raise BadInput(f"--teacher {name}: is a {kind} run; a teacher is a train-teacher or ensemble run")
    run.result("a teacher")
    if any(member.spec.command != "train-teacher" for member in members(run)):
        raise BadInput(f"--teacher {name}: is an ensemble of baselines, which are no teachers")
    return run


def unanswered(teacher: Run, student: Spec) -> str:
    """What a student sees that a teacher, if it is a file of logits, has no answers for; else empty."""
    files = [run.spec for run in members(teacher) if run.spec.origin and run.spec.origin.logits]
    if files and student.trained[1].augmented:
        return "views of the images: remove what augments the student's train"
    pool = student.dataset.unlabelled
    if pool and any(spec.dataset.unlabelled != pool for spec in files):
        return "these unlabelled images: leave --teacher out"
    return ""


def made_from(jobs: Sequence[Job], planned: Sequence[Job]) -> list[Job]:
    """The planned runs that jobs are made from, directly or not, and that are none of them."""
    by_name, asked = {job.spec.name: job for job in planned}, [name for job in jobs for name in job.spec.parents]
    for name in asked:  # the members of an ensemble follow it
        asked += by_name[name].spec.parents if name in by_name else []
    needed = {*asked} - {job.spec.name for job in jobs}
    return [job for job in distinct(planned) if job.spec.name in needed]


def refuse_missing(
    teachers: Sequence[Job], students: Sequence[Spec], places: Places, retype: str, time: str, note: Note
) -> None:
    """Raise BadInput for teachers that are not finished: a line for those of a kind, with what to type and how long
    that takes; then the runs that come close, how they differ, and how to use one for the students."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in (Run(places.runs_dir, job.spec) for job in teachers):
        alike.setdefault((run.spec.command, run.status()), []).append(run)
    lines = []
    for (command, status), runs in alike.items():
        seeds, name = yamlfile.spelt([run.spec.seed for run in runs]), runs[0].name
        who, is_, has, them = f"teacher {name}:", "is", "has", "it"
        if len(runs) > 1:
            who, is_, has, them = f"{len(runs)} teachers, {name} and on (seeds {seeds}),", "are", "have", "them"
        typed = f"train {them}: kd {command} {retype} --seed {seeds}, or add --with-teacher (about {time} here)"
        told = f"{is_} {status}; {f'wait for {them}' if status == 'running' else typed}"
        if status == "diverged":  # which it would do again
            told = f"{has} diverged: lower teacher.train.lr ({runs[0].spec.trained[1].lr:g})"
        lines.append(f"{who} {told}")
    wanted = [Run(places.runs_dir, job.spec) for job in teachers]
    close = sorted(dict.fromkeys(one for run in wanted for one in _close_runs(run, students, note)))
    raise BadInput(*lines, *(f"  similar run: {line}" for _, _, line in close[:3]))


def held_to(result: Result, most: float | None) -> Result:
    """The result of a teacher that was trained elsewhere, with a warning where it makes more errors than expected."""
    if not result.reading or most is None or result.test.errors <= most:
        return result
    line = f"It makes {result.test.errors:,} errors on {result.on}, where at most {most:g} are expected: is it misread?"
    reading = result.reading.model_copy(update={"warnings": [*result.reading.warnings, line]})
    return result.model_copy(update={"reading": reading})


def cautions(jobs: Sequence[Job], planned: Sequence[Job], places: Places) -> Iterator[str]:
    """What speaks against trainings that are still to be done: learning rates at which nothing is learned, and a
    teacher of smoothed labels."""
    by_name, todo = {job.spec.name: job.spec for job in planned}, [run.spec for run in unfinished(jobs, places)]
    for lr in dict.fromkeys(spec.train.lr for spec in todo if spec.train and spec.train.lr > 10):
        yield f"train.lr: {lr:g} is very large: rates from 0.0001 to 1 are usual"
    asked = [name for spec in todo if spec.distill for name in spec.parents]
    for name in asked:  # the members of an ensemble follow it
        spec = by_name.get(name) or places.open(name).spec
        asked += spec.parents
        if spec.train and spec.train.label_smoothing:
            said = f"{name}: is a teacher with a label_smoothing of {spec.train.label_smoothing:g}"
            yield f"{said}, which hurts its students (arXiv:1906.02629): better train it without"
            return


def doubts(teachers: Iterable[Job], expect: dict[str, float], places: Places) -> Iterator[str]:
    """What speaks against finished teachers that were trained elsewhere: that they seem to be misread, or make more
    errors than the experiment expects."""
    for job in distinct(teachers):
        result = places.open(job.spec.name).result("a teacher")
        for line in held_to(result, expect.get(job.row.name)).warnings if result.reading else ():
            yield f"{result.run}: {line}"


def _close_runs(wanted: Run, students: Sequence[Spec], note: Note) -> list[tuple[int, bool, str]]:
    """The other runs of the same command: in how many settings they differ from the wanted one, whether they are
    unfinished, and how they differ."""

    def described(spec: Spec) -> dict[str, Any]:
        return settings(spec) | {"seed": spec.seed} | ({"members": len(spec.parents)} if spec.parents else {})

    def made_of(spec: Spec) -> set[str]:
        """What an ensemble's members are: teachers, or baselines, which are none."""
        return {name.split("/")[1] for name in spec.parents}

    found = []
    for run in list_runs(wanted.root, wanted.spec.experiment, [wanted.spec.command], note):
        unlike = differences(described(wanted.spec), described(run.spec)) or ["other members"]
        if run.name != wanted.name and made_of(run.spec) == made_of(wanted.spec):
            status = run.status()
            can = status == "completed" and data_settings(wanted.spec) == data_settings(run.spec)
            can = can and not orphaned(run) and not any(unanswered(run, student) for student in students)
            use = f" (to use it: --teacher {run.name})" if can else ""
            found.append((len(unlike), status != "completed", f"{run.name} ({status}), with {'; '.join(unlike)}{use}"))
    return found


def evaluable(
    planned: Sequence[Job], places: Places, names: Sequence[str], seeds: Sequence[int] | None, retype: str, note: Note
) -> list[Job]:
    """Every finished run of the experiment (of these seeds, if any are given), or the named ones, each with the run
    that it is compared with, at a point of its own: they are of no one plan. Unnamed runs of other data, damaged or
    without their parents are noted and left out. Raises BadInput when there is none."""
    like = planned[0].spec
    runs = [_judged(places.open(name, "--run"), like) for name in names]
    if twice := [run.name for run in runs if runs.count(run) > 1]:
        raise BadInput(f"--run: names {twice[0]} twice")

    @cache
    def left_out(name: str, why: str) -> None:
        note(f"left out: {name}: {why.removeprefix(f'{name}: ')}")

    @cache
    def teacher(name: str) -> str | None:
        try:
            found = there(places.runs_dir, name)
            return _judged(found, like).name if found else None
        except BadInput as error:
            left_out(name, str(error))
            return None

    for run in [] if names else list_runs(places.runs_dir, like.experiment, COMMANDS, note):
        try:
            if (seeds is None or run.spec.seed in seeds) and run.finished():
                runs.append(_judged(run, like))
        except BadInput as error:
            left_out(run.name, str(error))
    if not runs:
        of = f" of seed {', '.join(map(str, seeds))}" if seeds is not None else ""
        raise BadInput(f"{places.runs_dir / like.experiment}: no finished runs{of}; train some: kd run {retype}")
    described = {job.spec.seed: job.teacher for job in planned if job.spec.command == "baseline"}
    jobs = []
    for i, run in enumerate(runs):
        spec, kind = run.spec, KINDS[run.spec.command]
        beside = spec.parents[0] if spec.distill else described.get(spec.seed) if kind == "baseline" else None
        jobs.append(Job(Row(kind, kind), spec, i, beside and teacher(beside)))
    return jobs


def _judged(run: Run, like: Spec) -> Run:
    """The run itself, if it is finished and can be evaluated. Raises BadInput."""
    if gone := orphaned(run):
        raise BadInput(f"{run.name}: {gone}")
    run.counted("evaluated")
    check_code(run)
    return usable(run, like, "evaluated")
