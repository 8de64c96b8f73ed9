"""What a command is to do, known and checked before anything is trained; and the summary of what was done."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcli import BadInput, results, yamlfile
from kdcli.config import Experiment
from kdcli.data import Dataset, open_dataset
from kdcli.plan import Job, check, distinct, find_teacher, part, plan, usable
from kdcli.runs import Places, Run
from kdcli.yamlfile import Loaded, Override

NO_CHANGE = ("threads", "expect", "paper", "grid")  # sections that a `--set` may set though no run changes


@dataclass(frozen=True)
class Work:
    """A command's part of the plan, where it is done, and what its report is about."""

    subject: results.Subject
    folder: Path  # of the report
    dataset: Dataset
    planned: list[Job]  # all that the experiment describes
    jobs: list[Job]
    places: Places

    def unfinished(self) -> list[str]:
        """The names of the runs that are not there yet."""
        return [s.name for s in distinct(self.jobs) if Run(self.places.runs_dir, s).finished() is None]

    def summary(self) -> results.Summary:
        """What the finished jobs say together; members have no place in the table."""
        shown = [job for job in self.jobs if job.row.kind != "member"]
        found = results.documents(shown, self.dataset, self.places, costs=True)
        made = results.made(self.jobs, self.places)
        return results.summarise(self.subject, shown, found, self.dataset.facts.classes, made)


def prepare(
    command: str, name: str, overrides: list[Override], places: Places, teacher: str | None, baseline: bool, dry: bool
) -> Work:
    """Read the experiment and its data, check both, and plan. Raises BadInput for all that can be known before a run is
    trained. `teacher`: the run that --teacher names; `dry`: nothing is downloaded."""
    points = yamlfile.points(name, overrides)
    with points[0].located():
        dataset = open_dataset(points[0].experiment.data, places.data_dir, download=not dry)
    for point in points:
        with point.located():
            check(point.experiment, dataset)
    named = find_teacher(places, teacher)

    def planned(points: Sequence[Loaded]) -> list[Job]:
        data = open_dataset(points[0].experiment.data, places.data_dir, download=not dry)
        return plan([point.experiment for point in points], data, named)

    def before(override: Override) -> list[Job]:
        """The plan without it; none where it changes no setting, or the experiment cannot do without it."""
        try:
            others = yamlfile.points(name, [other for other in overrides if other is not override])
            same = [point.experiment for point in others] == [point.experiment for point in points]
            return [] if same else planned(others)
        except BadInput:
            return []

    whole, about = planned(points), _about(name, overrides, points, places.runs_dir)
    work = Work(*about, dataset, whole, part(whole, command, baseline), places)
    for override in overrides:
        if override.origin.startswith("--set ") and override.key.split(".")[0] not in NO_CHANGE:
            _refuse_idle(override, command, before(override), whole, points[0].experiment)
    return work


def _about(name: str, overrides: list[Override], points: list[Loaded], runs_dir: Path) -> tuple[results.Subject, Path]:
    """What the report of an experiment is about, and its folder: a trial's report replaces no other."""
    stem, own = Path(points[0].file).stem, points[0].experiment.name
    parts = ["report", *([stem] if stem != own else [])]
    if changes := [o.origin for o in overrides if o.key not in ("seed", "threads")]:
        parts.append(hashlib.sha256(repr(changes).encode()).hexdigest()[:6])
    subject = results.about(yamlfile.load(name, overrides).experiment, stem, [point.at for point in points])
    return subject, runs_dir / own / "-".join(parts)


def prepare_run(name: str, places: Places, note: Callable[[str], None]) -> Work:
    """The work of reporting one finished run beside its teacher and its baseline. Raises BadInput."""
    run = places.open(name)
    subject, jobs = results.about_run(run, note)
    for job in jobs:
        usable(places.open(job.spec.name), run.spec, "reported")
    dataset, folder = open_dataset(run.spec.data, places.data_dir), places.runs_dir / run.name / "report"
    return Work(subject, folder, dataset, jobs, jobs, places)


def _refuse_idle(override: Override, command: str, before: list[Job], after: list[Job], experiment: Experiment) -> None:
    """Raise BadInput for a `--set` that changes the experiment but nothing that the command does."""
    if not before or _does(before, command) != _does(after, command):
        return
    one, other = ([(j.row.name, j.spec.name) for j in jobs if j.row.kind != "member"] for jobs in (before, after))
    rows = dict.fromkeys(row for row, run in (*one, *other) if (row, run) in set(one) ^ set(other))
    where = f"it changes: {', '.join(rows)}" if rows else "it changes no run of this experiment"
    own = _trained_apart(experiment, override.key) if override.key.startswith("student.train") else []
    hint = f"; set for nets with a train of their own: {', '.join(own)}" if own else ""
    raise BadInput(f"{override.origin}: changes nothing that kd {command} does; {where}{hint}")


def _does(jobs: Sequence[Job], command: str) -> set[str | None]:
    """What a command does of a plan."""
    if command == "evaluate":  # it reads what is there, of these images, beside these teachers
        dataset, data = jobs[0].spec.dataset, jobs[0].spec.data
        return {dataset.fingerprint, data.evaluate_on, *(job.teacher for job in jobs if job.row.kind == "baseline")}
    return {job.spec.name for job in part(jobs, command)}


def _trained_apart(experiment: Experiment, key: str) -> list[str]:
    """The keys of the nets of the student's kind that have a `train` of their own."""
    rest = key.removeprefix("student.")
    own = [f"omit_classes.{i}.{rest}" for i, entry in enumerate(experiment.omit_classes) if entry.train]
    return own + ([f"baseline.{rest}"] if experiment.baseline.train else [])
