"""The `kd` command: flags become overrides of the experiment file, a part of its plan is done, the result is shown."""

import hashlib
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from kdcli import BadInput, Failed, __version__, failure, show, yamlfile
from kdcli.config import Experiment, Kind, Row, Section
from kdcli.runs import STUDENTS, TEACHERS, Listed, Places, dependents, find_folder, remove, survey
from kdcli.yamlfile import Override

if TYPE_CHECKING:  # they need torch, which help and wrong usage do without
    from kdcli.results import Document, Subject, Summary
    from kdcli.work import Work

app = typer.Typer(name="kd", add_completion=True, pretty_exceptions_enable=False)


def _complete_experiment(incomplete: str) -> list[str]:
    """Experiments and, for `kd report`, once a slash is typed, runs."""
    names = [name for name in yamlfile.experiments() if name.startswith(incomplete)]
    return names or (_complete_run(incomplete) if "/" in incomplete else [])


def _complete_run(incomplete: str) -> list[str]:
    """The runs in ./runs, for the shell's completion."""
    return [one.run for one in survey(Path("runs")) if one.run.startswith(incomplete)]


def _complete_group(incomplete: str) -> list[str]:
    """What `kd compare` takes: the groups of the runs in ./runs and, once one is typed whole, its runs."""
    groups = dict.fromkeys(one.run.rpartition("/")[0] for one in survey(Path("runs")))
    return [group for group in groups if group.startswith(incomplete)] or _complete_run(incomplete)


T = Annotated[float | None, Option("--T", help="Temperature of the soft targets (distill.T).")]
Lambda1 = Annotated[float | None, Option("--lambda1", help="Weight of the soft targets (distill.lambda1).")]
Lambda2 = Annotated[
    float | None, Option("--lambda2", help="Weight of the hard labels; left out, here and in the file: 1 - lambda1.")
]
TeacherRun = Annotated[
    str | None, Option("--teacher", metavar="RUN", help="Learn from this run instead.", autocompletion=_complete_run)
]
Epochs = Annotated[int | None, Option("--epochs", help="Epochs of each training of this command.")]
RunsDir = Annotated[Path, Option(help="Where the run directories lie.")]
DataDir = Annotated[Path | None, Option(help="Where MNIST lies or is downloaded to; left out: $KD_DATA, else data.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks.")]


@dataclass(frozen=True)
class Common:
    """The options that every command has."""

    experiment: Annotated[
        str,
        Argument(help="An experiment's name (mnist, digits) or its YAML file.", autocompletion=_complete_experiment),
    ] = "mnist"
    sets: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Set any key: teacher.train.epochs=5.")
    ] = None
    seed: Annotated[str | None, Option("--seed", "--seeds", help="One seed, or several: 0-4, or 0,2,5.")] = None
    threads: Annotated[int | None, Option(help="CPU threads; left out: all cores for a run alone, else one.")] = None
    jobs: Annotated[
        int | None, Option(min=1, help="Runs trained at once, each on one thread; left out: one a core.")
    ] = None
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    data_dir: DataDir = None
    runs_dir: RunsDir = Path("runs")
    as_json: AsJson = False
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be done; write nothing.")] = False
    debug: Debug = False


