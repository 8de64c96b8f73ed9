"""The `kd` command: flags become overrides of the experiment file, a part of its plan is done, the result is shown."""

import inspect
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
from rich.console import Console
from typer import Argument, Option

from kdcli import BadInput, Failed, __version__, failure, show, yamlfile
from kdcli.config import Experiment, Kind, Section
from kdcli.runs import STUDENTS, TEACHERS, Listed, Places, dependents, find_folder, remove, survey
from kdcli.yamlfile import Override

if TYPE_CHECKING:  # they need torch, which help and wrong usage do without
    from kdcli.results import Document, Summary
    from kdcli.work import Work

app = typer.Typer(name="kd", add_completion=True, pretty_exceptions_enable=False)
runs_app = typer.Typer(invoke_without_command=True, help="List the runs, or remove some.")
app.add_typer(runs_app, name="runs")


def _experiments(incomplete: str) -> list[str]:
    """For the shell's completion: experiments and, for `kd report`, once a slash is typed, runs."""
    names = [name for name in yamlfile.experiments() if name.startswith(incomplete)]
    return names or (_runs(incomplete) if "/" in incomplete else [])


def _runs(incomplete: str) -> list[str]:
    """The runs in ./runs."""
    return [one.run for one in survey(Path("runs")) if one.run.startswith(incomplete)]


def _groups(incomplete: str) -> list[str]:
    """What `kd compare` takes: the groups of the runs in ./runs and, once one is typed whole, its runs."""
    groups = dict.fromkeys(one.run.rpartition("/")[0] for one in survey(Path("runs")))
    return [group for group in groups if group.startswith(incomplete)] or _runs(incomplete)


NameArgument = partial(Argument, autocompletion=_experiments)
RunArgument = partial(Argument, autocompletion=_runs)
RunOption = partial(Option, metavar="RUN", autocompletion=_runs)

# Which of the options of a Call a command has, in the order of its help.
READING = ("data_dir", "runs_dir", "as_json", "debug")
TRAINING = ("experiment", "sets", "seed", "threads", "jobs", "device", "dry_run", *READING)
DISTILLING = ("T", "lambda1", "lambda2", "teacher", "epochs", *TRAINING)


