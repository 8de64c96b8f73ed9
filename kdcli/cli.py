"""The `kd` command: flags become overrides of the experiment file, a recipe does the work, the result is printed."""

import hashlib
import inspect
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdcli import BadInput, Failed, __version__, config, failure
from kdcli.config import Experiment, Override
from kdcli.runs import STUDENTS, TEACHERS, Document, Run, dependents, find_folders, open_run, remove, survey

if TYPE_CHECKING:
    from kdcli.recipes import Session
    from kdcli.report import Display, Table

app = typer.Typer(name="kd", add_completion=True, pretty_exceptions_enable=False)


def _complete_experiment(incomplete: str) -> list[str]:
    """Experiments and, for `kd report`, once a slash is typed, runs."""
    names = [name for name in config.experiments() if name.startswith(incomplete)]
    return names or (_complete_run(incomplete) if "/" in incomplete else [])


def _complete_run(incomplete: str) -> list[str]:
    """The runs in ./runs, for the shell's completion."""
    return [run for d in survey(Path("runs")) if (run := str(d["run"])).startswith(incomplete)]


def _complete_group(incomplete: str) -> list[str]:
    """What `kd compare` takes: the groups of the runs in ./runs and, once one is typed whole, its runs."""
    groups = dict.fromkeys(str(d["run"]).rpartition("/")[0] for d in survey(Path("runs")))
    return [group for group in groups if group.startswith(incomplete)] or _complete_run(incomplete)