class Call:
    """One call of a command: its options, the overrides they make, and how its results are shown."""

    def __init__(self, command: str, common: Common) -> None:
        self.command, self.common, self.display = command, common, show.Display()
        self.overrides = [yamlfile.parse_set(text) for text in common.sets or []]
        self.override("--threads", common.threads, "threads")
        if common.seed is not None:
            self.overrides.append(Override("seed", yamlfile.parse_seeds(common.seed), f"--seeds {common.seed}"))

    def override(self, flag: str, value: Any, *keys: str) -> None:
        """Let a flag, if it was given, set keys of the experiment file."""
        if value is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            self.overrides += [Override(key, value, f"{flag} {shown}") for key in keys]

    def experiment(self) -> Experiment:
        """The experiment as overridden. Raises BadInput where it has a grid that the command cannot walk."""
        experiment = yamlfile.load(self.common.experiment, self.overrides).experiment
        if experiment.grid and self.command not in ("run", "report"):
            keys = " ".join(f"--set {key}=…" for key in experiment.grid)
            raise BadInput(f"{self.common.experiment}: has a grid, which `kd run` walks; for one of its points: {keys}")
        return experiment

    def prepare(self, teacher: str | None = None, baseline: bool = True) -> "Work":
        """What the command is to do. Raises BadInput for all that can be known before a run is trained."""
        from kdcli import work

        threads = self.experiment().threads
        asked = work.Asked(self.command, self.common.experiment, self.overrides, self.retype())
        download = not self.common.dry_run
        return work.prepare(asked, self.places(threads), self.display.note, teacher, baseline, download)

    def places(self, threads: int | None = None) -> Places:
        from kdcli.device import select_device

        device = str(select_device(self.common.device))
        return Places(self.common.runs_dir, self.common.data_dir, device, threads or os.cpu_count() or 1)

    def obtain(self, work: "Work") -> None:
        """Train the jobs that are not finished."""
        from kdcli.engine import obtain

        of_workers = work.places._replace(threads=work.experiment.threads or 1)
        at_once = self.common.jobs or os.cpu_count() or 1
        try:
            obtain(work.jobs, work.places, of_workers, at_once, self.display.epoch, self.display.note)
        finally:
            self.display.close()

    def run(self, kind: Kind, teacher: str | None = None, baseline: bool = True) -> None:
        """Do the command's part of the plan and print what comes out, a document a run of a kind."""
        work = self.prepare(teacher, baseline)
        if self.common.dry_run:
            return self.dry_run(work)
        self.obtain(work)
        found = work.documents()
        shown = [d for d in found if d.kind == kind]
        whole = Several(command=self.command, experiment=shown[0].experiment, runs=shown)
        tables = show.tables(self.command, found, work.dataset.facts.classes)
        present(self.common.as_json, shown[0] if len(shown) == 1 else whole, *tables)
        self.display.note(f"next: {self.next(shown)}".rstrip())

    def report(self, work: "Work", subject: "Subject", folder: Path) -> "tuple[Summary, Path]":
        """Show the table and write the report of finished runs; returns them and the page."""
        from kdcli.page import write_report

        summary, evaluations = work.summary(subject)
        present(self.common.as_json, summary, show.final_table(summary), *show.remarks(summary))
        files = write_report(summary, evaluations, work.shown(), work.dataset, work.places, folder)
        self.display.note(f"wrote {folder}: {', '.join(file.name for file in files)}")
        student = next((job.spec.name for job in work.jobs if job.row.kind == "student"), "")
        ship = f", or ship a student: {shlex.join(['kd', 'export', student, *self.runs_dir()])}" if student else ""
        self.display.note(f"next: open {files[0]}{ship}")
        return summary, files[0]

    def report_experiment(self, work: "Work") -> "tuple[Summary, Path]":
        """The report of an experiment whose runs are all finished."""
        from kdcli.results import about

        stem, name = Path(work.points[0].file).stem, work.experiment.name
        parts = ["report", *([stem] if stem != name else [])]
        if changes := [o.origin for o in self.overrides if o.key not in ("seed", "threads")]:  # a trial replaces none
            parts.append(hashlib.sha256(repr(changes).encode()).hexdigest()[:6])
        subject = about(self.experiment(), stem, [point.at for point in work.points])
        return self.report(work, subject, work.places.runs_dir / name / "-".join(parts))

    def dry_run(self, work: "Work") -> None:
        """Show the resolved experiment, the device, and what would be trained; write nothing."""
        import yaml

        from kdcli.plan import describe

        resolved = self.experiment().model_dump(exclude_none=True)
        runs = describe(work.jobs, work.dataset, work.places.runs_dir)
        device = work.places.device
        document = Several(command=self.command, dry_run=True, device=device, runs=runs, resolved=resolved)
        text = yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=80)
        text += f"# device: {device}, threads: {work.places.threads}"
        present(self.common.as_json, document, text, show.planned(runs), "# --dry-run: nothing was written")

    def retype(self) -> str:
        """The arguments to type for the same teachers."""
        return shlex.join(self.words("name", "data", "teacher", "ensemble"))

    def words(self, *sections: str) -> list[str]:
        """The arguments that describe the experiment, or these of its sections."""
        changed = [o for o in self.overrides if not sections or o.key.split(".")[0] in sections]
        words = [self.common.experiment, *(w for o in changed for w in o.origin.split(" ", 1))]
        words += ["--data-dir", str(self.common.data_dir)] if self.common.data_dir is not None else []
        return [*words, *self.runs_dir()]

    def runs_dir(self) -> list[str]:
        """The words that name the runs folder, unless it is the usual one."""
        return ["--runs-dir", str(self.common.runs_dir)] if self.common.runs_dir != Path("runs") else []

    def next(self, documents: "Sequence[Document]") -> str:
        """What to type after a command."""
        seeds = shlex.join(["--seeds", self.common.seed] if self.common.seed is not None else [])
        if self.command == "train-teacher":
            return f"kd distill {self.retype()} {seeds}"
        if self.command == "ensemble":
            return f"kd distill {self.retype()} --set distill.teacher=ensemble {seeds}"
        name = documents[0].experiment
        several = self.command == "distill" and len(documents) > 1 and documents[0].baseline
        words = ["compare", f"{name}/baseline", f"{name}/distill"] if several else ["report", documents[0].run]
        return shlex.join(["kd", *words, *self.runs_dir()])


