"""What finished runs say together: the documents of `--json`, and the rows of the final table, with types."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from kdcli import code, counted, losses, score
from kdcli.config import Experiment, Kind, Row, Section, bias_row
from kdcli.data.dataset import Dataset, Split
from kdcli.evidence.verdict import Judged, Spread, Verdict, corrected, paired, spread
from kdcli.nets.models import multiply_adds
from kdcli.plan import KINDS, Job, distinct, held_to, there
from kdcli.runs.directory import Places, Run, environment, open_run
from kdcli.runs.spec import Brief, Correction, Counted, Result, Spec
from kdcli.score import Latency, Quality
from kdcli.teachers.teacher import kept_logits, members, nets

UNLABELLED: dict[str, Any] = {"data": {"unlabelled"}, "dataset": {"unlabelled"}}  # which no baseline sees


class Against(Brief):
    """The baseline beside a student: the test images that only the student gets right, and only the baseline."""

    fixed: int
    broken: int


class Follows(Brief):
    """The teacher beside a net: how the net agrees with it, at which share of its cost."""

    agreement: float
    kl_from_teacher: float
    soft: float | None = None  # a student's loss, unless that is T^2 KL, or its file is no longer what it was
    multiply_adds_kept: float | None = None


class Cost(Section):
    """What it takes to hold a net, or the members of an ensemble, and to classify one image with all of it."""

    parameters: int
    multiply_adds: int
    weight_bytes: int
    measured_on: str
    latency_ms: dict[str, Latency] = {}  # by batch size


class Document(Result):
    """A finished run in its row of the table, beside its teacher and its baseline; the cost where that is asked for."""

    row: str
    kind: Kind
    quality: Quality
    teacher: Follows | None = None
    baseline: Against | None = None
    cost: Cost | None = None


class TableRow(Spread):
    """A row of the final table: the errors of one kind of nets over seeds, or after a bias correction."""

    row: str
    kind: Kind
    balanced: float | None = None  # error rate, the mean over the classes, where they are not alike in number
    top5: float | None = None  # mean errors, of more than ten classes
    unseen: float | None = None  # mean errors on the classes that the transfer set lacks
    train_errors: float | None = None
    samples: int | None = None
    nll: float | None = None
    ece: float | None = None
    multiply_adds: int | None = None
    expect: float | None = None
    paper: list[float] = []


class Table(Judged):
    """The rows of an experiment, or of one point of its grid, and the verdict on its students."""

    at: dict[str, str] = {}
    table: list[TableRow]
    runs: list[Document] | list[str]  # whole, or on record their names


class Made(Section):
    """How the runs were made: of what differs between them, all."""

    command_line: str
    date: str
    seconds: float
    cores: int
    git_commit: list[str]
    device: list[str]
    torch: list[str]
    python: list[str]


class Subject(Section):
    """What a summary is about: an experiment with the points of its grid, or a single run."""

    experiment: str
    file: str  # its name without .yaml, or the run's
    seeds: list[int]
    settings: dict[str, Any]
    grid: list[str] = []
    remarks: list[str] = []  # what the reader must know besides
    rows: list[Row] = Field([], exclude=True)
    at: list[dict[str, str]] = Field([{}], exclude=True)  # the values of the grid's keys at each point
    expect: dict[str, float] = Field({}, exclude=True)
    paper: dict[str, list[float]] = Field({}, exclude=True)


class Summary(Subject):
    """The document of `kd run`: a table, or one for each point of the grid."""

    command: str = "run"
    evaluated_on: str
    total: int
    classes: list[str]
    judged: str = "student"  # the row that a grid is about
    points: Annotated[list[Table], AfterValidator(corrected)]  # those of a record too
    made: Made
    pictures: list[str] = []  # of a record

    @property
    def only(self) -> Table:
        """The table of an experiment without a grid."""
        return self.points[0]


class _Net(NamedTuple):
    """What a finished run found, its log p [N, C] on the test images and, where that is asked for, its cost."""

    result: Result
    log_p: Tensor
    cost: Cost | None


@code.quiet()
def documents(
    jobs: Sequence[Job],
    dataset: Dataset,
    places: Places,
    expect: Mapping[str, float],
    costs: Literal["", "counted", "timed"] = "",
) -> list[Document]:
    """The documents of jobs that are all finished, and whose rows are expected to have so many errors at most; for the
    `costs` their nets are built, and those of a kind timed once."""
    labels, test = dataset.test.labels, dataset.test.to(torch.device(places.device)) if costs == "timed" else None
    baselines = {(job.point, job.spec.seed): job.spec.name for job in jobs if job.row.kind == "baseline"}

    priced = dict[str, Cost]()

    @cache
    def net(name: str) -> _Net:
        run = places.open(name)
        kind, log_p = repr([(m.spec.model, m.spec.origin) for m in members(run)]), log_probabilities(run, len(labels))
        if costs and kind not in priced and (price := cost(run, test)):
            priced[kind] = price
        return _Net(run.result("reported"), log_p, priced.get(kind))

    made = []
    for job in scored(jobs, places):
        own = net(job.spec.name)
        more: dict[str, Any] = {"row": job.row.name, "kind": job.row.kind, "cost": own.cost}
        more["quality"] = score.quality(own.log_p, labels)
        if job.teacher and (teacher := there(places.runs_dir, job.teacher)) and teacher.result().test.total:
            value = _soft(job.spec, places.open(job.spec.name), teacher, labels)
            more["teacher"] = _follows(own, net(job.teacher), value)
        if job.row.kind == "student" and (beside := baselines.get((job.point, job.spec.seed))):
            baseline = net(beside)
            fixed, broken = score.discordant(own.log_p, baseline.log_p, labels)
            more["baseline"] = Against(run=beside, errors=baseline.result.test.errors, fixed=fixed, broken=broken)
        result = held_to(own.result, expect.get(job.row.name))
        more["bias"] = {by: c.model_copy(update={"added_to": result.omitted}) for by, c in result.bias.items()}
        made.append(Document.model_construct(**dict(result) | more))
    return made


def scored(jobs: Sequence[Job], places: Places) -> list[Job]:
    """Those whose errors were counted: not a teacher that is a file without answers for the test images."""
    return [job for job in jobs if places.open(job.spec.name).result("reported").test.total]


def _soft(spec: Spec, student: Run, teacher: Run, labels: Tensor) -> float | None:
    """The value on the test images of the loss that a student was trained with, as in its training but that
    all of them are one batch."""
    distill, how, weights = spec.distill, teacher.spec.average, teacher.spec.weights
    if not distill or distill.plain or (distill.file and not code.unchanged(distill.loss, spec.loss_code)):
        return None
    z, members = kept_logits(student, "test", len(labels))[0], kept_logits(teacher, "test", len(labels))
    y = losses.shares(labels, z.shape[1]) if spec.train and spec.train.mixup else labels
    return float(losses.objective(z, y, members, distill, how, weights).soft)


def _follows(own: _Net, teacher: _Net, soft: float | None) -> Follows:
    agreement, kl = score.follows(own.log_p, teacher.log_p)
    return Follows(
        run=teacher.result.run,
        errors=teacher.result.test.errors,
        agreement=agreement,
        kl_from_teacher=kl,
        soft=soft,
        multiply_adds_kept=own.cost.multiply_adds / teacher.cost.multiply_adds if own.cost and teacher.cost else None,
    )


def log_probabilities(run: Run, images: int) -> Tensor:
    """log p [N, C] at T = 1 on the N test images, from the logits that a run kept; of an ensemble, by its average."""
    return losses.average(kept_logits(run, "test", images), 1.0, run.spec.average, run.spec.weights)


def verdict(distilled: Sequence[Document]) -> Verdict | None:
    """Whether students make fewer errors than the baselines of the same seeds; None without baselines."""
    pairs = [(d.baseline, d.test.errors) for d in distilled if d.baseline]
    if not pairs:
        return None
    return paired([b.errors - errors for b, errors in pairs], pairs[0][0].fixed, pairs[0][0].broken)


def _than_first(distilled: Sequence[Document], first: Sequence[Document]) -> Verdict | None:
    """Whether students make fewer errors than those of the same seeds at the first point; None of one seed."""
    errors = {d.seed: d.test.errors for d in first}
    fewer = [errors[d.seed] - d.test.errors for d in distilled if d.seed in errors]
    return paired(fewer, 0, 0) if len(fewer) > 1 else None


# The table.


def about(
    experiment: Experiment, title: str, rows: list[Row], points: list[dict[str, str]], dataset: Dataset
) -> Subject:
    """An experiment as the subject of a summary; `points`: the values of the grid's keys at each."""
    return Subject(
        experiment=experiment.name,
        file=title,
        seeds=experiment.seed,
        settings=experiment.model_dump(exclude_defaults=True, exclude={"paper", "expect"}),
        grid=list(experiment.grid),
        remarks=list(dataset.notes),
        rows=rows,
        at=points,
        expect=experiment.expect,
        paper=experiment.paper,
    )