@dataclass
class Call:
    """One call of a command: the options that commands share, the overrides they make, how its results are shown."""

    command: str
    experiment: Annotated[str, NameArgument(help="An experiment's name (mnist, digits) or its YAML file.")] = "mnist"
    T: Annotated[float | None, Option("--T", help="Temperature of the soft targets (distill.T).")] = None
    lambda1: Annotated[float | None, Option(help="Weight of the soft targets (distill.lambda1).")] = None
    lambda2: Annotated[
        float | None, Option(help="Weight of the hard labels; left out, here and in the file: 1 - lambda1.")
    ] = None
    teacher: Annotated[str | None, RunOption(help="Learn from this run instead.")] = None
    epochs: Annotated[int | None, Option(help="Epochs of each training of this command.")] = None
    sets: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Set any key: teacher.train.epochs=5.")
    ] = None
    seed: Annotated[str | None, Option("--seed", "--seeds", help="One seed, or several: 0-4, or 0,2,5.")] = None
    threads: Annotated[int | None, Option(help="CPU threads; left out: all cores for a run alone, else one.")] = None
    jobs: Annotated[
        int | None, Option(min=1, help="Runs trained at once, each on one thread; left out: one a core.")
    ] = None
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    data_dir: Annotated[
        Path | None, Option(help="Where MNIST lies or is downloaded to; left out: $KD_DATA, else data.")
    ] = None
    runs_dir: Annotated[Path, Option(help="Where the run directories lie.")] = Path("runs")
    as_json: Annotated[bool, Option("--json", help="Print one JSON document on stdout.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be done; write nothing.")] = False
    debug: Annotated[bool, Option("--debug", help="Show tracebacks.")] = False

    def __post_init__(self) -> None:
        self.display = show.Display()
        self.overrides = [yamlfile.parse_set(text) for text in self.sets or []]
        self.override("--threads", self.threads, "threads")
        if self.seed is not None:
            self.overrides.append(Override("seed", yamlfile.parse_seeds(self.seed), f"--seeds {self.seed}"))

    def override(self, flag: str, value: Any, *keys: str) -> None:
        """Let a flag, if it was given, set keys of the experiment file."""
        if value is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            self.overrides += [Override(key, value, f"{flag} {shown}") for key in keys]

    def load(self) -> Experiment:
        """The experiment as overridden. Raises BadInput where it has a grid that the command cannot walk."""
        experiment = yamlfile.load(self.experiment, self.overrides).experiment
        if experiment.grid and self.command not in ("run", "report"):
            keys = " ".join(f"--set {key}=…" for key in experiment.grid)
            raise BadInput(f"{self.experiment}: has a grid, which `kd run` walks; for one of its points: {keys}")
        return experiment

    def prepare(self, baseline: bool = True) -> "Work":
        """What the command is to do. Raises BadInput for all that can be known before a run is trained."""
        from kdcli import plan, work

        places = self.places(self.load().threads)
        part = work.prepare(self.command, self.experiment, self.overrides, places, self.teacher, baseline, self.dry_run)
        if self.command in ("distill", "omit-classes"):
            plan.require_teachers(part.jobs, part.planned, places, self.retype(), self.display.note)
        return part

    def finished(self) -> "Work":
        """The work of reporting an experiment, or a single run. Raises BadInput where a run is missing."""
        name, path = self.experiment, Path(self.experiment)
        if {path.name, path.parent.name}.isdisjoint({*TEACHERS, *STUDENTS}):
            work = self.prepare()
            if missing := work.unfinished():
                train = f"train them: kd run {self.retype(whole=True)}"
                raise BadInput(f"{len(missing)} runs are not finished, the first is {missing[0]}; {train}")
            return work
        if self.overrides or self.dry_run:
            raise BadInput(
                f"{name}: is a run, not an experiment: --set, --seed, --threads and --dry-run change nothing"
            )
        from kdcli.work import prepare_run

        return prepare_run(name, self.places(), self.display.note)

    def places(self, threads: int | None = None) -> Places:
        from kdcli.device import select_device

        return Places(self.runs_dir, self.data_dir, str(select_device(self.device)), threads or os.cpu_count() or 1)

    def obtain(self, work: "Work") -> None:
        """Train the jobs that are not finished."""
        from kdcli.engine import obtain

        of_workers = work.places._replace(threads=self.load().threads or 1)
        at_once = self.jobs or os.cpu_count() or 1
        try:
            obtain(work.jobs, work.places, of_workers, at_once, self.display.epoch, self.display.note)
        finally:
            self.display.close()

    def run(self, kind: Kind, baseline: bool = True) -> None:
        """Do the command's part of the plan and print what comes out, a document a run of a kind."""
        from kdcli.results import documents

        work = self.prepare(baseline)
        if self.dry_run:
            return self.describe(work)
        self.obtain(work)
        found = documents(work.jobs, work.dataset, work.places)
        shown = [d for d in found if d.kind == kind]
        whole = Several(command=self.command, experiment=shown[0].experiment, runs=shown)
        tables = show.tables(self.command, found, work.dataset.facts.classes)
        self.present(shown[0] if len(shown) == 1 else whole, *tables)
        self.display.note(f"next: {self.next(shown)}".rstrip())

    def distil(self, kind: Kind, baseline: bool = True) -> None:
        """Train students; --epochs is for every one of them, whichever section trains it."""
        for flag, value in (("T", self.T), ("lambda1", self.lambda1), ("lambda2", self.lambda2)):
            self.override(f"--{flag}", value, f"distill.{flag}")
        if self.epochs is not None:
            experiment = self.load()
            own = ["baseline"] if experiment.baseline.train else []
            own += [f"omit_classes.{i}" for i, entry in enumerate(experiment.omit_classes) if entry.train]
            self.override("--epochs", self.epochs, *(f"{section}.train.epochs" for section in ("student", *own)))
        self.run(kind, baseline)

    def report(self, work: "Work") -> "tuple[Summary, Path]":
        """Show the table and write the report of finished runs; returns the summary and the page."""
        from kdcli.page import write_report

        summary = work.summary()
        self.present(summary, show.final_table(summary), *show.remarks(summary))
        files = write_report(summary, work.dataset, work.places, work.folder)
        self.display.note(f"wrote {work.folder}: {', '.join(file.name for file in files)}")
        student = next((job.spec.name for job in work.jobs if job.row.kind == "student"), "")
        ship = f", or ship a student: {shlex.join(['kd', 'export', student, *self.where()])}" if student else ""
        self.display.note(f"next: open {files[0]}{ship}")
        return summary, files[0]

    def describe(self, work: "Work") -> None:
        """Show the resolved experiment, the device, and what would be trained; write nothing."""
        import yaml

        from kdcli.plan import describe

        resolved = self.load().model_dump(exclude_none=True)
        places, runs = work.places, describe(work.jobs, work.dataset, work.places.runs_dir)
        document = Several(command=self.command, dry_run=True, device=places.device, runs=runs, resolved=resolved)
        text = yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=80)
        text += f"# device: {places.device}, threads: {places.threads}"
        self.present(document, text, show.planned(runs), "# --dry-run: nothing was written")

    def present(self, document: Section, *parts: show.Table | str) -> None:
        """The document as JSON, or tables and lines for a person, on stdout."""
        if self.as_json:
            return print(document.model_dump_json(indent=1, exclude_none=True, by_alias=True))
        console = Console()
        for part in parts:
            console.print(part, highlight=False, markup=False, soft_wrap=True)

    def retype(self, whole: bool = False) -> str:
        """The arguments that describe the experiment; unless `whole`, those for the same teachers alone."""
        kept = [o for o in self.overrides if whole or o.key.split(".")[0] in ("name", "data", "teacher", "ensemble")]
        words = [self.experiment, *(word for o in kept for word in o.origin.split(" ", 1))]
        words += ["--data-dir", str(self.data_dir)] if self.data_dir is not None else []
        return shlex.join([*words, *self.where()])

    def where(self) -> list[str]:
        """The words that name the runs folder, unless it is the usual one."""
        return ["--runs-dir", str(self.runs_dir)] if self.runs_dir != Path("runs") else []

    def next(self, documents: "Sequence[Document]") -> str:
        """What to type after a command."""
        seeds = shlex.join(["--seeds", self.seed] if self.seed is not None else [])
        if self.command in TEACHERS:
            of_ensemble = " --set distill.teacher=ensemble" if self.command == "ensemble" else ""
            return f"kd distill {self.retype()}{of_ensemble} {seeds}"
        name = documents[0].experiment
        several = self.command == "distill" and len(documents) > 1 and documents[0].baseline
        words = ["compare", f"{name}/baseline", f"{name}/distill"] if several else ["report", documents[0].run]
        return shlex.join(["kd", *words, *self.where()])


