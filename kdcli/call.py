"""One call of a command: its shared options become overrides of the experiment file, a part of its plan is done, the
result is shown."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic_core import to_json
from rich.console import Console
from typer import Argument, Option

from kdcli import BadInput, yamlfile
from kdcli.config import Experiment, Row, Section
from kdcli.machine.cluster import Cluster, address
from kdcli.report import show
from kdcli.runs import mirror
from kdcli.runs.directory import Places
from kdcli.runs.spec import COMMANDS, TEACHERS, Spec
from kdcli.runs.survey import survey
from kdcli.yamlfile import Override

if TYPE_CHECKING:  # they need torch, which help and wrong usage do without
    from kdcli.evidence.results import Summary
    from kdcli.plan import Job
    from kdcli.work import Work


def _names(incomplete: str) -> list[str]:
    """For the shell's completion: experiments, else groups of runs in ./runs and, once one is typed whole, its runs."""
    if found := [name for name in yamlfile.experiments() if name.startswith(incomplete)]:
        return found
    runs = [one.run for one in survey(Path("runs")) if one.run.startswith(incomplete)]
    groups = list(dict.fromkeys(run.rpartition("/")[0] for run in runs))
    return runs if len(groups) < 2 else groups


NameArgument = partial(Argument, autocompletion=_names)
RunOption = partial(Option, metavar="RUN", autocompletion=_names)

# Which of the options of a Call a command has, in the order of its help.
READING = ("data_dir", "runs_at", "as_json", "debug")
WORKING = ("on", "quiet", "verbose")
DESCRIBED = ("experiment", "sets", "seed", "threads", "jobs", "device", "dry_run", *READING)
TRAINING = ("epochs", *DESCRIBED, *WORKING)
ENSEMBLE = ("members", "average", *TRAINING)
OMITTING = ("T", "lambda1", "lambda2", "teacher", "with_teacher", *TRAINING)
DISTILLING = (*OMITTING, "baseline")
# Those that set a key of the experiment file.
KEYS = {"T": "distill.T", "lambda1": "distill.lambda1", "lambda2": "distill.lambda2"}
KEYS |= {"members": "ensemble.members", "average": "ensemble.average", "threads": "threads"}