class Several(Section):
    """The document of a command about several runs."""

    command: str
    experiment: str | None = None
    dry_run: bool | None = None
    device: str | None = None
    runs: list[Any]
    resolved: dict[str, Any] | None = None


def present(as_json: bool, document: Section, *parts: show.Table | str) -> None:
    """The document as JSON, or tables and lines for a person, on stdout."""
    from rich.console import Console

    if as_json:
        print(document.model_dump_json(indent=1, exclude_none=True, by_alias=True))
        return
    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False, soft_wrap=True)
        else:
            part.print(console)


def command(name: str) -> Callable[[Callable[..., None]], None]:
    """Register a function of a Call and options of its own as a command that has the common options as well."""

    def register(body: Callable[..., None]) -> None:
        shared = list(inspect.signature(Common).parameters.values())
        own = list(inspect.signature(body).parameters.values())[1:]

        def call(**options: Any) -> None:
            common = Common(**{parameter.name: options.pop(parameter.name) for parameter in shared})
            body(Call(name, common), **options)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in (shared[0], *own, *shared[1:])]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__doc__ = body.__doc__
        app.command(name)(call)

    return register


@command("train-teacher")
def train_teacher(call: Call, epochs: Epochs = None) -> None:
    """Train the teacher from hard labels."""
    call.override("--epochs", epochs, "teacher.train.epochs")
    call.run("teacher")


@command("ensemble")
def ensemble(
    call: Call,
    members: Annotated[int | None, Option(help="Number of members (ensemble.members).")] = None,
    average: Annotated[str | None, Option(help="arithmetic or geometric (ensemble.average).")] = None,
    epochs: Epochs = None,
) -> None:
    """Train several teachers and average their predictions."""
    call.override("--members", members, "ensemble.members")
    call.override("--average", average, "ensemble.average")
    call.override("--epochs", epochs, "teacher.train.epochs")
    if call.experiment().ensemble is None:
        raise BadInput("ensemble: the experiment has no such section: add `ensemble: {members: 5}` or --members 5")
    call.run("ensemble")


def _distillation(
    call: Call, T: float | None, lambda1: float | None, lambda2: float | None, epochs: int | None
) -> None:
    """The flags that distill and omit-classes share; --epochs is for every student, whichever section trains it."""
    for flag, value in (("T", T), ("lambda1", lambda1), ("lambda2", lambda2)):
        call.override(f"--{flag}", value, f"distill.{flag}")
    if epochs is not None:
        experiment = call.experiment()
        own = ["baseline"] if experiment.baseline.train else []
        own += [f"omit_classes.{i}" for i, entry in enumerate(experiment.omit_classes) if entry.train]
        call.override("--epochs", epochs, *(f"{section}.train.epochs" for section in ("student", *own)))


