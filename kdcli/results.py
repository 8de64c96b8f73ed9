"""What finished runs say together: the documents of `--json`, and the rows of the final table, with types."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from kdcli import code, losses, score
from kdcli.config import BIASES, Experiment, Kind, Omission, Row, Section, bias_row
from kdcli.data import Dataset, Split
from kdcli.models import multiply_adds
from kdcli.plan import KINDS, Job, distinct, orphaned
from kdcli.runs import Brief, Correction, Counted, Places, Result, Run, differences, environment, list_runs, open_run
from kdcli.score import Latency
from kdcli.teacher import kept_logits, members, nets, predict
from kdcli.verdict import Spread, Verdict, paired, spread


class Against(Brief):
    """The baseline beside a student: the test images that only the student gets right, and only the baseline."""

    fixed: int
    broken: int


class Document(Result):
    """A finished run in its row of the table, beside its teacher and its baseline."""

    row: str
    kind: Kind
    teacher: Brief | None = None
    baseline: Against | None = None


class Follows(Section):
    """How a net compares with its teacher, and what is kept at which share of the cost."""

    run: str
    agreement: float
    kl_from_teacher: float
    accuracy_kept: float | None
    multiply_adds_kept: float


class Cost(Section):
    """What it takes to hold a net, or the members of an ensemble, and to classify one image with all of it."""

    parameters: int
    multiply_adds: int
    weight_bytes: int
    latency_ms: dict[str, Latency] = {}  # by batch size


class Evaluation(Result):
    """A run scored from its weights on the test images: `score.quality`, its teacher beside it, and the cost."""

    confusion: list[list[int]]
    nll: float
    brier: float
    ece: float
    teacher: Follows | None = None
    measured_on: str
    cost: Cost


class Evaluations(Section):
    """The document of `kd evaluate`."""

    command: str = "evaluate"
    experiment: str
    classes: list[str]
    runs: list[Evaluation]


class TableRow(Spread):
    """A row of the final table: the errors of one kind of nets over seeds, or after a bias correction."""

    row: str
    kind: Kind
    n: int
    unseen: float | None = None  # mean errors on the classes that the transfer set lacks
    train_errors: float | None = None
    samples: int | None = None
    nll: float | None = None
    ece: float | None = None
    multiply_adds: int | None = None
    expect: float | None = None
    paper: list[float] = []

    @property
    def met(self) -> bool:
        return self.expect is None or self.mean <= self.expect


class Table(Section):
    """The rows of an experiment, or of one point of its grid, and the verdict on its students."""

    at: dict[str, str] = {}
    table: list[TableRow]
    verdict: Verdict | None = None
    runs: list[Document] | list[str]  # whole, or on record their names


class Made(Section):
    """How the runs were made."""

    command_line: str
    commits: list[str]
    devices: list[str]
    versions: str
    date: str
    seconds: float


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
    points: list[Table]
    made: Made
    pictures: list[str] = []  # of a record

    @property
    def only(self) -> Table:
        """The table of an experiment without a grid."""
        return self.points[0]

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a grid the only table stands at the top."""
        whole: dict[str, Any] = handler(self)
        return whole if self.grid else whole | whole.pop("points")[0]

    @model_validator(mode="before")
    @classmethod
    def _unflat(cls, whole: Any) -> Any:
        if isinstance(whole, dict) and "points" not in whole:
            whole = dict(whole)
            whole["points"] = [{key: whole.pop(key) for key in ("at", "table", "verdict", "runs") if key in whole}]
        return whole


def documents(jobs: Sequence[Job], places: Places, labels: Tensor) -> list[Document]:
    """The documents of jobs that are all finished; `labels` [N] of the test images."""
    found = {job.spec.name: Run(places.runs_dir, job.spec).result("reported") for job in jobs}
    baselines = {(job.point, job.spec.seed): job.spec.name for job in jobs if job.row.kind == "baseline"}
    made = []
    for job in jobs:
        more: dict[str, Any] = {"row": job.row.name, "kind": job.row.kind}
        if job.spec.parents and job.teacher and job.row.kind != "baseline":
            teacher = places.open(job.teacher).result()
            more["teacher"] = Brief(run=teacher.run, errors=teacher.test.errors)
        beside = baselines.get((job.point, job.spec.seed))
        if job.row.kind == "student" and beside:
            pair = [Run(places.runs_dir, job.spec), places.open(beside)]
            fixed, broken = discordant(labels, *pair)
            more["baseline"] = Against(run=beside, errors=found[beside].test.errors, fixed=fixed, broken=broken)
        made.append(Document.model_construct(**dict(found[job.spec.name]) | more))
    return made


def discordant(labels: Tensor, student: Run, baseline: Run) -> tuple[int, int]:
    """How many test images only the student gets right, and how many only the baseline."""
    predictions = [log_probabilities(run, len(labels)).argmax(1) for run in (student, baseline)]
    one, other = (p == labels.cpu() for p in predictions)
    return int((one & ~other).sum()), int((other & ~one).sum())