T = Annotated[float | None, typer.Option("--T", help="Temperature of the soft targets (distill.T).")]
Lambda1 = Annotated[float | None, typer.Option("--lambda1", help="Weight of the soft targets (distill.lambda1).")]
Lambda2 = Annotated[
    float | None,
    typer.Option("--lambda2", help="Weight of the hard labels; left out, here and in the file: 1 - lambda1."),
]
TeacherRun = Annotated[
    str | None,
    typer.Option("--teacher", metavar="RUN", help="Learn from this run instead.", autocompletion=_complete_run),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Epochs of each training of this command.")]


RunsDir = Annotated[Path, typer.Option(help="Where the run directories lie.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where MNIST lies or is downloaded to; left out: $KD_DATA, else data.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@dataclass(frozen=True)
class Common:
    """The options that every command has."""

    experiment: Annotated[
        str,
        typer.Argument(
            help="An experiment's name (mnist, digits) or its YAML file.", autocompletion=_complete_experiment
        ),
    ] = "mnist"
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key: teacher.train.epochs=5.")
    ] = None
    seed: Annotated[str | None, typer.Option("--seed", "--seeds", help="One seed, or several: 0-4, or 0,2,5.")] = None
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: all cores for a run alone, else one.")] = (
        None
    )
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs trained at once, each on one thread; left out: one a core.")
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    data_dir: DataDir = None
    runs_dir: RunsDir = Path("runs")
    as_json: AsJson = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")] = False
    debug: Debug = False


class Job:
    """One call of a command: its options, the overrides they make, and how its results are shown."""

    def __init__(self, command: str, common: Common) -> None:
        self.command, self.common = command, common
        self.overrides = [config.parse_set(text) for text in common.sets or []]
        self.override("--threads", common.threads, "threads")
        if common.seed is not None:
            self.overrides.append(Override("seed", config.parse_seeds(common.seed), f"--seeds {common.seed}"))

    def override(self, flag: str, value: Any, *keys: str) -> None:
        """Let a flag, if it was given, set keys of the experiment file."""
        if value is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            self.overrides += [Override(key, value, f"{flag} {shown}") for key in keys]

    @property
    def of_run(self) -> bool:
        """Whether what should be an experiment is the name of a run, or of a group of them."""
        path = Path(self.common.experiment)
        return not {path.name, path.parent.name}.isdisjoint({*TEACHERS, *STUDENTS})

    def experiment(self) -> Experiment:
        experiment = config.load(self.common.experiment, self.overrides)
        if experiment.grid and self.command not in ("run", "report"):
            keys = " ".join(f"--set {key}=…" for key in experiment.grid)
            raise BadInput(f"{self.common.experiment}: has a grid, which `kd run` walks; for one of its points: {keys}")
        return experiment

    def session(self, experiment: Experiment, display: "Display") -> "Session":
        import torch

        from kdcli.core import select_device
        from kdcli.recipes import Session

        torch.set_num_threads(experiment.threads or os.cpu_count() or 1)
        return Session(
            experiment=experiment,
            runs_dir=self.common.runs_dir,
            device=select_device(self.common.device),
            data_dir=self.common.data_dir,
            jobs=self.common.jobs or os.cpu_count() or 1,
            retype=self.retype(),
            progress=display.epoch,
            note=display.note,
        )

    def retype(self) -> str:
        """The arguments to type for the same teachers."""
        return shlex.join(self.words("name", "data", "teacher", "ensemble"))

    def words(self, *sections: str) -> list[str]:
        """The arguments that describe the experiment, or these of its sections."""
        words = [self.common.experiment]
        changed = [o for o in self.overrides if not sections or o.key.split(".")[0] in sections]
        words += [w for o in changed for w in o.origin.split(" ", 1)]
        words += ["--data-dir", str(self.common.data_dir)] if self.common.data_dir is not None else []
        return [*words, *self.runs_dir()]

    def runs_dir(self) -> list[str]:
        """The words that name the runs folder, unless it is the usual one."""
        return ["--runs-dir", str(self.common.runs_dir)] if self.common.runs_dir != Path("runs") else []

    def next(self, documents: Sequence[Document]) -> str:
        """What to type after a command."""
        seeds = ["--seeds", self.common.seed] if self.common.seed is not None else []
        match self.command:
            case "train-teacher":
                return f"kd distill {self.retype()} {shlex.join(seeds)}"
            case "ensemble":
                return f"kd distill {self.retype()} --set distill.teacher=ensemble {shlex.join(seeds)}"
            case "evaluate":
                return f"kd report {self.retype()}"
        name = documents[0]["experiment"]
        several = self.command == "distill" and len(documents) > 1 and "baseline" in documents[0]
        words = ["compare", f"{name}/baseline", f"{name}/distill"] if several else ["report", documents[0]["run"]]
        return shlex.join(["kd", *words, *self.runs_dir()])

    def run(
        self, experiment: Experiment, recipe: "Callable[[Session], list[Document]]", teacher: str | None = None
    ) -> None:
        """Run a recipe and print what comes out, a document a seed; `teacher` is the run that --teacher named."""
        from kdcli import report

        if self.common.dry_run:
            return self.dry_run(experiment, *([("--teacher", teacher)] if teacher is not None else []))
        display = report.Display()
        try:
            documents = recipe(self.session(experiment, display))
        finally:
            display.close()
        whole = {"command": self.command, "experiment": experiment.name, "runs": documents}
        show(
            self.common.as_json, documents[0] if len(documents) == 1 else whole, *report.tables(self.command, documents)
        )
        display.note(f"next: {self.next(documents)}".rstrip())

    def dry_run(self, experiment: Experiment, *named: tuple[str, str]) -> None:
        """Show the resolved experiment, the device, and each net's parameters and steps; write nothing.

        `named`: flags and the runs that they name, which must be there.
        """
        import yaml

        from kdcli.core import select_device
        from kdcli.recipes import plan

        for flag, name in named:
            open_run(self.common.runs_dir, name, flag)
        resolved = experiment.model_dump(exclude_none=True)
        device, nets = str(select_device(self.common.device)), plan(experiment)
        document = {"command": self.command, "dry_run": True, "device": device, "nets": nets, "resolved": resolved}
        lines = [f"# device: {device}, threads: {experiment.threads or os.cpu_count()}"]
        for n in nets:
            steps = f"{n['steps']:,} steps of {n['batch_size']} images"
            at_most = "at most " if n["net"] in {entry.label for entry in experiment.omit_classes} else ""
            lines.append(f"# {n['net']}: {n['parameters']:,} parameters, {at_most}{steps}, {n['seeds']} seed(s)")
        if experiment.grid:
            points = config.points(self.common.experiment, self.overrides, experiment.grid)
            lines.append(f"# {len(points)} points of the grid, each with nets such as these")
        text = yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=80)
        show(self.common.as_json, document, text + "\n".join([*lines, "# --dry-run: nothing was written"]))