def about_run(run: Run) -> tuple[Subject, list[Job]]:
    """A finished run as the subject of a summary, and the jobs to show: its teacher and a baseline of the same seed
    and recipe, where they are there, and itself. Raises BadInput when it is not finished."""
    run.counted("reported")
    spec, kind, jobs, remarks = run.spec, KINDS[run.spec.command], list[Job](), list[str]()
    taught_by = spec.parents[0] if spec.distill else None
    if taught_by and not there(run.root, taught_by):
        remarks = [f"Its teacher is not shown: {taught_by}, or a member of it, is gone."]
        taught_by = None
    if taught_by:
        teacher = open_run(run.root, taught_by).spec
        jobs.append(Job(Row(KINDS[teacher.command], KINDS[teacher.command]), teacher))
    if kind == "student":
        recipe = spec.model_dump(exclude=UNLABELLED)
        recipe |= {"command": "baseline", "distill": None, "loss_code": None, "parents": []}
        baseline = Run(run.root, Spec.model_validate(recipe, context={"reading": True}))
        if baseline.finished():
            jobs.append(Job(Row("baseline", "baseline"), baseline.spec, teacher=taught_by))
        else:
            absent = "There is no baseline of its seed and recipe to compare it with: `kd distill` trains one"
            remarks.append(f"{absent}, unless the file gives the baseline a recipe of its own.")
    of_baselines = spec.command == "ensemble" and members(run)[0].spec.command == "baseline"
    name = spec.omission or ("ensemble of baselines" if of_baselines else kind)
    jobs.append(Job(Row(name, kind), spec, teacher=taught_by))
    return Subject(
        experiment=spec.experiment,
        file=run.name,
        seeds=[spec.seed],
        settings=spec.model_dump(exclude_defaults=True, exclude={"dataset"}),
        remarks=remarks,
        rows=[job.row for job in jobs],
    ), jobs