def log_probabilities(run: Run, images: int) -> Tensor:
    """log p [N, C] at T = 1 on the N test images, from the logits that a run kept; of an ensemble, by its average."""
    return losses.average(kept_logits(run, "test", images), 1.0, run.spec.average)


def verdict(distilled: Sequence[Document]) -> Verdict | None:
    """Whether students make fewer errors than the baselines of the same seeds; None without baselines."""
    pairs = [(d.baseline, d.test.errors) for d in distilled if d.baseline]
    if not pairs:
        return None
    return paired([b.errors - errors for b, errors in pairs], pairs[0][0].fixed, pairs[0][0].broken)


# The table.


def about(experiment: Experiment, title: str, points: list[dict[str, str]]) -> Subject:
    """An experiment as the subject of a summary; `points`: the values of the grid's keys at each."""
    return Subject(
        experiment=experiment.name,
        file=title,
        seeds=experiment.seed,
        settings=experiment.model_dump(exclude_defaults=True, exclude={"paper", "expect"}),
        grid=list(experiment.grid),
        rows=experiment.rows,
        at=points,
        expect=experiment.expect,
        paper=experiment.paper,
    )


def about_run(run: Run, note: Callable[[str], None]) -> tuple[Subject, list[Job]]:
    """A finished run as the subject of a summary, and the jobs to show: its teacher, a baseline of the same seed and
    recipe if there is one, and itself. Raises BadInput when it is not finished, or its teacher is gone."""
    run.result("reported")
    spec, jobs, remarks = run.spec, list[Job](), list[str]()
    of_baselines = spec.command == "ensemble" and members(run)[0].spec.command == "baseline"
    kind = KINDS[spec.command]
    name = Omission(omit=spec.omitted).label if spec.omitted else "ensemble of baselines" if of_baselines else kind
    own = Row(name, kind)
    teacher = open_run(run.root, spec.parents[0]) if spec.parents and spec.command != "ensemble" else None
    if teacher:
        above: Kind = "ensemble" if teacher.spec.command == "ensemble" else "teacher"
        jobs.append(Job(Row(above, above), teacher.spec))
    if kind == "student":
        baseline, remarks = _baseline_of(run, note)
        jobs += [Job(Row("baseline", "baseline"), b.spec, teacher=spec.parents[0]) for b in baseline]
    jobs.append(Job(own, spec, teacher=teacher.name if teacher else None))
    return Subject(
        experiment=spec.experiment,
        file=run.name,
        seeds=[spec.seed],
        settings=spec.model_dump(exclude_defaults=True, exclude={"dataset"}),
        remarks=remarks,
        rows=[job.row for job in jobs],
    ), jobs


def _baseline_of(run: Run, note: Callable[[str], None]) -> tuple[list[Run], list[str]]:
    """The finished baseline that a student is held against: of its seed, images, net and recipe; or none, and why."""
    found = list_runs(run.root, run.spec.experiment, ["baseline"], note)
    same_task = ("dataset", "data", "model", "code", "seed")
    found = [b for b in found if all(getattr(b.spec, k) == getattr(run.spec, k) for k in same_task) and b.finished()]
    alike = [b for b in found if b.spec.train == run.spec.train]
    if alike or not found:
        none = "There is no baseline of the same seed to hold it against: `kd distill` trains one."
        return alike[:1], [] if alike else [none]
    mine, other = (spec.trained[1].model_dump(exclude_none=True) for spec in (run.spec, found[0].spec))
    unlike = "; ".join(differences(mine, other, "train."))
    return [], [f"Not held against {found[0].name}, which has another recipe: {unlike}."]


def summarise(
    subject: Subject,
    jobs: Sequence[Job],
    found: Sequence[Document],
    evaluations: Sequence[Evaluation],
    dataset: Dataset,
    made: Made,
) -> Summary:
    """The document of a subject from its jobs and the document of each."""
    only_ensembles = bool(subject.grid) and all(key.startswith("ensemble.") for key in subject.grid)
    of_ensemble = Row("student of ensemble", "student")
    judged = of_ensemble.name if only_ensembles and of_ensemble in subject.rows else "student"
    tables = []
    for i, at in enumerate(subject.at):
        mine = [d for job, d in zip(jobs, found, strict=True) if job.point == i and job.row.kind != "member"]
        rows = _Rows(subject, mine, {e.run: e for e in evaluations}, dataset.facts.classes).rows()
        tables.append(Table(at=at, table=rows, runs=mine, verdict=verdict([d for d in mine if d.row == judged])))
    total, on, classes = found[0].test.total, f"{found[0].test.total:,} {found[0].evaluated_on}", dataset.facts.classes
    scored: dict[str, Any] = {"evaluated_on": on, "total": total, "classes": classes}
    return Summary(**dict(subject), **scored, judged=judged, points=tables, made=made)


