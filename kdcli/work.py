"""What a command is to do, known and checked before anything is trained; and the summary of what was done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kdcli import BadInput, results, yamlfile
from kdcli.config import Experiment
from kdcli.data import Dataset, open_dataset
from kdcli.plan import Job, check, distinct, find_teacher, part, plan, require_teachers, usable
from kdcli.runs import Places, Run
from kdcli.yamlfile import Loaded, Override

Note = Callable[[str], None]


class Asked(NamedTuple):
    """What was typed: the command, the experiment's name or file, and what overrides it."""

    command: str
    name: str
    overrides: Sequence[Override]
    retype: str = ""  # the arguments to type for the same teachers


@dataclass(frozen=True)
class Work:
    """A command's part of the plan, and where it is done."""

    points: list[Loaded]
    dataset: Dataset
    planned: list[Job]  # all that the experiment describes
    jobs: list[Job]
    places: Places

    @property
    def experiment(self) -> Experiment:
        """The experiment, or the first point of its grid."""
        return self.points[0].experiment

    def unfinished(self) -> list[str]:
        """The names of the runs that are not there yet."""
        return [s.name for s in distinct(self.jobs) if Run(self.places.runs_dir, s).finished() is None]

    def documents(self) -> list[results.Document]:
        """The documents of the jobs, which are all finished."""
        return results.documents(self.jobs, self.places, self.dataset.test.labels)

    def summary(self, subject: results.Subject) -> tuple[results.Summary, list[results.Evaluation]]:
        """What the finished jobs say together, and the scores of each run."""
        shown = self.shown()
        once = {job.spec.name: (Run(self.places.runs_dir, job.spec), job.teacher) for job in shown}
        evaluations = results.evaluate(list(once.values()), self.dataset, self.places)
        found = results.documents(shown, self.places, self.dataset.test.labels)
        made = results.made(self.jobs, self.places)
        return results.summarise(subject, shown, found, evaluations, self.dataset, made), evaluations

    def shown(self) -> list[Job]:
        """The jobs that have a place in a table: members have none."""
        return [job for job in self.jobs if job.row.kind != "member"]


def prepare(
    asked: Asked, places: Places, note: Note, teacher: str | None = None, baseline: bool = True, download: bool = True
) -> Work:
    """Read the experiment and its data, check both, and plan. Raises BadInput for all that can be known before a run is
    trained. `teacher`: the run that --teacher names."""
    points = yamlfile.points(asked.name, asked.overrides)
    with points[0].located():
        dataset = open_dataset(points[0].experiment.data, places.data_dir, download)
    for point in points:
        with point.located():
            check(point.experiment, dataset)
    named = find_teacher(places, teacher)

    def planned(points: Sequence[Loaded]) -> list[Job]:
        data = open_dataset(points[0].experiment.data, places.data_dir, download)
        return plan([point.experiment for point in points], data, named)

    whole = planned(points)
    work = Work(points, dataset, whole, part(whole, asked.command, baseline), places)
    for override in asked.overrides:
        _refuse_idle(override, asked, work, planned)
    if asked.command in ("distill", "omit-classes"):
        require_teachers(work.jobs, whole, places, asked.retype, note)
    return work


def prepare_run(name: str, places: Places, note: Note) -> tuple[Work, results.Subject]:
    """The work of reporting one finished run beside its teacher and its baseline. Raises BadInput."""
    run = places.open(name)
    subject, jobs = results.about_run(run, note)
    for job in jobs:
        usable(places.open(job.spec.name), run.spec, "reported")
    return Work([], open_dataset(run.spec.data, places.data_dir), jobs, jobs, places), subject


def _refuse_idle(
    override: Override, asked: Asked, work: Work, planned: Callable[[Sequence[Loaded]], list[Job]]
) -> None:
    """Raise BadInput for a `--set` that changes the experiment but nothing that the command does."""
    key = override.key
    if not override.origin.startswith("--set ") or key.split(".")[0] in ("threads", "expect", "paper", "grid"):
        return
    try:
        others = yamlfile.points(asked.name, [o for o in asked.overrides if o is not override])
        if [point.experiment for point in others] == [point.experiment for point in work.points]:
            return
        before = planned(others)
    except BadInput:  # the experiment cannot do without it
        return
    if _does(before, asked.command) != _does(work.planned, asked.command):
        return
    one, other = _by_row(before), _by_row(work.planned)
    rows = [row for row in {**one, **other} if one.get(row) != other.get(row)]
    where = f"it changes: {', '.join(rows)}" if rows else "it changes no run of this experiment"
    own = _trained_apart(work.experiment, key) if key.startswith("student.train") else []
    hint = f"; set for nets with a train of their own: {', '.join(own)}" if own else ""
    raise BadInput(f"{override.origin}: changes nothing that kd {asked.command} does; {where}{hint}")


def _does(jobs: Sequence[Job], command: str) -> set[str | None]:
    """What a command does of a plan."""
    if command == "evaluate":  # it reads what is there, of these images, beside these teachers
        dataset, data = jobs[0].spec.dataset, jobs[0].spec.data
        return {dataset.fingerprint, data.evaluate_on, *(job.teacher for job in jobs if job.row.kind == "baseline")}
    return {job.spec.name for job in part(jobs, command)}


def _by_row(jobs: Sequence[Job]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for job in jobs:
        if job.row.kind != "member":
            found.setdefault(job.row.name, set()).add(job.spec.name)
    return found


def _trained_apart(experiment: Experiment, key: str) -> list[str]:
    """The keys of the nets of the student's kind that have a `train` of their own."""
    rest = key.removeprefix("student.")
    own = [f"omit_classes.{i}.{rest}" for i, entry in enumerate(experiment.omit_classes) if entry.train]
    return own + ([f"baseline.{rest}"] if experiment.baseline.train else [])