@command("distill")
def distill(
    call: Call,
    T: T = None,
    lambda1: Lambda1 = None,
    lambda2: Lambda2 = None,
    teacher: TeacherRun = None,
    baseline: Annotated[bool, Option("--baseline/--no-baseline", help="Compare with hard labels alone.")] = True,
    epochs: Epochs = None,
) -> None:
    """Train the student on the teacher's soft targets, beside the same student on hard labels alone."""
    _distillation(call, T, lambda1, lambda2, epochs)
    call.run("student", teacher=teacher, baseline=baseline)


@command("omit-classes")
def omit_classes(
    call: Call,
    omit: Annotated[str | None, Option(metavar="CLASSES", help="Classes to leave out: 3, or 3,5.")] = None,
    keep: Annotated[str | None, Option(metavar="CLASSES", help="Classes to keep, alone: 7,8.")] = None,
    T: T = None,
    lambda1: Lambda1 = None,
    lambda2: Lambda2 = None,
    teacher: TeacherRun = None,
    epochs: Epochs = None,
) -> None:
    """Distil with classes missing from the transfer set, then correct the bias."""
    entries = call.experiment().omit_classes
    if omit is not None or keep is not None:
        wanted = yamlfile.omission(omit, keep)
        entries = [entry for entry in entries if entry.label == wanted.label] or [wanted]
        flags = " ".join(f"--{flag} {text}" for flag, text in (("omit", omit), ("keep", keep)) if text is not None)
        given = [entry.model_dump(exclude_unset=True) for entry in entries]
        call.overrides.append(Override("omit_classes", given, flags))
    if not entries:
        raise BadInput(f"{call.common.experiment}: omit_classes: names no classes: use --omit 3 or --keep 7,8")
    _distillation(call, T, lambda1, lambda2, epochs)
    call.run("omission", teacher=teacher)


@command("evaluate")
def evaluate(
    call: Call,
    run: Annotated[
        list[str] | None, Option(metavar="RUN", help="A run to evaluate; repeat it.", autocompletion=_complete_run)
    ] = None,
) -> None:
    """Score what was trained: errors, calibration, agreement with the teacher, cost."""
    work = call.prepare()
    from kdcli.plan import KINDS, Job, evaluable
    from kdcli.results import Evaluations, evaluate

    seeds = work.experiment.seed if call.common.seed is not None else None
    found = evaluable(work.planned, work.places, run or [], seeds, call.display.note, call.retype())
    if call.common.dry_run:
        rows = [Row(name=KINDS[run.spec.command], kind=KINDS[run.spec.command]) for run, _ in found]
        return call.dry_run(replace(work, jobs=[Job(row, r.spec) for row, (r, _) in zip(rows, found, strict=True)]))
    name, classes = work.experiment.name, work.dataset.facts.classes
    document = Evaluations(experiment=name, classes=classes, runs=evaluate(found, work.dataset, work.places))
    present(call.common.as_json, document, *show.evaluations(document))
    call.display.note(f"next: kd report {call.retype()}")


@command("run")
def run(
    call: Call, check: Annotated[bool, Option("--check", help="Exit with 3 where an `expect` row is missed.")] = False
) -> None:
    """Do everything the file describes, and end with one table and a report."""
    if check and not call.experiment().expect:
        raise BadInput(f"--check: {call.common.experiment} has no expect section to check")
    work = call.prepare()
    if call.common.dry_run:
        return call.dry_run(work)
    call.obtain(work)
    summary, _ = call.report_experiment(work)
    missed = show.missed(summary)
    print(*missed, sep="\n", end="\n" if missed else "", file=sys.stderr)
    if check and missed:
        raise typer.Exit(3)


