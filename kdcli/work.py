"""What a command is to do, known and checked before anything is trained; and the summary of what was done."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kdcli import BadInput, Failed, Note, cores, yamlfile
from kdcli.config import Data, Experiment
from kdcli.data.dataset import Dataset, open_dataset
from kdcli.evidence import results
from kdcli.machine import distributed
from kdcli.machine.cluster import Cluster
from kdcli.plan import Job, check, distinct, find_teacher, part, plan, unfinished, usable
from kdcli.runs import mirror
from kdcli.runs.directory import Places, Run
from kdcli.teachers.teacher import dataset_of
from kdcli.training.engine import run_all, share
from kdcli.training.train import Tell
from kdcli.yamlfile import Loaded, Override

Engine = tuple[int | None, Cluster | None]  # how many runs at once, if that was asked for; and on which cluster
NO_CHANGE = ("threads", "resources", "expect", "paper", "grid")  # sections that a `--set` may set though no run changes


@dataclass(frozen=True)
class Work:
    """A command's part of the plan, where it is done, and what its report is about."""

    subject: results.Subject
    folder: Path  # of the report
    dataset: Dataset
    planned: list[Job]  # all that the experiment describes
    jobs: list[Job]
    places: Places

    def summary(self) -> results.Summary:
        """What the finished jobs say together; members have no place in the table."""
        shown = results.scored([job for job in self.jobs if job.row.kind != "member"], self.places)
        found = results.documents(shown, self.dataset, self.places, self.subject.expect, "counted")
        made = results.made(self.jobs, self.places)
        return results.summarise(self.subject, shown, found, self.dataset.facts.classes, made)


