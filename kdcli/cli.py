"""The `kd` command: each subcommand, its own options, and how the program ends."""

import inspect
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic_core import to_json
from rich.filesize import decimal
from typer import Argument, Option

from kdcli import BadInput, Failed, __version__, counted, failure, usage, yamlfile
from kdcli.call import (
    DESCRIBED,
    DISTILLING,
    ENSEMBLE,
    OMITTING,
    READING,
    TRAINING,
    WORKING,
    Call,
    NameArgument,
    RunOption,
)
from kdcli.config import LOSSES, STANDARDIZE, Experiment
from kdcli.report import show
from kdcli.runs import mirror
from kdcli.runs.directory import Places, find_folder
from kdcli.runs.spec import TEACHERS
from kdcli.runs.survey import Listed, dependents, remove, survey
from kdcli.yamlfile import Override

app = typer.Typer(name="kd", add_completion=True, pretty_exceptions_enable=False)


def command(
    name: str, shared: Sequence[str] = DESCRIBED, text: str | None = None
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
        app.command(name, help=text or body.__doc__)(call)

    return decorate


command("train-teacher", TRAINING, "Train the teacher from hard labels.")(Call.train)
command("ensemble", ENSEMBLE, "Train several teachers and average their predictions.")(Call.train)
command("distill", DISTILLING, "Train the student on soft targets, and the same net on hard labels.")(Call.train)


@command("omit-classes", OMITTING)
def omit_classes(
    call: Call,
    omit: Annotated[str | None, Option(metavar="CLASSES", help="Classes to leave out: 3, 3,5 or 0-4.")] = None,
    keep: Annotated[str | None, Option(metavar="CLASSES", help="The only classes to keep: 7,8 or 7-9.")] = None,
) -> None:
    """Distil with classes missing from the transfer set, then correct the bias: a number added to their logits."""
    typed = {flag: text for flag, text in (("omit", omit), ("keep", keep)) if text is not None}
    if typed:
        flags, known = " ".join(f"--{flag} {text}" for flag, text in typed.items()), list[str]()
        if any("-" in text for text in typed.values()):
            from kdcli.data.dataset import open_dataset

            loaded = yamlfile.load(call.experiment, call.overrides)
            with loaded.located():
                known = open_dataset(loaded.experiment.data, call.data_dir, not call.dry_run).facts.classes
        named = {flag: yamlfile.parse_classes(text, known) for flag, text in typed.items()}
        e = call.load()
        rows = {row.name for row in e.rows if row.kind != "omission"}  # the others may be of other entries
        expect = Override("expect", {row: most for row, most in e.expect.items() if row in rows}, flags)
        call.overrides += [expect, Override("paper", {}, flags), Override("omit_classes", [named], flags)]
        (wanted,) = call.load().omit_classes
        same = [entry.model_dump(exclude_unset=True) for entry in e.omit_classes if entry.label == wanted.label]
        call.overrides[-1] = Override("omit_classes", same or [named], flags)
    call.train()


@command("evaluate")
def evaluate(
    call: Call,
    run: Annotated[list[str] | None, RunOption(help="A run to evaluate; may be repeated.")] = None,
    every: Annotated[bool, Option("--all", help="Show every run, not the means over seeds.")] = False,
) -> None:
    """Evaluate the finished runs: errors, calibration, agreement with the teacher, cost."""
    work = call.prepare()
    import torch

    from kdcli.evidence.compare import in_rows
    from kdcli.evidence.results import documents
    from kdcli.plan import evaluable, unfinished

    seeds = work.subject.seeds if any(override.key == "seed" for override in call.overrides) else None
    jobs = evaluable(work.planned, work.places, run or [], seeds, call.retype(whole=True), call.display.note)
    order = [row.name for row in work.subject.rows]
    jobs = in_rows(jobs, work.planned, call.runs_dir)
    jobs.sort(key=lambda job: order.index(job.row.name) if job.row.name in order else len(order))
    if call.dry_run:
        return call.describe(replace(work, jobs=jobs))
    torch.set_num_threads(work.places.threads)
    found = documents(jobs, work.dataset, work.places, work.subject.expect, "timed")
    classes = work.dataset.facts.classes
    whole = {"command": "evaluate", "experiment": work.subject.experiment, "classes": classes, "runs": found}
    call.present(whole, *show.evaluations(found, classes, every))
    with suppress(BadInput):  # a damaged run is told of already
        if not unfinished(work.jobs, work.places):
            call.display.note(f"next: kd report {call.retype(whole=True)}")


@command("run", (*DESCRIBED, *WORKING))
def run(
    call: Call, check: Annotated[bool, Option("--check", help="Exit with 3 if an `expect` row is missed.")] = False
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
    call.display.note(*missed)
    if check and missed:
        raise typer.Exit(3)


@command("report", ("experiment", "sets", "seed", "threads", "device", *READING))
def report(
    call: Call,
    more: Annotated[
        list[str] | None, NameArgument(metavar="EXPERIMENT|RUN...", help="Further experiments or runs.")
    ] = None,
    figures: Annotated[
        Literal["pdf", "svg"] | None, Option(help="Also draw the pictures for a paper, one column wide.")
    ] = None,
    open_: Annotated[bool, Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write the report of an experiment whose runs are all finished, or of a single run: report.html, Markdown, JSON
    and pictures."""
    names = [call.experiment, *(more or [])]
    if len(set(names)) < len(names):
        raise BadInput(f"kd report {shlex.join(names)}: names something twice")
    if len(names) > 1 and call.as_json:
        raise BadInput("--json: is one document: name one experiment or run")
    calls = [replace(call, experiment=name) for name in names]
    works = [one.finished() for one in calls]  # all of them, before any is written
    for one, work in zip(calls, works, strict=True):
        _, page = one.report(work, figures or "")
        if open_:
            import webbrowser

            if not webbrowser.open(page.resolve().as_uri()):
                call.display.note(f"--open: no browser was found: open {shlex.quote(str(page))}")


@command("compare", READING)
def compare_runs(
    call: Call,
    names: Annotated[list[str], NameArgument(metavar="RUN|GROUP...", help="A run, or all seeds of digits/distill.")],
    as_markdown: Annotated[bool, Option("--md", help="Print Markdown on stdout.")] = False,
    match: Annotated[str, Option(metavar="TEXT", help="Compare only runs whose name or settings contain TEXT.")] = "",
    sort: Annotated[Literal["given", "errors"], Option(help="Order of the groups after the first.")] = "given",
) -> None:
    """Compare runs, or groups that differ only in the seed: settings, errors, and a verdict against the first."""
    if call.as_json and as_markdown:
        raise BadInput("--json --md: use one or the other")
    from kdcli.evidence.compare import compare

    document = compare(call.runs_dir, names, call.data_dir, call.display.note, match, by_errors=sort == "errors")
    parts = show.compare_tables(document)
    if as_markdown:
        return print("\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts))
    call.present(document, *parts)


@command("export", READING)
def export_(
    call: Call,
    run: Annotated[str, NameArgument(metavar="RUN", help="A finished run: a student, a teacher, an ensemble.")],
    form: Annotated[
        Literal["onnx", "torch", "safetensors", "logits"], Option("--format", help="File format.")
    ] = "onnx",
    out: Annotated[Path | None, Option(help="The file to write; default: named after the run.")] = None,
    top_k: Annotated[int | None, Option(min=1, help="Logits only: just the K likeliest classes of each image.")] = None,
    half: Annotated[bool, Option("--half", help="Logits only: in float16.")] = False,
    int8: Annotated[bool, Option("--int8", help="ONNX only: quantise to 8 bits.")] = False,
) -> None:
    """Write a net for others to run, or its logits for others to learn from, with a model card; verified on all test
    images."""
    found = Places(call.runs_dir).open(run)
    import yaml

    from kdcli.use.export import export

    d = export(found, form, out, call.data_dir, top_k, half, int8)
    beside = f" as in torch ({d.errors})" if d.errors == d.torch_errors else f", where torch makes {d.torch_errors}"
    errors = f"{d.errors} errors on {d.total:,} images{beside}"
    proved = f"{errors}; probabilities differ by {d.max_difference:.1e} at most"
    of_images = form == "onnx" and not found.spec.dataset.table
    hint = [f"try it: kd predict {shlex.quote(d.file)} IMAGE.png"] if of_images else []
    if q := d.int8:
        proved += f"; {q.ms:g} ms an image, float32 {q.float32_ms:g} ms and {q.float32_bytes:,} bytes"
    whole = {"logits": os.path.abspath(d.file)}  # the experiment file may lie elsewhere
    learn = yaml.safe_dump(whole, default_flow_style=True, width=math.inf, allow_unicode=True)
    hint += [f"learn from it: teacher: {learn.strip()}"] if form == "logits" else []
    call.present(d, f"wrote {d.file}: {d.bytes:,} bytes, {proved}", f"wrote {d.card}", *hint)


@command("predict", READING)
def predict_(
    call: Call,
    net: Annotated[str, NameArgument(metavar="RUN|MODEL.onnx", help="A finished run, or a file that kd export wrote.")],
    images: Annotated[
        list[Path] | None, Argument(metavar="IMAGE...", help="Image files: PNG, JPEG, WebP, BMP, TIFF or GIF.")
    ] = None,
    test_images: Annotated[
        list[int] | None, Option("--test-image", metavar="N", help="Index of a test image; may be repeated.")
    ] = None,
    temperatures: Annotated[str, Option("--T", help="Temperatures of the teacher's predictions: 4, or 1,4,20.")] = "1",
    top: Annotated[int, Option(min=1, help="Number of classes to show.")] = 3,
    invert: Annotated[bool, Option("--invert", help="For dark ink on a light background.")] = False,
) -> None:
    """Classify images; for a student, also show its teacher's predictions."""
    if not images and not test_images:
        raise BadInput("kd predict: name image files, or --test-image N")
    if invert and not images:
        raise BadInput("--invert: is for image files, and none is named; test images are light on dark as they are")
    hot = [yamlfile.parse_set(f"distill.T={part}").value for part in temperatures.split(",")]
    if not all(isinstance(T, int | float) and not isinstance(T, bool) and 1e-3 <= T <= 1e4 for T in hot):
        raise BadInput(f"--T {temperatures}: must be numbers from 0.001 to 10000 with commas between, such as 1,4,20")
    from kdcli.use.predict import predict

    places, note = Places(call.runs_dir, call.data_dir), call.display.note
    document = predict(places, net, images or [], test_images or [], [float(T) for T in hot], invert, note)
    call.present(document, *show.predictions(document, top))
    for image in document.images:
        if image.mostly_ink:
            note(f"{image.image}: is read as lighter than its ground; try it with{'out' if invert else ''} --invert")


@command("runs", ("runs_at", "as_json", "debug"))
def runs(
    call: Call,
    rm: Annotated[Literal["rm"] | None, Argument(help="Remove runs unless others were made from them.")] = None,
    names: Annotated[list[str] | None, NameArgument(metavar="RUN...", help="Runs to remove, by name or path.")] = None,
    match: Annotated[str, Option(metavar="TEXT", help="List only runs whose name or status contains TEXT.")] = "",
    sort: Annotated[Literal["name", "errors", "age", "size"], Option(help="Order of the list.")] = "name",
    force: Annotated[bool, Option("--force", help="Remove even if other runs were made from them.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Remove without asking.")] = False,
) -> None:
    """List the runs: status, errors, age, size. `kd runs rm RUN…` removes some."""
    if (match or call.as_json or sort != "name") if rm else (force or yes):
        raise BadInput("kd runs: --match, --sort and --json are of the list, --force and --yes of rm")
    if rm:
        return remove_runs(call, names or [], force, yes)

    def rank(one: Listed) -> Any:
        errors = (one.errors is None, one.errors)
        return {"name": one.run, "errors": errors, "age": one.age_s, "size": -one.bytes}[sort]

    listed = [one for one in survey(call.runs_dir) if match.lower() in f"{one.run} {one.status}".lower()]
    if call.runs_at != "runs" and not call.runs_dir.is_dir():
        raise BadInput(f"--runs-dir {call.runs_dir}: there is no such folder")
    listed.sort(key=rank)
    call.present({"command": "runs", "runs": listed}, show.runs_table(listed) if listed else "0 runs")


def remove_runs(call: Call, names: Sequence[str], force: bool, yes: bool) -> None:
    """Remove runs, unless others were made from them. Raises BadInput."""
    if not names:
        raise BadInput("kd runs rm: name the runs to remove")
    folders = list(dict.fromkeys(find_folder(call.runs_dir, name) for name in names))
    listed, note = survey(call.runs_dir), call.display.note
    chosen = ["/".join(folder.parts[-3:]) for folder in folders]
    orphans = dependents(listed, chosen)
    if orphans and not force:
        raise BadInput("these runs were made from them; remove them too, or add --force:", *(f"  {o}" for o in orphans))
    taken = decimal(sum(one.bytes for one in listed if one.run in chosen))
    lines = [*(f"orphaned: {run}" for run in orphans), *(f"remove: {run}" for run in chosen)]
    note("\n".join([*lines, f"{counted(len(chosen), 'run')}, {taken}"]))
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise BadInput("kd runs rm: asks before it removes, and nobody is there to answer: add --yes")
    if not yes and not typer.confirm("Remove them?", err=True):
        return note("nothing was removed")
    remove(sorted(folders, key=lambda folder: folder.parent.name in TEACHERS))
    for name in chosen if call.remote else ():
        mirror.remove(call.remote, name)
    note(f"removed {counted(len(chosen), 'run')}")


@command("init", ("device", "debug"))
def init(
    call: Call,
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Images: train/CLASS/… and test/CLASS/…, or CLASS/….")],
    teacher: Annotated[str, Option(help="The large net, by its model.name.")] = "resnet20",
    student: Annotated[str, Option(help="The small net.")] = "resnet8",
) -> None:
    """Print an experiment file for a folder of images: kd init photos > photos.yaml."""
    from kdcli.init import experiment_file

    if not os.path.isdir(folder):  # false too of an unusable name
        raise BadInput(f"{folder}: {'is a file, not a' if os.path.exists(folder) else 'there is no such'} folder")
    text = experiment_file(folder, teacher, student, call.places())
    for line in text.partition("\nname:")[0].splitlines() if not sys.stdout.isatty() else ():
        call.display.note(line.removeprefix("# "))
    print(text, end="")


@command("cache", ("sets", "on", "data_dir", "as_json", "dry_run", "debug"))
def cache(
    call: Call,
    of: Annotated[str, NameArgument(metavar="FOLDER|EXPERIMENT", help="Of images; or whose data section names one.")],
    size: Annotated[int | None, Option(help="Pixels of the shorter side (data.size).")] = None,
    channels: Annotated[int | None, Option(help="1 or 3 (data.channels).")] = None,
    test: Annotated[float | None, Option(help="Share of a folder without test images (data.test).")] = None,
) -> None:
    """Decode image files ahead, as the first start of an experiment does: kd cache photos --size 64."""
    if idle := [one.origin for one in call.overrides if one.key.split(".")[0] != "data"]:
        raise BadInput(f"{idle[0]}: changes nothing that kd cache does")
    if is_folder := os.path.isdir(of):  # no file has a folder that paths begin in
        beside = [one for one in call.overrides if one.key == "data.unlabelled" and isinstance(one.value, str)]
        call.overrides += [one._replace(value=os.path.abspath(one.value)) for one in beside]
        call.overrides.insert(0, Override("data", {"folder": os.path.abspath(of)}, of))
    for flag, value in (("size", size), ("channels", channels), ("test", test)):
        call.override(f"--{flag}", value, f"data.{flag}")
    loaded = yamlfile.load("digits" if is_folder else of, call.overrides)
    data, started = loaded.experiment.data, time.monotonic()
    if not (data.folder or data.unlabelled):
        raise BadInput(f"{of}: its images are no files in a folder, which alone are decoded ahead")
    from kdcli.data.cache import free, on_ray
    from kdcli.data.dataset import open_dataset
    from kdcli.data.sources import ahead

    document: dict[str, Any] = {"command": "cache", "dry_run": call.dry_run}
    with loaded.located():
        if call.dry_run:
            document["images"], document["bytes"] = images, taken = ahead(data, call.data_dir)
            return call.present(document, f"{counted(images, 'image')}, {decimal(taken)} decoded, {free()}")
        with on_ray(call.address) if call.address else nullcontext():
            dataset = open_dataset(data, call.data_dir)
    call.display.note(*dataset.notes)
    document["folders"] = folders = [listing.parent for listing in dataset.listings if listing]
    document["bytes"] = taken = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    document["seconds"] = round(time.monotonic() - started, 1)
    where = " and ".join(map(str, folders))
    call.present(document, f"{decimal(taken)} in {where}, ready after {show.duration(time.monotonic() - started)}")


@command("losses", ("as_json", "debug"))
def losses(call: Call) -> None:
    """List the losses (distill.loss): formula, source, and their authors' settings."""
    listed = (*LOSSES.items(), ("standardize", STANDARDIZE))
    document = {"command": "losses", "losses": [{"loss": name, **loss._asdict()} for name, loss in listed]}
    call.present(document, *show.losses())


@command("schema", ("debug",))
def schema(call: Call) -> None:
    """Print the JSON schema of experiment files, for editors to complete and check them."""
    print(to_json(Experiment.model_json_schema(), indent=1).decode())


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: Annotated[bool, Option("--version", help="Print the version.")] = False
) -> None:
    """Knowledge distillation experiments from one YAML file."""
    if version:
        print(f"kd {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _interrupt(*_: object) -> None:
    """The first Ctrl-C ends the command in order; a second one ends it at once, which loses nothing either."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


class Terminated(BaseException):
    """By SIGTERM: unlike SystemExit it is nothing that somebody's own code would raise."""


def _terminate(*_: object) -> None:
    raise Terminated


def main() -> int:
    """Run `kd`: 0 done, 1 failed, 2 wrong usage or input, 3 an expectation missed, 130 or 143 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        code = app(standalone_mode=False) or 0  # typer makes 130 of Ctrl-C
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Terminated:
        code = 143
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, BadInput):
            print(*error.lines, sep="\n", file=sys.stderr)
            return 2
        if hasattr(error, "format_message"):  # a usage error of typer's
            print(usage.told(error, not {*TEACHERS}.isdisjoint(sys.argv)), file=sys.stderr)
            return 2
        for line in error.lines if isinstance(error, Failed) else [failure(error)]:
            print(f"kd: failed: {line}", file=sys.stderr)
        return 1
    if code in (130, 143):
        again = shlex.join(["kd", *sys.argv[1:]])
        print(f"interrupted: to continue from what was saved last, type again: {again}", file=sys.stderr)
    return code