@dataclass
class Call:
    """One call of a command: the options that commands share, the overrides they make, how its results are shown."""

    command: str
    experiment: Annotated[str, NameArgument(help="An experiment's name (mnist, digits) or its YAML file.")] = "mnist"
    T: Annotated[float | None, Option("--T", help="Temperature of the soft targets (distill.T).")] = None
    lambda1: Annotated[float | None, Option(help="Weight of the soft targets (distill.lambda1).")] = None
    lambda2: Annotated[float | None, Option(help="Weight of the hard labels; default: 1 - lambda1.")] = None
    teacher: Annotated[str | None, RunOption(help="Learn from this run instead.")] = None
    with_teacher: Annotated[bool, Option("--with-teacher", help="Train missing teachers first.")] = False
    baseline: Annotated[bool, Option(help="Train the baseline too: the same net on hard labels alone.")] = True
    members: Annotated[int | None, Option(help="Number of members (ensemble.members).")] = None
    average: Annotated[str | None, Option(help="arithmetic or geometric (ensemble.average).")] = None
    epochs: Annotated[int | None, Option(help="Epochs of what this command trains itself.")] = None
    sets: Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Set any key: distill.T=5.")] = None
    seed: Annotated[str | None, Option("--seed", "--seeds", help="One seed, or several: 0-4, or 0,2,5.")] = None
    threads: Annotated[int | None, Option(help="CPU threads; default: all cores for a single run, else one.")] = None
    jobs: Annotated[int | None, Option(min=1, help="Runs at once, one thread each; default: one per core.")] = None
    on: Annotated[str | None, Option(metavar="ray|ADDRESS", help="Work on Ray: $RAY_ADDRESS, or its own.")] = None
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    data_dir: Annotated[Path | None, Option(help="Where datasets are read or downloaded ($KD_DATA, or data).")] = None
    runs_at: Annotated[str, Option("--runs-dir", help="Where the run folders are, or s3://BUCKET/FOLDER.")] = "runs"
    as_json: Annotated[bool, Option("--json", help="Print one JSON document on stdout.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be done; write nothing.")] = False
    debug: Annotated[bool, Option("--debug", help="Show tracebacks.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show no progress.")] = False
    verbose: Annotated[bool, Option("--verbose", "-v", help="Print a line per epoch.")] = False

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise BadInput("-q -v: use one or the other")
        self.display = show.Display(self.quiet, self.verbose)
        self.runs_dir = mirror.folder(self.runs_at)
        self.remote = self.runs_at if mirror.elsewhere(self.runs_at) else ""
        if self.remote:
            mirror.pull(self.remote)
        self.address = address(self.on) if self.on is not None else ""
        self.overrides = [yamlfile.parse_set(text) for text in self.sets or []]
        for option, key in KEYS.items():
            self.override(f"--{option}", getattr(self, option), key)
        if self.seed is not None:
            self.overrides.append(Override("seed", yamlfile.parse_seeds(self.seed), f"--seeds {self.seed}"))

    def override(self, flag: str, value: Any, *keys: str) -> None:
        """Let a flag, if it was given, set keys of the experiment file."""
        if value is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            self.overrides += [Override(key, value, f"{flag} {shown}") for key in keys]

    def load(self) -> Experiment:
        """The experiment as overridden."""
        return yamlfile.load(self.experiment, self.overrides).experiment

    def places(self) -> Places:
        from kdcli.machine.device import select_device

        return Places(self.runs_dir, self.data_dir, str(select_device(self.device)), remote=self.remote)

    def prepare(self) -> "Work":
        """What the command is to do. Raises BadInput for all that can be known before a run is trained."""
        if self.experiment in yamlfile.experiments() and (own := Path(f"{self.experiment}.yaml")).is_file():
            self.display.note(f"{self.experiment} is kd's own experiment; for the file here type {own}")
        self.load()  # what is wrong in the file is told before a second goes by with imports
        from kdcli.work import prepare

        places, named = self.places(), self.teacher
        work = prepare(self.command, self.experiment, self.overrides, places, named, self.baseline, self.dry_run)
        self.display.note(*work.dataset.notes)
        return work

    def missing(self, work: "Work") -> "list[Spec]":
        """What is still to be trained; what speaks against it is noted. Raises BadInput where it cannot be kept."""
        from kdcli.plan import cautions, unfinished

        runs = unfinished(work.jobs, work.places)
        for run in runs:
            run.check_writable()
        self.display.note(*cautions(work.jobs, work.planned, work.places))
        return [run.spec for run in runs]

    def obtain(self, work: "Work") -> None:
        """Train the jobs that are not finished; first of all read what was trained elsewhere, and say what speaks
        against it."""
        from kdcli.plan import doubts
        from kdcli.training.estimate import cheaper
        from kdcli.work import obtain

        if line := cheaper(self.missing(work), work.dataset):
            self.display.note(line)
        elsewhere = [job for job in work.jobs if job.spec.imported]
        others = [job for job in work.jobs if not job.spec.imported]
        experiment, note = self.load(), self.display.note
        engine = self.jobs, self.cluster(experiment, work.places.device)
        try:
            for jobs in filter(None, (elsewhere, others)):
                obtain(work, jobs, experiment.threads, engine, self.display.epoch, note)
                if others and jobs is elsewhere:
                    note(*doubts(jobs, work.subject.expect, work.places))
        finally:
            self.display.close()

    def cluster(self, experiment: Experiment, device: str) -> Cluster | None:
        """Where --on says, with what of it each job takes: a GPU where this machine uses one, unless the file says."""
        if not self.address:
            return None
        wanted, threads = experiment.resources, experiment.threads
        gpus = float(device != "cpu") if wanted.gpus is None or self.device == "cpu" else wanted.gpus
        return Cluster(self.address, wanted.cpus or threads or 1, gpus)

    def teachers(self, work: "Work") -> "tuple[Work, list[Job]]":
        """The work with the teachers that --with-teacher trains first, and the finished ones that it uses. Raises
        BadInput where one is missing or cannot be used."""
        from kdcli.plan import Job, made_from, refuse_missing, unanswered, unfinished, usable

        if self.teacher and self.with_teacher:
            raise BadInput("--teacher --with-teacher: use one or the other")
        needed, teachers = made_from(work.jobs, work.planned), {name for job in work.jobs for name in job.spec.parents}
        students = [job.spec for job in work.jobs if job.spec.distill]
        absent = {run.name for run in unfinished(needed, work.places)}
        missing = [job for job in needed if job.spec.name in absent]
        if (wanted := [job for job in missing if job.spec.name in teachers]) and not self.with_teacher:
            spent, *_ = self.cost(work, [job.spec for job in missing])
            retype, note = self.retype(), self.display.note
            refuse_missing(wanted, students, work.places, retype, show.duration(spent), note)
        for name in teachers - {job.spec.name for job in (*work.jobs, *wanted)}:
            usable(work.places.open(name), work.jobs[0].spec, "a teacher")
        finished = [job for job in needed if job.spec.name in teachers - absent]
        if self.teacher:
            named = work.places.open(self.teacher)
            for student in students:
                if lacks := unanswered(named, student):
                    raise BadInput(f"--teacher {named.name}: a file of logits, which has no answers for {lacks}")
            finished.append(Job(Row(named.spec.command, "teacher"), named.spec))
        return replace(work, jobs=[*(missing if wanted else []), *work.jobs]), finished

    def train(self) -> None:
        """Train the nets that the command is about and print what comes out. --epochs is for every one of them."""
        experiment = self.load()
        sections = ["teacher"] if self.command in TEACHERS else [*experiment.student_trains]
        if self.command == "ensemble" and (listed := [*experiment.teachers][1:]):
            sections = [section for section in listed if experiment.teachers[section].train]
            if self.epochs and not sections:
                raise BadInput(f"--epochs {self.epochs}: no member is trained")
        self.override("--epochs", self.epochs, *(f"{section}.train.epochs" for section in sections))
        work = self.prepare()
        from kdcli.evidence.results import documents
        from kdcli.plan import doubts

        if not work.jobs:
            key, flag = ("ensemble", "--members 5") if self.command == "ensemble" else ("omit_classes", "--omit 3")
            raise BadInput(f"{self.experiment}: {key}: there is none: add the section, or {flag}")
        work, finished = self.teachers(work)
        self.display.note(*doubts(finished, work.subject.expect, work.places))
        if self.dry_run:
            return self.describe(work)
        self.obtain(work)
        found = documents(work.jobs, work.dataset, work.places, work.subject.expect)
        mine = [d for d in found if d.command == self.command]
        if not mine:  # a file of logits, which may lack those of the test images
            silent = work.places.open(work.jobs[0].spec.name).result()
            said = f"{silent.run} has no answers for the test images: its errors there are not counted."
            return self.present(silent, said, *(f"{silent.run}: {line}" for line in silent.warnings))
        whole = {"command": self.command, "experiment": mine[0].experiment, "runs": mine}
        tables = show.tables(self.command, found, work.dataset.facts.classes)
        self.present(mine[0] if len(mine) == 1 else whole, *tables)
        self.display.note(f"next: kd {self._following(mine[0].run)}")

    def _following(self, run: str) -> str:
        """What to type after this command has trained a run."""
        if self.command not in TEACHERS:
            return shlex.join(["report", run, *self.where()])
        e, typed = self.load(), self.retype(whole=True)
        of_ensemble = e.distill.teacher == "ensemble"
        if self.command == "ensemble":
            return f"distill {typed}{'' if of_ensemble else ' --set distill.teacher=ensemble'}"
        return f"{'ensemble' if of_ensemble and len(e.teachers) == 1 else 'distill'} {typed}"

    def finished(self) -> "Work":
        """The work of reporting an experiment, or a single run. Raises BadInput where a run is missing."""
        from kdcli.plan import unfinished
        from kdcli.work import prepare_run

        name, path = self.experiment, Path(self.experiment)
        group, file = path.parent.name or path.name, path.suffix.lower() in (".yaml", ".yml")
        if path.name not in COMMANDS and (file or not any(c.startswith(group) for c in COMMANDS)):
            work = self.prepare()
            if missing := unfinished(work.jobs, work.places):
                first, n = missing[0].name, len(missing)
                which = f"{n} runs are not finished, the first is {first}; train them" if n > 1 else ""
                raise BadInput(f"{which or f'{first}: is not finished; train it'}: kd run {self.retype(whole=True)}")
            return work
        if self.overrides:
            raise BadInput(f"{name}: is a run, not an experiment: --set, --seed and --threads change nothing")
        return prepare_run(name, self.places())

    def report(self, work: "Work", figures: str = "") -> "tuple[Summary, Path]":
        """Show the table and write the report of finished runs; returns the summary and the page."""
        from kdcli.report.page import write_report

        summary = work.summary()
        remarks = [line for line in show.remarks(summary) if line not in self.display.noted]
        self.present(summary, show.final_table(summary), *remarks)
        files = write_report(summary, work.dataset, work.places, work.folder, figures)
        for folder in {file.parent for file in files} if self.remote else ():
            mirror.send(self.remote, folder)
        self.display.note(f"wrote {work.folder}: {', '.join(str(file.relative_to(work.folder)) for file in files)}")
        student = next((job.spec.name for job in work.jobs if job.row.kind == "student"), "")
        ship = f", or ship a student: {shlex.join(['kd', 'export', student, *self.where()])}" if student else ""
        self.display.note(f"next: open {shlex.quote(str(files[0]))}{ship}")
        return summary, files[0]

    def cost(self, work: "Work", specs: "Sequence[Spec]") -> tuple[float, int, int]:
        """The seconds that training some runs takes here, how many are trained at once, and the threads of each."""
        from kdcli.training.engine import share
        from kdcli.training.estimate import seconds

        places, at_once = share(specs, work.places, self.load().threads, self.jobs)
        taken = seconds(specs, [job.spec for job in work.planned], work.dataset, places)
        return sum(taken.values()) / at_once, at_once, places.threads

    def describe(self, work: "Work") -> None:
        """Show the resolved experiment, the device, and what would be trained; write nothing."""
        import yaml

        from kdcli.plan import describe
        from kdcli.work import finished

        finished(work.jobs, work.places)
        experiment, missing = self.load(), self.missing(work)
        resolved, device = experiment.model_dump(exclude_none=True), work.places.device
        runs = describe(work.jobs, work.dataset, work.places.runs_dir)
        spent, at_once, threads = self.cost(work, missing)
        text = yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=80)
        text += f"# device: {device}, threads: {threads}"
        document = {"command": self.command, "dry_run": True, "device": device, "runs": runs, "resolved": resolved}
        document["seconds"] = round(spent)
        time = f"# about {show.duration(spent)} on this machine, {at_once} at once" if missing else "# nothing to train"
        self.present(document, text, show.planned(runs), time, "# --dry-run: no run was written")

    def present(self, document: Section | dict[str, Any], *parts: show.Table | str) -> None:
        """The document as JSON, or tables and lines for a person, on stdout."""
        console = Console()
        # rich's, where the reader has gone: what is still to be done is done, and shown nowhere
        with suppress(SystemExit):
            if self.as_json:
                text = to_json(document, indent=1, exclude_none=True, inf_nan_mode="null").decode()
                return console.out(text, highlight=False)
            for part in parts:
                if isinstance(part, str):
                    show.say(console, part)
                else:
                    console.print(part, crop=False)

    def retype(self, whole: bool = False) -> str:
        """The arguments that describe the experiment; unless `whole`, those for the same teachers alone."""
        e, without, sections = self.load(), self._without, ("name", "data", "teacher", "ensemble")
        of_students = {"data.transfer"} | ({"data.heldout"} if e.data.evaluate_on == "test" else set())
        of_students |= set() if any(t.logits for t in e.teachers.values()) else {"data.unlabelled"}
        kept = [o for o in self.overrides if whole or (o.key.split(".")[0] in sections and o.key not in of_students)]
        kept += [o for o in self.overrides if o not in kept and (other := without(o)) and other.grid != e.grid]
        known = ("--set ", "--seed", "--threads ")  # other flags are of some commands alone: what they set, all have
        told = [o for o in kept if o.origin.startswith(known) or without(o) != e]  # --set refuses the file's own value
        typed = [o.origin if o.origin.startswith(known) else f"--set {o.key}={o.value}" for o in told]
        words = [self.experiment, *(word for part in typed for word in part.split(" ", 1))]
        return shlex.join([*words, *self.where()])

    def _without(self, one: Override) -> Experiment | None:
        """The experiment without an override; None where it cannot do without it."""
        with suppress(BadInput):
            return yamlfile.load(self.experiment, [other for other in self.overrides if other is not one]).experiment
        return None

    def where(self) -> list[str]:
        """The words that name the folders of the data and of the runs, unless they are the usual ones."""
        words = ["--data-dir", str(self.data_dir)] if self.data_dir is not None else []
        return [*words, *(["--runs-dir", self.runs_at] if self.runs_at != "runs" else [])]