@dataclass(frozen=True)
class _Rows:
    """The rows of one table."""

    subject: Subject
    found: Sequence[Document]
    scores: dict[str, Evaluation]
    classes: list[str]

    def rows(self) -> list[TableRow]:
        rows = []
        for row in self.subject.rows:
            mine = [d for d in self.found if d.row == row.name]
            if mine:
                rows.append(self._row(row, row.name, mine, [d.test for d in mine]))
            for bias in BIASES if mine and row.kind == "omission" else ():
                rows.append(self._row(row, bias_row(row.name, bias), mine, [d.bias[bias] for d in mine]))
        return rows

    def _row(self, row: Row, name: str, mine: Sequence[Document], counted: Sequence[Counted | Correction]) -> TableRow:
        more: dict[str, Any] = {}
        if omitted := [self.classes.index(c) for c in mine[0].omitted]:
            more["unseen"] = statistics.mean(sum(c.per_class_errors[k] for k in omitted) for c in counted)
        if epochs := [d.last_epoch for d in mine if d.last_epoch]:
            more |= {"train_errors": statistics.mean(e.train_errors for e in epochs), "samples": mine[0].samples}
        if name == row.name:
            scores = [self.scores[d.run] for d in mine]
            more |= {"nll": statistics.mean(s.nll for s in scores), "ece": statistics.mean(s.ece for s in scores)}
            more["multiply_adds"] = scores[0].cost.multiply_adds
        more |= {"expect": self.subject.expect.get(name), "paper": self.subject.paper.get(name, [])}
        return TableRow(row=name, kind=row.kind, n=len(counted), **dict(spread([c.errors for c in counted])), **more)


def made(jobs: Sequence[Job], places: Places) -> Made:
    """How the runs of some jobs were made: command lines, commits, devices, versions, seconds of training."""
    runs = {job.spec.name: Run(places.runs_dir, job.spec) for job in jobs}
    records = [run.environment() for run in runs.values()]
    here = environment(places.device, places.threads)

    def seen(key: str) -> list[str]:
        return sorted({str(record.get(key, "unknown")) for record in records})

    return Made(
        command_line=here["command_line"],
        commits=seen("git_commit"),
        devices=[f"{device}, {here['cores']} cores" if device == "cpu" else device for device in seen("device")],
        versions=f"torch {', '.join(seen('torch'))}, Python {', '.join(seen('python'))}",
        date=here["started"][:10],
        seconds=sum(run.result().seconds for run in runs.values() if run.spec.command != "ensemble"),
    )


# Scores from the weights.


@code.quiet()
def evaluate(jobs: Sequence[Job], dataset: Dataset, places: Places) -> list[Evaluation]:
    """Each run of some jobs, scored from its weights on the test images and held against its teacher."""
    device = torch.device(places.device)
    test = dataset.test.to(device)

    @cache
    def log_p(name: str) -> Tensor | None:
        """log p [N, C] of a run; None where it, or a member of it, is not there."""
        if not (places.runs_dir / name).is_dir():
            return None
        run = places.open(name)
        if run.finished() is None or orphaned(run):
            return None
        return losses.average(torch.stack([predict(net, test) for net in nets(run, device)]), 1.0, run.spec.average)

    return [_evaluation(Run(places.runs_dir, job.spec), job.teacher, log_p, test, places) for job in distinct(jobs)]


def _evaluation(
    run: Run, beside: str | None, log_p: Callable[[str], Tensor | None], test: Split, places: Places
) -> Evaluation:
    result, own, teacher = run.result("evaluated"), log_p(run.name), log_p(beside) if beside else None
    assert own is not None
    price, follows = cost(run, test), None
    if beside and teacher is not None:
        agreement, kl = score.follows(own, teacher)
        of_teacher = places.open(beside)
        right = [1 - r.test.errors / r.test.total for r in (result, of_teacher.result())]
        follows = Follows(
            run=beside,
            agreement=agreement,
            kl_from_teacher=kl,
            accuracy_kept=right[0] / right[1] if right[1] else None,
            multiply_adds_kept=price.multiply_adds / cost(of_teacher).multiply_adds,
        )
    scored = {"test": score.count_errors(own, test.labels), **score.quality(own, test.labels)._asdict()}
    where = f"{places.device.partition(':')[0]}, {torch.get_num_threads()} thread(s)"
    return Evaluation(**dict(result) | scored, teacher=follows, measured_on=where, cost=price)


def cost(run: Run, test: Split | None = None) -> Cost:
    """What it takes to hold a run's nets and to classify one image with all of them; with `test` images, how long a
    batch of 1 and of 128 takes on their device."""
    device = test.labels.device if test else torch.device("cpu")
    own = nets(run, device)
    weights = [p for net in own for p in net.parameters()]
    latencies = {}
    for n in (1, 128) if test else ():
        assert test
        x = test.inputs(torch.arange(min(n, len(test)), device=device))
        latencies[str(n)] = score.latency(lambda x: torch.stack([net(x) for net in own]), x)
    return Cost(
        parameters=sum(p.numel() for p in weights),
        multiply_adds=sum(multiply_adds(net, run.spec.dataset.shape) for net in own),
        weight_bytes=sum(p.numel() * p.element_size() for p in weights),
        latency_ms=latencies,
    )