def show(as_json: bool, document: Document, *parts: "Table | str") -> None:
    """The document as JSON, or tables and lines for a person, on stdout."""
    from rich.console import Console

    if as_json:
        print(json.dumps(document, indent=1))
        return
    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False, soft_wrap=True)
        else:
            part.print(console)


def command(name: str) -> Callable[[Callable[..., None]], None]:
    """Register a function of a Job and options of its own as a command that has the common options as well."""

    def register(body: Callable[..., None]) -> None:
        shared = list(inspect.signature(Common).parameters.values())
        own = list(inspect.signature(body).parameters.values())[1:]

        def call(**options: Any) -> None:
            common = Common(**{parameter.name: options.pop(parameter.name) for parameter in shared})
            body(Job(name, common), **options)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in (shared[0], *own, *shared[1:])]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__doc__ = body.__doc__
        app.command(name)(call)

    return register


@command("train-teacher")
def train_teacher(job: Job, epochs: Epochs = None) -> None:
    """Train the teacher from hard labels."""
    job.override("--epochs", epochs, "teacher.train.epochs")
    experiment = job.experiment()
    from kdcli import recipes

    job.run(experiment, recipes.train_teacher)


@command("ensemble")
def ensemble(
    job: Job,
    members: Annotated[int | None, typer.Option(help="Number of members (ensemble.members).")] = None,
    average: Annotated[str | None, typer.Option(help="arithmetic or geometric (ensemble.average).")] = None,
    epochs: Epochs = None,
) -> None:
    """Train several teachers and average their predictions."""
    job.override("--members", members, "ensemble.members")
    job.override("--average", average, "ensemble.average")
    job.override("--epochs", epochs, "teacher.train.epochs")
    experiment = job.experiment()
    from kdcli import recipes

    job.run(experiment, recipes.ensemble)


def _distillation(job: Job, T: float | None, lambda1: float | None, lambda2: float | None, epochs: int | None) -> None:
    """The flags that distill and omit-classes share; --epochs is for every student, whichever section trains it."""
    for flag, value in (("T", T), ("lambda1", lambda1), ("lambda2", lambda2)):
        job.override(f"--{flag}", value, f"distill.{flag}")
    if epochs is not None:
        experiment = job.experiment()
        own = ["baseline"] if experiment.baseline.train else []
        own += [f"omit_classes.{i}" for i, entry in enumerate(experiment.omit_classes) if entry.train]
        job.override("--epochs", epochs, *(f"{section}.train.epochs" for section in ("student", *own)))


@command("distill")
def distill(
    job: Job,
    T: T = None,
    lambda1: Lambda1 = None,
    lambda2: Lambda2 = None,
    teacher: TeacherRun = None,
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="Compare with hard labels alone.")] = True,
    epochs: Epochs = None,
) -> None:
    """Train the student on the teacher's soft targets, beside the same student on hard labels alone."""
    _distillation(job, T, lambda1, lambda2, epochs)
    experiment = job.experiment()
    from kdcli import recipes

    job.run(experiment, partial(recipes.distill, teacher=teacher, with_baseline=baseline), teacher)


@command("omit-classes")
def omit_classes(
    job: Job,
    omit: Annotated[str | None, typer.Option(metavar="CLASSES", help="Classes to leave out: 3, or 3,5.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="CLASSES", help="Classes to keep, alone: 7,8.")] = None,
    T: T = None,
    lambda1: Lambda1 = None,
    lambda2: Lambda2 = None,
    teacher: TeacherRun = None,
    epochs: Epochs = None,
) -> None:
    """Distil with classes missing from the transfer set, then correct the bias."""
    _distillation(job, T, lambda1, lambda2, epochs)
    experiment = job.experiment()
    entries = experiment.omit_classes
    if omit is not None or keep is not None:
        wanted = config.omission(omit, keep)
        entries = [entry for entry in entries if entry.omitted == wanted.omitted] or [wanted]
    if not entries:
        raise BadInput(f"{job.common.experiment}: omit_classes: names no classes: use --omit 3 or --keep 7,8")
    from kdcli import recipes

    experiment = experiment.model_copy(update={"omit_classes": entries})
    job.run(experiment, partial(recipes.omit_classes, entries=entries, teacher=teacher), teacher)


@command("evaluate")
def evaluate(
    job: Job,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="A run to evaluate; repeat it.",
            autocompletion=_complete_run,
        ),
    ] = None,
) -> None:
    """Score what was trained: errors, calibration, agreement with the teacher, cost."""
    experiment = job.experiment()
    names = run or []
    if job.common.dry_run:
        return job.dry_run(experiment, *(("--run", name) for name in names))
    from kdcli import recipes, report

    display = report.Display()
    seeds = experiment.seed if job.common.seed is not None else None
    document = recipes.evaluate(job.session(experiment, display), names, seeds)
    show(job.common.as_json, document, *report.tables("evaluate", document["runs"]))
    display.note(f"next: {job.next(document['runs'])}")