class Several(Section):
    """The document of a command about several runs."""

    command: str
    experiment: str | None = None
    classes: list[str] | None = None
    dry_run: bool | None = None
    device: str | None = None
    runs: list[Any]
    resolved: dict[str, Any] | None = None


def command(
    name: str, shared: Sequence[str] = TRAINING, register: Callable[[Callable[..., None]], object] | None = None
) -> Callable[[Callable[..., None]], None]:
    """Register a function of a Call and options of its own as a command that has these of a Call's options as well."""

    def decorate(body: Callable[..., None]) -> None:
        known, own = inspect.signature(Call).parameters, list(inspect.signature(body).parameters.values())[1:]

        def call(**options: Any) -> None:
            of_call = {option: options.pop(option) for option in shared}
            body(Call(name, **of_call), **options)

        both = sorted([*own, *(known[option] for option in shared)], key=lambda p: p.name != "experiment")
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in both]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__doc__ = body.__doc__
        (register or app.command(name))(call)

    return decorate


@command("train-teacher", ("epochs", *TRAINING))
def train_teacher(call: Call) -> None:
    """Train the teacher from hard labels."""
    call.override("--epochs", call.epochs, "teacher.train.epochs")
    call.run("teacher")


@command("ensemble", ("epochs", *TRAINING))
def ensemble(
    call: Call,
    members: Annotated[int | None, Option(help="Number of members (ensemble.members).")] = None,
    average: Annotated[str | None, Option(help="arithmetic or geometric (ensemble.average).")] = None,
) -> None:
    """Train several teachers and average their predictions."""
    call.override("--members", members, "ensemble.members")
    call.override("--average", average, "ensemble.average")
    call.override("--epochs", call.epochs, "teacher.train.epochs")
    if call.load().ensemble is None:
        raise BadInput("ensemble: the experiment has no such section: add `ensemble: {members: 5}` or --members 5")
    call.run("ensemble")


@command("distill", DISTILLING)
def distill(call: Call, baseline: Annotated[bool, Option(help="Compare with hard labels alone.")] = True) -> None:
    """Train the student on the teacher's soft targets, beside the same student on hard labels alone."""
    call.distil("student", baseline)