def prepare(
    command: str, name: str, overrides: list[Override], places: Places, teacher: str | None, baseline: bool, dry: bool
) -> Work:
    """Read the experiment and its data, check both, and plan. Raises BadInput for all that can be known before a run is
    trained. `teacher`: the run that --teacher names; `dry`: nothing is downloaded."""
    plans = _Plans(name, places, teacher, dry, {})
    points, dataset, jobs = plans.of(overrides)
    experiment = points[0].experiment
    if experiment.grid and command not in ("run", "report"):
        keys = " ".join(f"--set {key}=…" for key in experiment.grid)
        raise BadInput(f"{name}: has a grid, which `kd run` walks; for one of its points: {keys}")
    for override in overrides:
        if override.origin.startswith("--set ") and override.key.split(".")[0] not in NO_CHANGE:
            others, before = plans.without(override, overrides, experiment.data)
            if others and others[0].experiment.grid == experiment.grid:  # else it picks a point
                if [other.experiment for other in others] == [point.experiment for point in points]:
                    raise _of_no_effect(override, overrides)
                _refuse_idle(override, command, before, jobs, experiment)
    rows = list(dict.fromkeys(row for point in points for row in point.experiment.rows))  # a point may have its own
    subject = results.about(experiment, Path(points[0].file).stem, rows, [point.at for point in points], dataset)
    places = places._replace(threads=experiment.threads or max(cores() // distributed.LOCAL_WORLD, 1))
    return Work(subject, _folder(subject, overrides, places), dataset, jobs, part(jobs, command, baseline), places)


class _Plans(NamedTuple):
    """What an experiment plans with some overrides or others."""

    name: str
    places: Places
    teacher: str | None
    dry: bool
    opened: dict[Data, Dataset]  # most overrides leave the data as they are, and to open a folder takes time

    def of(self, overrides: list[Override]) -> tuple[list[Loaded], Dataset, list[Job]]:
        """The points of the experiment, its dataset, and all jobs. Raises BadInput as `prepare` does."""
        points = yamlfile.points(self.name, overrides)
        data = points[0].experiment.data
        with points[0].located():
            dataset = self.opened.get(data) or open_dataset(data, self.places.data_dir, download=not self.dry)
        self.opened[data] = dataset
        for point in points:
            with point.located():
                check(point.experiment, dataset)
        named = find_teacher(self.places, self.teacher) if self.teacher is not None else None
        return points, dataset, plan([point.experiment for point in points], dataset, named)

    def without(self, one: Override, overrides: list[Override], data: Data) -> tuple[list[Loaded], list[Job]]:
        """The points and the jobs without one of the overrides; none where the experiment cannot do without it, or
        would have other images than `data`, which might take hours to open."""
        bare = [other for other in overrides if other is not one]
        with suppress(BadInput):
            own = yamlfile.points(self.name, bare)[0].experiment.data
            if (own.images, own.size) == (data.images, data.size) and own.unlabelled in (None, data.unlabelled):
                points, _, jobs = self.of(bare)
                return points, jobs
        return [], []


def _of_no_effect(override: Override, overrides: list[Override]) -> BadInput:
    """What to say of a `--set` that leaves the experiment as it is."""
    later = overrides[overrides.index(override) + 1 :]
    beats = [o.origin for o in later if f"{override.key}.".startswith(f"{o.key}.")]
    why = f"{beats[-1]} beats it" if beats else "that is its value already"
    return BadInput(f"{override.origin}: changes nothing: {why}")


def _folder(subject: results.Subject, overrides: list[Override], places: Places) -> Path:
    """Of the report of an experiment: a trial's replaces no other."""
    parts = ["report"] if subject.file == subject.experiment else ["report", subject.file]
    if changes := [o.origin for o in overrides if o.key.split(".")[0] not in ("seed", "threads", "resources")]:
        parts.append(hashlib.sha256(repr(changes).encode()).hexdigest()[:6])
    return places.runs_dir / subject.experiment / "-".join(parts)


def prepare_run(name: str, places: Places) -> Work:
    """The work of reporting one finished run beside its teacher and its baseline. Raises BadInput."""
    run = places.open(name)
    subject, jobs = results.about_run(run)
    for job in jobs:
        usable(places.open(job.spec.name), run.spec, "reported")
    dataset, folder = dataset_of(run, places.data_dir), places.runs_dir / run.name / "report"
    subject = subject.model_copy(update={"remarks": [*subject.remarks, *dataset.notes]})
    return Work(subject, folder, dataset, jobs, jobs, places)


def finished(jobs: Sequence[Job], places: Places) -> list[Run]:
    """The runs of some jobs that are finished, each once. Raises BadInput where one cannot be used."""
    runs = [Run(places.runs_dir, job.spec) for job in distinct(jobs)]
    return [usable(places.open(run.name), run.spec, "shown") for run in runs if run.finished()]


def obtain(work: Work, jobs: Sequence[Job], threads: int | None, engine: Engine, tell: Tell, note: Note) -> None:
    """Train the jobs that are not finished; of those that are, check that they can be used, and say so.

    A run alone works with `work.places`, several at once with a thread each, or `threads`; on Ray with one a CPU."""
    at_once, cluster = engine
    places, missing = work.places, {run.name: run.spec for run in unfinished(jobs, work.places)}
    if before := finished(jobs, places):
        more = f" and {len(before) - 1} more" if len(before) > 1 else ""
        note(f"{before[0].name}{more}: finished before")
    if not cluster or not missing:
        return run_all(missing, *share(missing.values(), places, threads, at_once), tell, note)
    there = places._replace(runs_dir=places.runs_dir.absolute(), device="cuda" if cluster.gpus else "cpu")
    run_all(missing, there._replace(threads=threads or cluster.cpus), at_once or len(missing), tell, note, cluster)
    if places.remote:
        mirror.pull(places.remote)
    if lost := unfinished(jobs, places):
        raise Failed(f"{lost[0].name}: was trained, but not in {there.runs_dir}: --runs-dir must name a shared folder")


def _refuse_idle(override: Override, command: str, before: list[Job], after: list[Job], experiment: Experiment) -> None:
    """Raise BadInput for a `--set` that changes the experiment but nothing that the command does."""
    if _does(before, command) != _does(after, command):
        return
    one, other = ({(j.row.name, j.spec.name): j for j in jobs if j.row.kind != "member"} for jobs in (before, after))
    rows = dict.fromkeys(row for row, run in one | other if ((row, run) in one) != ((row, run) in other))
    where = f"it changes: {', '.join(rows)}" if rows else "it changes no run of this experiment"
    section, _, rest = override.key.partition(".train.")
    apart = [*experiment.student_trains][1:] if section == "student" and rest else []
    own = [f"{other}.train.{rest}" for other in apart]
    hint = f"; set for nets with a train of their own: {', '.join(own)}" if own else ""
    raise BadInput(f"{override.origin}: changes nothing that kd {command} does; {where}{hint}")


def _does(jobs: Sequence[Job], command: str) -> set[str | None]:
    """What a command does of a plan."""
    if command == "evaluate":  # it reads what is there, of these images, beside these teachers
        dataset, data = jobs[0].spec.dataset, jobs[0].spec.data
        return {dataset.fingerprint, data.evaluate_on, *(job.teacher for job in jobs if job.row.kind == "baseline")}
    return {job.spec.name for job in part(jobs, command)}