def summarise(
    subject: Subject, jobs: Sequence[Job], found: Sequence[Document], classes: list[str], made: Made
) -> Summary:
    """The document of a subject from its jobs and the document of each."""
    of_ensembles = any(key.split(".")[0] == "ensemble" for key in subject.grid)
    of_ensembles &= not {"distill", "distill.teacher"} & {*subject.grid}  # else at some points it is the student
    of_ensemble = Row("student of ensemble", "student")
    judged = of_ensemble.name if of_ensembles and of_ensemble in subject.rows else "student"
    of_losses = any(key in ("distill", "distill.loss") for key in subject.grid)
    tables, first = list[Table](), list[Document]()  # the students of the first point
    for i, at in enumerate(subject.at):
        mine = [d for job, d in zip(jobs, found, strict=True) if job.point == i]
        rows = [line for row in subject.rows for line in _rows(subject, row, mine, classes)]
        students = [d for d in mine if d.row == judged]
        first = first or students
        than_first = _than_first(students, first) if of_losses and i else None
        tables.append(Table(at=at, table=rows, runs=mine, verdict=verdict(students), than_first=than_first))
    scored = {"evaluated_on": found[0].on, "total": found[0].test.total, "classes": classes}
    return Summary.model_validate(dict(subject) | scored | {"judged": judged, "points": tables, "made": made})