@command("omit-classes", DISTILLING)
def omit_classes(
    call: Call,
    omit: Annotated[str | None, Option(metavar="CLASSES", help="Classes to leave out: 3, or 3,5.")] = None,
    keep: Annotated[str | None, Option(metavar="CLASSES", help="Classes to keep, alone: 7,8.")] = None,
) -> None:
    """Distil with classes missing from the transfer set, then correct the bias."""
    entries = call.load().omit_classes
    if omit is not None or keep is not None:
        wanted = yamlfile.omission(omit, keep)
        entries = [entry for entry in entries if entry.label == wanted.label] or [wanted]
        flags = " ".join(f"--{flag} {text}" for flag, text in (("omit", omit), ("keep", keep)) if text is not None)
        given = [entry.model_dump(exclude_unset=True) for entry in entries]
        call.overrides.append(Override("omit_classes", given, flags))
    if not entries:
        raise BadInput(f"{call.experiment}: omit_classes: names no classes: use --omit 3 or --keep 7,8")
    call.distil("omission")


@command("evaluate")
def evaluate(
    call: Call, run: Annotated[list[str] | None, RunOption(help="A run to evaluate; repeat it.")] = None
) -> None:
    """Score what was trained: errors, calibration, agreement with the teacher, cost."""
    work = call.prepare()
    from kdcli.plan import evaluable
    from kdcli.results import documents

    seeds = work.subject.seeds if call.seed is not None else None
    jobs = evaluable(work.planned, work.places, run or [], seeds, call.display.note, call.retype())
    if call.dry_run:
        return call.describe(replace(work, jobs=jobs))
    found, classes = documents(jobs, work.dataset, work.places, costs=True), work.dataset.facts.classes
    document = Several(command="evaluate", experiment=work.subject.experiment, classes=classes, runs=found)
    call.present(document, *show.evaluations(found, classes))
    call.display.note(f"next: kd report {call.retype()}")


@command("run")
def run(
    call: Call, check: Annotated[bool, Option("--check", help="Exit with 3 where an `expect` row is missed.")] = False
) -> None:
    """Do everything the file describes, and end with one table and a report."""
    if check and not call.load().expect:
        raise BadInput(f"--check: {call.experiment} has no expect section to check")
    work = call.prepare()
    if call.dry_run:
        return call.describe(work)
    call.obtain(work)
    summary, _ = call.report(work)
    missed = show.missed(summary)
    for line in missed:
        call.display.note(line)
    if check and missed:
        raise typer.Exit(3)