@command("run")
def run(
    job: Job,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 where an `expect` row is missed.")] = False,
) -> None:
    """Do everything the file describes, and end with one table and a report."""
    experiment = job.experiment()
    if check and not experiment.expect:
        raise BadInput(f"--check: {job.common.experiment} has no expect section to check")
    if job.common.dry_run:
        return job.dry_run(experiment)
    document, _ = _whole(job, experiment, train=True)
    from kdcli import report

    missed = report.missed(document)
    print(*missed, sep="\n", end="\n" if missed else "", file=sys.stderr)
    if check and missed:
        raise typer.Exit(3)


@command("report")
def report_(
    job: Job,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT|RUN...", help="Runs, or more experiments.", autocompletion=_complete_experiment
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the report of an experiment whose runs are all finished, or of a run: report.html, Markdown, JSON and
    pictures."""
    names = [job.common.experiment, *(more or [])]
    if len(set(names)) < len(names):
        raise BadInput(f"kd report {shlex.join(names)}: names something twice")
    if len(names) > 1 and job.common.as_json:
        raise BadInput("--json: is one document: name one experiment or run")
    jobs = [Job(job.command, replace(job.common, experiment=name)) for name in names]
    found = [open_run(job.common.runs_dir, one.common.experiment) if one.of_run else one.experiment() for one in jobs]
    for one, of in zip(jobs, found, strict=True):
        if isinstance(of, Run):
            page = _report_run(one, of)
        elif one.common.dry_run:
            one.dry_run(of)
            continue
        else:
            _, page = _whole(one, of, train=False)
        if open_:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


def _report_run(job: Job, run: Run) -> Path:
    """Show a run beside its teacher and its baseline, and write its report into its folder."""
    if job.overrides or job.common.dry_run:
        raise BadInput(
            f"{run.name}: is a run, not an experiment: --set, --seed, --threads and --dry-run change nothing"
        )
    from kdcli import recipes, report

    experiment, display = recipes.experiment_of(run), report.Display()
    session = job.session(experiment, display)
    documents = recipes.run_documents(session, run)
    evaluation = recipes.evaluate(session, [d["run"] for d in documents])
    folder = session.runs_dir / run.name / "report"
    return _reported(job, session, [documents], evaluation, [()], folder, run.name, run.spec.settings)[1]


def _whole(job: Job, experiment: Experiment, train: bool) -> tuple[Document, Path]:
    """Run, or only find, all runs of an experiment; show the table and write the report."""
    common = job.common
    points = config.points(common.experiment, job.overrides, experiment.grid)
    from kdcli import recipes, report

    display = report.Display()
    try:
        session = job.session(experiment, display)
        if not train and (missing := recipes.unfinished(session, list(points.values()))):
            words = f"kd run {shlex.join(job.words())}"
            raise BadInput(f"{len(missing)} runs are not finished, the first is {missing[0]}; train them: {words}")
        documents, evaluation = recipes.run(session, list(points.values()))
    finally:
        display.close()
    stem = config.find(common.experiment).stem
    parts = ["report", *([stem] if stem != experiment.name else [])]
    if changes := [o.origin for o in job.overrides if o.key not in ("seed", "threads")]:  # a trial replaces nothing
        parts.append(hashlib.sha256(repr(changes).encode()).hexdigest()[:6])
    folder = session.runs_dir / experiment.name / "-".join(parts)
    settings = experiment.model_dump(exclude_none=True, exclude={"paper", "expect"})
    return _reported(job, session, documents, evaluation, list(points), folder, stem, settings)


def _reported(
    job: Job,
    session: "Session",
    documents: "list[list[Document]]",
    evaluation: Document,
    points: "list[config.Key]",
    folder: Path,
    title: str,
    settings: Document,
) -> tuple[Document, Path]:
    """Show the table and write the report of what was found at each point of a grid, or at the only one."""
    from kdcli import recipes, report
    from kdcli.page import write_report

    document = report.summary(session.experiment, points, documents, evaluation)
    document |= {"command": job.command, "file": title, "made": recipes.made(session, documents), "settings": settings}
    show(job.common.as_json, document, report.final_table(document), *report.remarks(document))
    files = write_report(session, document, evaluation, folder)
    session.note(f"wrote {folder}: {', '.join(file.name for file in files)}")
    students = [d["run"] for of_point in documents for d in of_point if d["command"] == "distill"]
    ship = f", or ship a student: {shlex.join(['kd', 'export', students[0], *job.runs_dir()])}" if students else ""
    session.note(f"next: open {files[0]}{ship}")
    return document, files[0]


@app.command("compare")
def compare_runs(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|GROUP...", help="A run, or digits/distill: all seeds.", autocompletion=_complete_group
        ),
    ],
    data_dir: DataDir = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="Print Markdown on stdout.")] = False,
    match: Annotated[
        str, typer.Option(metavar="TEXT", help="Of the others only those with this in their name or settings: T=4.")
    ] = "",
    sort: Annotated[Literal["given", "errors"], typer.Option(help="Order of the others.")] = "given",
    debug: Debug = False,
) -> None:
    """Compare runs, or groups of runs that differ in seed alone: settings, errors, and a verdict against the first."""
    if as_json and as_markdown:
        raise BadInput("--json --md: choose one of them")
    from kdcli import report
    from kdcli.compare import compare

    document = compare(runs_dir, names, data_dir, report.Display().note, match, by_errors=sort == "errors")
    parts = report.compare_tables(document)
    if as_markdown:
        print("\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts))
    else:
        show(as_json, document, *parts)


@app.command("export")
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A finished run: a student, a teacher, an ensemble.", autocompletion=_complete_run
        ),
    ],
    form: Annotated[Literal["onnx", "torch", "safetensors"], typer.Option("--format", help="Of the file.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file to write; left out: named after the run.")] = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a net for others to run, with its model card, after proving it on all test images."""
    found = open_run(runs_dir, run)
    from kdcli import ship

    d = ship.export(found, form, out, data_dir)
    lines = [
        f"wrote {d['file']}: {d['bytes']:,} bytes, {d['errors']} errors on {d['total']:,} images as in torch "
        f"({d['torch_errors']}); probabilities differ by {d['max_difference']:.1e} at most",
        f"wrote {d['card']}",
    ]
    if form == "onnx":
        lines.append(f"try it: kd predict {shlex.quote(d['file'])} IMAGE.png")
    show(as_json, d, *lines)


@app.command("predict")
def predict(
    net: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL.onnx", help="A finished run, or what kd export wrote.", autocompletion=_complete_run
        ),
    ],
    images: Annotated[list[Path] | None, typer.Argument(metavar="IMAGE...", help="PNG or JPEG files.")] = None,
    test_images: Annotated[list[int] | None, typer.Option("--test-image", metavar="N", help="Repeat it.")] = None,
    temperatures: Annotated[str, typer.Option("--T", help="Of the teacher's view: 4, or 1,4,20.")] = "1",
    top: Annotated[int, typer.Option(min=1, help="Show so many classes.")] = 3,
    invert: Annotated[bool, typer.Option("--invert", help="For dark ink on a light ground.")] = False,
    data_dir: DataDir = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Classify images; of a student, show its teacher's view beside its own."""
    if not images and not test_images:
        raise BadInput("kd predict: name image files, or --test-image N")
    if invert and not images:
        raise BadInput("--invert: is for image files, and none is named; test images are light on dark as they are")
    hot = [config.parse_set(f"distill.T={part}").value for part in temperatures.split(",")]
    if not all(isinstance(T, int | float) and not isinstance(T, bool) and 1e-3 <= T <= 1e4 for T in hot):
        raise BadInput(f"--T {temperatures}: must be numbers from 0.001 to 10000 with commas between, such as 1,4,20")
    from kdcli import report, ship

    document = ship.predict(runs_dir, net, images or [], test_images or [], [float(T) for T in hot], invert, data_dir)
    show(as_json, document, *report.predictions(document, top))
    for image in document["images"]:
        if image["mostly_ink"]:
            hint = "without --invert" if invert else "with --invert"
            print(f"{image['image']}: is read as a digit lighter than its ground; try it {hint}", file=sys.stderr)