@command("report")
def report(
    call: Call,
    more: Annotated[
        list[str] | None,
        Argument(metavar="EXPERIMENT|RUN...", help="Runs, or more experiments.", autocompletion=_complete_experiment),
    ] = None,
    open_: Annotated[bool, Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the report of an experiment whose runs are all finished, or of a run: report.html, Markdown, JSON and
    pictures."""
    names = [call.common.experiment, *(more or [])]
    if len(set(names)) < len(names):
        raise BadInput(f"kd report {shlex.join(names)}: names something twice")
    if len(names) > 1 and call.common.as_json:
        raise BadInput("--json: is one document: name one experiment or run")
    calls = [Call(call.command, replace(call.common, experiment=name)) for name in names]
    works = [_finished(one) for one in calls]  # all of them, before any is written
    for one, (work, subject) in zip(calls, works, strict=True):
        if one.common.dry_run:
            one.dry_run(work)
            continue
        if subject:
            _, page = one.report(work, subject, work.places.runs_dir / subject.file / "report")
        else:
            _, page = one.report_experiment(work)
        if open_:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


def _finished(call: Call) -> "tuple[Work, Subject | None]":
    """The work of reporting an experiment or, with a subject, a single run. Raises BadInput where a run is missing."""
    name, path = call.common.experiment, Path(call.common.experiment)
    if {path.name, path.parent.name}.isdisjoint({*TEACHERS, *STUDENTS}):
        work = call.prepare()
        if missing := work.unfinished():
            words = f"kd run {shlex.join(call.words())}"
            raise BadInput(f"{len(missing)} runs are not finished, the first is {missing[0]}; train them: {words}")
        return work, None
    if call.overrides or call.common.dry_run:
        raise BadInput(f"{name}: is a run, not an experiment: --set, --seed, --threads and --dry-run change nothing")
    from kdcli.work import prepare_run

    return prepare_run(name, call.places(), call.display.note)


@app.command("compare")
def compare_runs(
    names: Annotated[
        list[str],
        Argument(metavar="RUN|GROUP...", help="A run, or digits/distill: all seeds.", autocompletion=_complete_group),
    ],
    data_dir: DataDir = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
    as_markdown: Annotated[bool, Option("--md", help="Print Markdown on stdout.")] = False,
    match: Annotated[
        str, Option(metavar="TEXT", help="Of the others only those with this in their name or settings: T=4.")
    ] = "",
    sort: Annotated[Literal["given", "errors"], Option(help="Order of the others.")] = "given",
    debug: Debug = False,
) -> None:
    """Compare runs, or groups of runs that differ in seed alone: settings, errors, and a verdict against the first."""
    if as_json and as_markdown:
        raise BadInput("--json --md: choose one of them")
    from kdcli.compare import compare

    document = compare(runs_dir, names, data_dir, show.Display().note, match, by_errors=sort == "errors")
    parts = show.compare_tables(document)
    if as_markdown:
        print("\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts))
    else:
        present(as_json, document, *parts)


@app.command("export")
def export_(
    run: Annotated[
        str,
        Argument(
            metavar="RUN", help="A finished run: a student, a teacher, an ensemble.", autocompletion=_complete_run
        ),
    ],
    form: Annotated[Literal["onnx", "torch", "safetensors"], Option("--format", help="Of the file.")] = "onnx",
    out: Annotated[Path | None, Option(help="The file to write; left out: named after the run.")] = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a net for others to run, with its model card, after proving it on all test images."""
    found = Places(runs_dir).open(run)
    from kdcli.export import export

    d = export(found, form, out, data_dir)
    lines = [
        f"wrote {d.file}: {d.bytes:,} bytes, {d.errors} errors on {d.total:,} images as in torch ({d.torch_errors}); "
        f"probabilities differ by {d.max_difference:.1e} at most",
        f"wrote {d.card}",
    ]
    if form == "onnx":
        lines.append(f"try it: kd predict {shlex.quote(d.file)} IMAGE.png")
    present(as_json, d, *lines)


@app.command("predict")
def predict_(
    net: Annotated[
        str,
        Argument(
            metavar="RUN|MODEL.onnx", help="A finished run, or what kd export wrote.", autocompletion=_complete_run
        ),
    ],
    images: Annotated[list[Path] | None, Argument(metavar="IMAGE...", help="PNG or JPEG files.")] = None,
    test_images: Annotated[list[int] | None, Option("--test-image", metavar="N", help="Repeat it.")] = None,
    temperatures: Annotated[str, Option("--T", help="Of the teacher's view: 4, or 1,4,20.")] = "1",
    top: Annotated[int, Option(min=1, help="Show so many classes.")] = 3,
    invert: Annotated[bool, Option("--invert", help="For dark ink on a light ground.")] = False,
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
    hot = [yamlfile.parse_set(f"distill.T={part}").value for part in temperatures.split(",")]
    if not all(isinstance(T, int | float) and not isinstance(T, bool) and 1e-3 <= T <= 1e4 for T in hot):
        raise BadInput(f"--T {temperatures}: must be numbers from 0.001 to 10000 with commas between, such as 1,4,20")
    from kdcli.predict import predict

    places, note = Places(runs_dir, data_dir), show.Display().note
    document = predict(places, net, images or [], test_images or [], [float(T) for T in hot], invert, note)
    present(as_json, document, *show.predictions(document, top))
    for image in document.images:
        if image.mostly_ink:
            hint = "without --invert" if invert else "with --invert"
            note(f"{image.image}: is read as lighter than its ground; try it {hint}")


runs_app = typer.Typer(invoke_without_command=True, help="List the runs, or remove some.")
app.add_typer(runs_app, name="runs")
ORDERS: dict[str, Callable[[Listed], Any]] = {
    "name": lambda one: one.run,
    "errors": lambda one: (one.errors is None, one.errors),
    "age": lambda one: one.age_s,
    "size": lambda one: -one.bytes_,
}


@runs_app.callback()
def runs(
    context: typer.Context,
    match: Annotated[str, Option(metavar="TEXT", help="Only runs with this in their name or status.")] = "",
    sort: Annotated[Literal["name", "errors", "age", "size"], Option(help="What to sort by.")] = "name",
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
        (one for one in survey(runs_dir) if match.lower() in f"{one.run} {one.status}".lower()), key=ORDERS[sort]
    )
    if runs_dir != Path("runs") and not runs_dir.is_dir():
        raise BadInput(f"--runs-dir {runs_dir}: there is no such folder")
    present(as_json, Several(command="runs", runs=listed), show.runs_table(listed))


@runs_app.command("rm")
def runs_rm(
    names: Annotated[
        list[str], Argument(metavar="RUN...", help="Runs, by name or by path.", autocompletion=_complete_run)
    ],
    force: Annotated[bool, Option("--force", help="Even if other runs were made from them.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    runs_dir: RunsDir = Path("runs"),
    debug: Debug = False,
) -> None:
    """Remove runs, unless others were made from them."""
    folders = list(dict.fromkeys(find_folder(runs_dir, name) for name in names))
    listed = survey(runs_dir)
    chosen = ["/".join(folder.parts[-3:]) for folder in folders]
    orphans = dependents(listed, chosen)
    if orphans and not force:
        lines = [f"  {run}" for run in orphans]
        raise BadInput("these runs were made from them; remove them too, or add --force:", *lines)
    for run in orphans:
        print(f"orphaned: {run}", file=sys.stderr)
    taken = show.size(sum(one.bytes_ for one in listed if one.run in chosen))
    print(
        *(f"remove: {run}" for run in chosen), f"{show.number_of_runs(len(chosen))}, {taken}", sep="\n", file=sys.stderr
    )
    if not yes and not sys.stdin.isatty():
        raise BadInput("kd runs rm: asks before it removes, and nobody is there to answer: add --yes")
    if not yes:
        print("Remove them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed", file=sys.stderr)
            return
    remove(sorted(folders, key=lambda folder: folder.parent.name in ("train-teacher", "ensemble")))
    print(f"removed {show.number_of_runs(len(chosen))}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: Annotated[bool, Option("--version", help="Print the version.")] = False
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