def _rows(subject: Subject, row: Row, documents: Sequence[Document], classes: Sequence[str]) -> Iterator[TableRow]:
    """The row of those of a kind and, of students without some classes, one for each bias correction."""
    found = [d for d in documents if d.row == row.name]
    stages: dict[str, list[Counted | Correction]] = {row.name: [d.test for d in found]} if found else {}
    stages |= {bias_row(row.name, bias): [d.bias[bias] for d in found] for bias in (found[0].bias if found else ())}
    for name, per_seed in stages.items():
        more: dict[str, Any] = {}
        if omitted := [classes.index(c) for c in found[0].omitted]:
            more["unseen"] = statistics.mean(sum(c.per_class_errors[k] for k in omitted) for c in per_seed)
        if name == row.name:
            for key in ("nll", "ece", "balanced", "top5"):
                of = [getattr(d.quality, key) for d in found]
                more[key] = None if None in of else statistics.mean(of)
            more |= {"multiply_adds": found[0].cost and found[0].cost.multiply_adds, "samples": found[0].samples}
            if epochs := [d.last_epoch for d in found if d.last_epoch]:
                more["train_errors"] = statistics.mean(e.train_errors for e in epochs)
        more |= {"expect": subject.expect.get(name), "paper": subject.paper.get(name, [])}
        yield TableRow(row=name, kind=row.kind, **dict(spread([c.errors for c in per_seed])), **more)


def made(jobs: Sequence[Job], places: Places) -> Made:
    """How the runs of some jobs were made: command lines, commits, devices, versions, seconds of training."""
    runs = [Run(places.runs_dir, job.spec) for job in distinct(jobs)]
    records = sorted((run.environment() for run in runs), key=lambda record: str(record.get("started", "")))
    kept = ("git_commit", "device", "torch", "python")
    seen = {key: sorted({str(record.get(key) or "unknown") for record in records}) for key in kept}
    seconds = sum(run.result().seconds for run in runs if run.spec.command != "ensemble")
    typed = list(dict.fromkeys(str(record["command_line"]) for record in records if record.get("command_line")))
    lines = "; ".join(typed[:3]) + (f"; and {len(typed) - 3} more" if len(typed) > 3 else "")
    last = environment(places.device, places.threads) | records[-1]
    about = {"command_line": lines, "date": str(last["started"])[:10], "cores": last["cores"], "seconds": seconds}
    return Made.model_validate(about | seen)


def cost(run: Run, test: Split | None = None) -> Cost | None:
    """What it takes to hold a run's nets and to classify one image with all of them; with `test` images, how long a
    batch of 1 and of 128 takes on their device. None where one of them is no net of torch's."""
    if not all(member.spec.model for member in members(run)):
        return None
    device = test.labels.device if test else torch.device("cpu")
    own = nets(run, device)
    weights = [p for net in own for p in net.parameters()]
    batches = [test.inputs(torch.arange(n, device=device)) for n in (1, min(128, len(test)))] if test else []
    times = [score.latency(lambda x: torch.stack([net(x) for net in own]), batch) for batch in batches]
    return Cost(
        parameters=sum(p.numel() for p in weights),
        multiply_adds=sum(multiply_adds(net, run.spec.dataset.shape) for net in own),
        weight_bytes=sum(p.numel() * p.element_size() for p in weights),
        measured_on=f"{device.type}, {counted(torch.get_num_threads(), 'thread')}",
        latency_ms=dict(zip(("1", "128"), times, strict=False)),
    )