@command("report")
def report(
    call: Call,
    more: Annotated[
        list[str] | None, NameArgument(metavar="EXPERIMENT|RUN...", help="Runs, or more experiments.")
    ] = None,
    open_: Annotated[bool, Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the report of an experiment whose runs are all finished, or of a run: report.html, Markdown, JSON and
    pictures."""
    names = [call.experiment, *(more or [])]
    if len(set(names)) < len(names):
        raise BadInput(f"kd report {shlex.join(names)}: names something twice")
    if len(names) > 1 and call.as_json:
        raise BadInput("--json: is one document: name one experiment or run")
    calls = [replace(call, experiment=name) for name in names]
    works = [one.finished() for one in calls]  # all of them, before any is written
    for one, work in zip(calls, works, strict=True):
        if one.dry_run:
            one.describe(work)
            continue
        _, page = one.report(work)
        if open_:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


@command("compare", READING)
def compare_runs(
    call: Call,
    names: Annotated[
        list[str], Argument(metavar="RUN|GROUP...", help="A run, or digits/distill: all seeds.", autocompletion=_groups)
    ],
    as_markdown: Annotated[bool, Option("--md", help="Print Markdown on stdout.")] = False,
    match: Annotated[
        str, Option(metavar="TEXT", help="Of the others only those with this in their name or settings: T=4.")
    ] = "",
    sort: Annotated[Literal["given", "errors"], Option(help="Order of the others.")] = "given",
) -> None:
    """Compare runs, or groups of runs that differ in seed alone: settings, errors, and a verdict against the first."""
    if call.as_json and as_markdown:
        raise BadInput("--json --md: choose one of them")
    from kdcli.compare import compare

    document = compare(call.runs_dir, names, call.data_dir, call.display.note, match, by_errors=sort == "errors")
    parts = show.compare_tables(document)
    if as_markdown:
        return print("\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts))
    call.present(document, *parts)


@command("export", READING)
def export_(
    call: Call,
    run: Annotated[str, RunArgument(metavar="RUN", help="A finished run: a student, a teacher, an ensemble.")],
    form: Annotated[Literal["onnx", "torch", "safetensors"], Option("--format", help="Of the file.")] = "onnx",
    out: Annotated[Path | None, Option(help="The file to write; left out: named after the run.")] = None,
) -> None:
    """Write a net for others to run, with its model card, after proving it on all test images."""
    found = Places(call.runs_dir).open(run)
    from kdcli.export import export

    d = export(found, form, out, call.data_dir)
    errors = f"{d.errors} errors on {d.total:,} images as in torch ({d.torch_errors})"
    proved = f"{errors}; probabilities differ by {d.max_difference:.1e} at most"
    hint = [f"try it: kd predict {shlex.quote(d.file)} IMAGE.png"] if form == "onnx" else []
    call.present(d, f"wrote {d.file}: {d.bytes:,} bytes, {proved}", f"wrote {d.card}", *hint)


@command("predict", READING)
def predict_(
    call: Call,
    net: Annotated[str, RunArgument(metavar="RUN|MODEL.onnx", help="A finished run, or what kd export wrote.")],
    images: Annotated[list[Path] | None, Argument(metavar="IMAGE...", help="PNG or JPEG files.")] = None,
    test_images: Annotated[list[int] | None, Option("--test-image", metavar="N", help="Repeat it.")] = None,
    temperatures: Annotated[str, Option("--T", help="Of the teacher's view: 4, or 1,4,20.")] = "1",
    top: Annotated[int, Option(min=1, help="Show so many classes.")] = 3,
    invert: Annotated[bool, Option("--invert", help="For dark ink on a light ground.")] = False,
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

    places, note = Places(call.runs_dir, call.data_dir), call.display.note
    document = predict(places, net, images or [], test_images or [], [float(T) for T in hot], invert, note)
    call.present(document, *show.predictions(document, top))
    for image in document.images:
        if image.mostly_ink:
            note(f"{image.image}: is read as lighter than its ground; try it with{'out' if invert else ''} --invert")


@command("runs", ("runs_dir", "as_json", "debug"), runs_app.callback())
def runs(
    call: Call,
    context: typer.Context,
    match: Annotated[str, Option(metavar="TEXT", help="Only runs with this in their name or status.")] = "",
    sort: Annotated[Literal["name", "errors", "age", "size"], Option(help="What to sort by.")] = "name",
) -> None:
    """List the runs: status, errors, age, size. `kd runs rm` removes some."""
    elsewhere = call.runs_dir != Path("runs")
    if context.invoked_subcommand is not None:
        if match or call.as_json or sort != "name" or elsewhere:
            raise BadInput("kd runs: the options of rm go behind it: kd runs rm --runs-dir DIR RUN…")
        return

    def rank(one: Listed) -> Any:
        return {"name": one.run, "errors": (one.errors is None, one.errors), "age": one.age_s, "size": -one.bytes_}[
            sort
        ]

    listed = [one for one in survey(call.runs_dir) if match.lower() in f"{one.run} {one.status}".lower()]
    if elsewhere and not call.runs_dir.is_dir():
        raise BadInput(f"--runs-dir {call.runs_dir}: there is no such folder")
    listed.sort(key=rank)
    call.present(Several(command="runs", runs=listed), show.runs_table(listed))


@command("runs rm", ("runs_dir", "debug"), runs_app.command("rm"))
def runs_rm(
    call: Call,
    names: Annotated[list[str], RunArgument(metavar="RUN...", help="Runs, by name or by path.")],
    force: Annotated[bool, Option("--force", help="Even if other runs were made from them.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove runs, unless others were made from them."""
    folders = list(dict.fromkeys(find_folder(call.runs_dir, name) for name in names))
    listed, note = survey(call.runs_dir), call.display.note
    chosen = ["/".join(folder.parts[-3:]) for folder in folders]
    orphans = dependents(listed, chosen)
    if orphans and not force:
        raise BadInput("these runs were made from them; remove them too, or add --force:", *(f"  {o}" for o in orphans))
    taken = show.size(sum(one.bytes_ for one in listed if one.run in chosen))
    lines = [*(f"orphaned: {run}" for run in orphans), *(f"remove: {run}" for run in chosen)]
    note("\n".join([*lines, f"{show.number_of_runs(len(chosen))}, {taken}"]))
    if not yes and not sys.stdin.isatty():
        raise BadInput("kd runs rm: asks before it removes, and nobody is there to answer: add --yes")
    if not yes:
        print("Remove them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return note("nothing was removed")
    remove(sorted(folders, key=lambda folder: folder.parent.name in TEACHERS))
    note(f"removed {show.number_of_runs(len(chosen))}")


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, _interrupt)
    try:
        code = app(standalone_mode=False) or 0  # typer makes 130 of Ctrl-C
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, BadInput):
            print(*error.lines, sep="\n", file=sys.stderr)
            return 2
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