runs_app = typer.Typer(invoke_without_command=True, help="List the runs, or remove some.")
app.add_typer(runs_app, name="runs")
ORDERS: dict[str, Callable[[Document], Any]] = {
    "name": lambda d: d["run"],
    "errors": lambda d: (d["errors"] is None, d["errors"]),
    "age": lambda d: d["age_s"],
    "size": lambda d: -d["bytes"],
}


@runs_app.callback()
def runs(
    context: typer.Context,
    match: Annotated[str, typer.Option(metavar="TEXT", help="Only runs with this in their name or status.")] = "",
    sort: Annotated[Literal["name", "errors", "age", "size"], typer.Option(help="What to sort by.")] = "name",
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs: status, errors, age, size. `kd runs rm` removes some."""
    if context.invoked_subcommand is not None:
        if match or as_json or sort != "name" or runs_dir != Path("runs"):
            raise BadInput("kd runs: the options of rm go behind it: kd runs rm --runs-dir DIR RUN…")
        return
    listed = sorted(
        (d for d in survey(runs_dir) if match.lower() in f"{d['run']} {d['status']}".lower()), key=ORDERS[sort]
    )
    if runs_dir != Path("runs") and not runs_dir.is_dir():
        raise BadInput(f"--runs-dir {runs_dir}: there is no such folder")
    from kdcli import report

    show(as_json, {"command": "runs", "runs": listed}, report.runs_table(listed))


@runs_app.command("rm")
def runs_rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, by name or by path.",
            autocompletion=_complete_run,
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Even if other runs were made from them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs_dir: RunsDir = Path("runs"),
    debug: Debug = False,
) -> None:
    """Remove runs, unless others were made from them."""
    folders, listed = find_folders(runs_dir, names), survey(runs_dir)
    chosen = ["/".join(folder.parts[-3:]) for folder in folders]
    orphans = dependents(listed, chosen)
    if orphans and not force:
        lines = [f"  {run}" for run in orphans]
        raise BadInput("these runs were made from them; remove them too, or add --force:", *lines)
    for run in orphans:
        print(f"orphaned: {run}", file=sys.stderr)
    from kdcli.report import number_of_runs, size

    taken = size(sum(d["bytes"] for d in listed if d["run"] in chosen))
    print(*(f"remove: {run}" for run in chosen), f"{number_of_runs(len(chosen))}, {taken}", sep="\n", file=sys.stderr)
    if not yes and not sys.stdin.isatty():
        raise BadInput("kd runs rm: asks before it removes, and nobody is there to answer: add --yes")
    if not yes:
        print("Remove them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed", file=sys.stderr)
            return
    remove(sorted(folders, key=lambda folder: folder.parent.name in ("train-teacher", "ensemble")))
    print(f"removed {number_of_runs(len(chosen))}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Knowledge distillation experiments from one YAML file."""
    if version:
        print(f"kd {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run `kd`: 0 done, 1 failed, 2 wrong usage or input, 3 an expectation missed, 130 or 143 interrupted."""
    sys.exit(_main())


def _interrupt(*_: object) -> None:
    """The first Ctrl-C ends the command in order; a second one ends it at once, which loses nothing either."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def _main() -> int:
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, _interrupt)
    try:
        code = app(standalone_mode=False) or 0  # typer makes 130 of Ctrl-C
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BadInput as error:
        if debug:
            raise
        print(*error.lines, sep="\n", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # a usage error of typer's
            where = getattr(getattr(error, "ctx", None), "command_path", "kd")
            message = error.format_message().rstrip(".").replace("Value error, ", "")
            print(f"kd: {message} (see {where} --help)", file=sys.stderr)
            return 2
        for line in error.lines if isinstance(error, Failed) else [failure(error)]:
            print(f"kd: failed: {line}", file=sys.stderr)
        return 1
    if code in (130, 143):
        print(f"interrupted: to continue, type again: {shlex.join(['kd', *sys.argv[1:]])}", file=sys.stderr)
    return code
