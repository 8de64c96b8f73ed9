"""One function a subcommand: it finds or trains the runs it needs and returns what there is to say about them."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kdcli import BadInput, Failed, core, failure, metrics
from kdcli.config import CLASSES, DATASETS, Data, Distill, Experiment, Model, Omission, Train
from kdcli.data import Dataset, Split, load, stratified
from kdcli.runs import (
    STUDENTS,
    TEACHERS,
    Document,
    Run,
    Spec,
    differences,
    environment,
    git_commit,
    list_runs,
    open_run,
)
from kdcli.specs import (
    baseline_spec,
    data_settings,
    ensemble_spec,
    member_specs,
    omission_spec,
    student_spec,
    teacher_spec,
)
from kdcli.train import Teacher, fit, learning_rate, predict
from kdcli.workers import raise_all, train_all

SAVE_EVERY = 30.0  # seconds of training that an interruption may cost


@dataclass(frozen=True)
class Session:
    """How and where to work; none of it changes what a run is."""

    experiment: Experiment
    runs_dir: Path
    device: torch.device
    data_dir: Path | None = None
    jobs: int = 1  # runs trained at once
    retype: str = ""  # the arguments that describe the same teachers, for messages
    progress: Callable[[str, int, Document], None] = field(default=lambda run, epochs, metrics: None)
    note: Callable[[str], None] = field(default=lambda line: None)
    known: set[str] = field(default_factory=set)  # the runs trained or noted in this session

    @property
    def dataset(self) -> Dataset:
        """The same for all points of a grid."""
        return loaded(self.experiment.data.model_copy(update={"transfer": None}), self.data_dir, self.device)

    @cached_property
    def commit(self) -> str | None:
        return git_commit()

    def run(self, spec: Spec) -> Run:
        return Run(self.runs_dir, spec)

    def open(self, document: Document) -> Run:
        """The run that a document is about."""
        return open_run(self.runs_dir, document["run"])


@lru_cache(maxsize=1)
def loaded(data: Data, data_dir: Path | None, device: torch.device) -> Dataset:
    return load(data, data_dir).to(device)


def train_teacher(session: Session) -> list[Document]:
    """A teacher a seed, from hard labels; its logits on the training images are kept for students."""
    return obtain(session, [teacher_spec(session.experiment, seed) for seed in session.experiment.seed])


def ensemble(session: Session) -> list[Document]:
    """The members with seeds s, s + 1, … for each seed s, and both averages of their predictions on the test images."""
    experiment = session.experiment
    obtain(session, [member for seed in experiment.seed for member in member_specs(experiment, seed)])
    return obtain(session, [ensemble_spec(experiment, seed) for seed in experiment.seed])


def distill(session: Session, teacher: str | None = None, with_baseline: bool = True) -> list[Document]:
    """The student on the soft targets of its teacher (of the run `teacher`, if named), beside its baseline.

    Raises BadInput when a teacher is missing, unfinished or of another dataset.
    """
    return _distilled(session, find_teachers(session, teacher), with_baseline)


def _distilled(session: Session, sources: Sequence[Run], with_baseline: bool = True) -> list[Document]:
    """A student a seed of these teachers, beside its baseline."""
    experiment, seeds = session.experiment, session.experiment.seed
    students = [student_spec(experiment, seed, source) for seed, source in zip(seeds, sources, strict=True)]
    baselines = [baseline_spec(experiment, seed) for seed in seeds if with_baseline]
    found = obtain(session, [*baselines, *students])
    hard, soft = found[: len(baselines)], found[len(baselines) :]
    documents = [d | {"teacher": _brief(source.result)} for d, source in zip(soft, sources, strict=True)]
    for document, other in zip(documents, hard, strict=False):
        student, baseline = session.open(document), session.open(other)
        document["baseline"] = _brief(other) | discordant(session.dataset.test.labels, student, baseline)
    return documents


def omit_classes(session: Session, entries: Sequence[Omission], teacher: str | None = None) -> list[Document]:
    """A student whose transfer set lacks classes, before and after the bias correction chosen in three ways.

    The held-out images are outside the transfer set too. Raises BadInput as `distill` does.
    """
    sources = dict(zip(session.experiment.seed, find_teachers(session, teacher), strict=True))
    jobs = [(entry, seed) for entry in entries for seed in session.experiment.seed]
    found = obtain(session, [omission_spec(session.experiment, seed, sources[seed], entry) for entry, seed in jobs])
    return [
        document | {"label": entry.label, "teacher": _brief(sources[seed].result)}
        for document, (entry, seed) in zip(found, jobs, strict=True)
    ]


def evaluate(session: Session, names: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Document:
    """Every finished run of the experiment (of these seeds, if any are given), or the named ones, scored from its
    weights on the test images. Unnamed runs of other data settings or without their parents are noted and left out."""
    name = session.experiment.name
    runs = [open_run(session.runs_dir, run, "--run") for run in dict.fromkeys(names)]
    for run in runs:
        _usable(session, run, "evaluated")
    for run in [] if names else list_runs(session.runs_dir, name, (*TEACHERS, *STUDENTS), session.note):
        if run.completed and (seeds is None or run.spec.seed in seeds):
            if reason := _unlike_data(session, run) or _orphaned(run):
                session.note(f"left out: {run.name}: {reason}")
            else:
                runs.append(_usable(session, run, "evaluated"))
    if not runs:
        of = f" of seed {', '.join(map(str, seeds))}" if seeds is not None else ""
        raise BadInput(f"{session.runs_dir / name}: no finished runs{of}; train some: kd run {session.retype}")
    log_p = {run.name: log_probabilities(session, run) for run in runs}
    return {"command": "evaluate", "experiment": name, "runs": [_evaluation(session, run, log_p) for run in runs]}


def run(session: Session, points: Sequence[Experiment]) -> tuple[list[list[Document]], Document]:
    """Everything the experiment file describes, for all its seeds and points of its grid: for each point the documents
    of its runs, each with the `row` of the table that it belongs to, and the evaluation of them all.

    There is one ensemble: its members have the first seed, the next, …; all its students learn from it.
    """
    nets = [_hard_labelled(point) for point in points]
    obtain(session, [spec for specs in nets for spec in specs])  # together, since none of them waits for another
    obtain(session, [spec for point in points for spec in _ensembles(point).values()])
    obtain(session, [spec for point in points for spec in _soft_labelled(session, point)])
    documents = [_documents(replace(session, experiment=point)) for point in points]
    return documents, evaluate(session, [str(d["run"]) for of_point in documents for d in of_point])


def experiment_of(run: Run) -> Experiment:
    """The experiment that a finished run is a part of, as far as its record tells. Raises BadInput when it is not
    finished, or its teacher is gone."""
    if not run.completed:
        raise BadInput(f"{run.name}: is {run.status}: has nothing to report; {run.how_to_finish}")
    settings, teacher = run.spec.settings, _source(run)
    taught_by = _members(teacher)[0].spec.settings if teacher else settings
    own = taught_by if run.spec.command == "ensemble" else settings
    data = settings["data"] | {key: settings[key] for key in ("heldout", "transfer") if key in settings}
    described: Document = {"name": run.spec.experiment, "seed": [run.spec.seed], "data": data}
    for role, of in (("teacher", taught_by), ("student", own)):
        described[role] = {key: of[key] for key in ("model", "train")}
    described["distill"] = settings.get("distill", {"T": 4.0, "lambda1": 1.0})
    if teacher and teacher.spec.command == "ensemble":
        described["ensemble"] = {"members": len(teacher.spec.parents), "average": teacher.spec.settings["average"]}
    if "omitted" in settings:
        described["omit_classes"] = [{"omit": settings["omitted"]}]
    return Experiment.model_validate(described)


def _source(run: Run) -> Run | None:
    """The teacher or ensemble that a run is or has learned from; of a baseline none."""
    if run.spec.command in TEACHERS:
        return run
    return open_run(run.root, run.spec.parents[0]) if run.spec.parents else None


def run_documents(session: Session, run: Run) -> list[Document]:
    """The documents of a finished run, its teacher and its baseline, those that there are, each with its `row`."""
    teacher, settings = _source(run), run.spec.settings
    documents: list[Document] = [{"row": _row_of(teacher)} | teacher.result] if teacher else []
    if run.spec.command in TEACHERS:
        return documents
    own: Document = {"row": "baseline" if run.spec.command == "baseline" else "student"} | run.result
    if teacher:
        own["teacher"] = _brief(teacher.result)
    if "omitted" in settings:
        own["row"] = own["label"] = Omission(omit=settings["omitted"]).label
    if run.spec.command == "distill":
        found = list_runs(session.runs_dir, run.spec.experiment, ["baseline"], session.note)
        found = [b for b in found if b.completed and b.spec.seed == run.spec.seed and _same_task(b, run)]
        if found:  # one trained as the student was, if there is one
            baseline = max(found, key=lambda b: b.spec.settings["train"] == settings["train"])
            documents.append({"row": "baseline"} | baseline.result)
            own["baseline"] = _brief(baseline.result) | discordant(session.dataset.test.labels, run, baseline)
    return [*documents, own]


def _row_of(teacher: Run) -> str:
    if teacher.spec.command == "train-teacher":
        return "teacher"
    return "ensemble of baselines" if "/baseline/" in teacher.spec.parents[0] else "ensemble"


def _same_task(a: Run, b: Run) -> bool:
    return all(a.spec.settings.get(key) == b.spec.settings.get(key) for key in ("data", "model", "transfer"))


def made(session: Session, documents: Sequence[Sequence[Document]]) -> Document:
    """How the runs of `kd run` were made: command line, commits, devices, versions, seconds."""
    runs = {str(d["run"]): d for of_point in documents for d in of_point}
    records = [session.open(d).environment for d in runs.values()]
    here = environment(str(session.device), torch.get_num_threads())
    trained = [d for d in runs.values() if d["command"] != "ensemble"]

    def seen(key: str) -> list[str]:
        return sorted({str(record.get(key, "unknown")) for record in records})

    return {
        "command_line": here["command_line"],
        "commits": seen("git_commit"),
        "devices": [f"{device}, {here['cores']} cores" if device == "cpu" else device for device in seen("device")],
        "versions": f"torch {', '.join(seen('torch'))}, Python {', '.join(seen('python'))}",
        "date": here["started"][:10],
        "seconds": sum(d["seconds"] for d in trained),
    }


def unfinished(session: Session, points: Sequence[Experiment]) -> list[str]:
    """The runs of the experiment that are not finished, by name."""
    specs = [spec for point in points for spec in (*_hard_labelled(point), *_ensembles(point).values())]
    specs += [spec for point in points for spec in _soft_labelled(session, point)]
    return list(dict.fromkeys(spec.name for spec in specs if not session.run(spec).completed))


def _hard_labelled(experiment: Experiment) -> list[Spec]:
    """The runs that need no other: teachers, baselines, and the members of the ensembles of both."""
    seeds = experiment.seed
    further = range(seeds[0], seeds[0] + experiment.ensemble.members) if experiment.ensemble else range(0)
    members = member_specs(experiment, seeds[0]) if experiment.ensemble else []
    baselines = [baseline_spec(experiment, seed) for seed in dict.fromkeys([*seeds, *further])]
    return [*(teacher_spec(experiment, seed) for seed in seeds), *members, *baselines]


def _ensembles(experiment: Experiment) -> dict[str, Spec]:
    """The ensemble, and that of as many baselines (the plain nets that the talk begins with), by row."""
    if experiment.ensemble is None:
        return {}
    seed = experiment.seed[0]
    baselines = [baseline_spec(experiment, seed + i) for i in range(experiment.ensemble.members)]
    return {
        "ensemble": ensemble_spec(experiment, seed),
        "ensemble of baselines": ensemble_spec(experiment, seed, baselines),
    }


def _sources(session: Session, experiment: Experiment) -> dict[str, list[Run]]:
    """The teachers of the students of each row, one a seed."""
    sources = {"student": [_described_teacher(session, experiment, seed) for seed in experiment.seed]}
    if "student of ensemble" in experiment.rows:
        ensemble = session.run(_ensembles(experiment)["ensemble"])
        sources["student of ensemble"] = [ensemble] * len(experiment.seed)
    return sources


def _soft_labelled(session: Session, experiment: Experiment) -> list[Spec]:
    """The runs that learn from soft targets."""
    by_row = {row: list(zip(experiment.seed, runs, strict=True)) for row, runs in _sources(session, experiment).items()}
    students = [student_spec(experiment, seed, source) for pairs in by_row.values() for seed, source in pairs]
    entries = experiment.omit_classes
    return students + [
        omission_spec(experiment, seed, source, e) for e in entries for seed, source in by_row["student"]
    ]


def _documents(session: Session) -> list[Document]:
    """What there is to say about the runs of one point, which are all finished."""
    experiment = session.experiment
    rows = {"teacher": train_teacher(session)}
    rows |= {row: obtain(session, [spec]) for row, spec in _ensembles(experiment).items()}
    rows["baseline"] = obtain(session, [baseline_spec(experiment, seed) for seed in experiment.seed])
    rows |= {row: _distilled(session, sources) for row, sources in _sources(session, experiment).items()}
    documents = [{"row": row} | document for row, found in rows.items() for document in found]
    return documents + [{"row": d["label"]} | d for d in omit_classes(session, experiment.omit_classes)]


def plan(experiment: Experiment) -> list[Document]:
    """The nets that the experiment trains, before it does: parameters, steps at most, batch sizes, runs a net."""
    images = experiment.data.trained_on
    seed, seeds, nobody = 0, len(experiment.seed), Run(Path(), Spec(experiment.name, "train-teacher", 0, {}))
    specs = {"teacher": teacher_spec(experiment, seed)}
    if experiment.ensemble:
        specs |= {f"member {i}": spec for i, spec in enumerate(member_specs(experiment, seed))}
    specs |= {"baseline": baseline_spec(experiment, seed), "student": student_spec(experiment, seed, nobody)}
    specs |= {e.label: omission_spec(experiment, seed, nobody, e) for e in experiment.omit_classes}
    nets = []
    for name, spec in specs.items():
        train = Train(**spec.settings["train"])
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(spec.settings).parameters())
        steps = math.ceil(images / train.batch_size) * train.epochs
        net = {"net": name, "parameters": parameters, "steps": steps, "batch_size": train.batch_size, "seeds": seeds}
        nets.append(net)
    return nets


# Finding and training.


def find_teachers(session: Session, name: str | None = None) -> list[Run]:
    """The runs that students learn from, one a seed: the one named, else those that the experiment file describes.

    Raises BadInput when any is missing, unfinished or of another dataset: with the runs that come close, how they
    differ, and what to type.
    """
    seeds = session.experiment.seed
    if name is not None:
        run = open_run(session.runs_dir, name, "--teacher")
        if run.spec.command not in TEACHERS:
            kind = run.spec.command
            raise BadInput(f"--teacher {name}: is a {kind} run; a teacher is a train-teacher or ensemble run")
        return [_usable(session, run, "a teacher")] * len(seeds)
    teachers = [_described_teacher(session, session.experiment, seed) for seed in seeds]
    lines: list[str] = []
    for run in teachers:
        if run.status == "running":
            lines.append(f"teacher {run.name}: is being trained; wait for it")
        elif not run.completed:
            missing = ",".join(dict.fromkeys(str(t.spec.seed) for t in teachers if not t.completed))
            typed = f"kd {run.spec.command} {session.retype} --seed {missing}"
            lines += [f"teacher {run.name}: is {run.status}; train it: {typed}"]
            lines += [f"  close: {line}" for line in _close_runs(session, run)]
    if lines:
        raise BadInput(*lines)
    return [_usable(session, open_run(session.runs_dir, run.name), "a teacher") for run in teachers]


def _described_teacher(session: Session, experiment: Experiment, seed: int) -> Run:
    """The run, trained or not, that the experiment describes as the teacher of a student with this seed: the teacher of
    the same seed, or the one ensemble."""
    if experiment.distill.teacher == "ensemble":
        return session.run(ensemble_spec(experiment, experiment.seed[0]))
    return session.run(teacher_spec(experiment, seed))


def _close_runs(session: Session, wanted: Run) -> list[str]:
    """The runs of the same command that differ least from the wanted one, and how."""

    def described(spec: Spec) -> Document:
        return spec.settings | {"seed": spec.seed} | ({"members": len(spec.parents)} if spec.parents else {})

    found = []
    for run in list_runs(session.runs_dir, wanted.spec.experiment, [wanted.spec.command], session.note):
        unlike = differences(described(wanted.spec), described(run.spec)) or ["its members differ"]
        if run.name != wanted.name:
            found.append((len(unlike), run.status != "completed", f"{run.name} ({run.status}): {'; '.join(unlike)}"))
    return [line for _, _, line in sorted(found)[:3]]


def _unlike_data(session: Session, run: Run) -> str:
    """In what the run's dataset differs from the session's; empty if in nothing."""
    return "; ".join(differences(data_settings(session.experiment.data), run.spec.settings["data"], "data."))


def _orphaned(run: Run) -> str:
    """The members that an ensemble needs and that are gone; empty if all are there."""
    members = run.spec.parents if run.spec.command == "ensemble" else ()
    return ", ".join(f"its member {name} is gone" for name in members if not (run.root / name).is_dir())


def _usable(session: Session, run: Run, role: str) -> Run:
    """The run itself, if it is finished, whole and of the session's dataset; else raises BadInput."""
    if not run.completed:
        raise BadInput(f"{run.name}: is {run.status}: cannot be {role}; {run.how_to_finish}")
    if unlike := _unlike_data(session, run):
        raise BadInput(f"{run.name}: cannot be {role} in this experiment: {unlike}")
    for member in _members(run):
        if not member.completed:
            raise BadInput(f"{run.name}: cannot be {role}: its member {member.name} is {member.status}")
        for kind in ("weights", "logits"):
            member.load(kind)
    for name, fingerprint in run.result.get("parents", {}).items():
        parent = open_run(run.root, name) if (run.root / name).is_dir() else None
        if parent and parent.completed and not _orphaned(parent) and _fingerprint(parent) != fingerprint:
            raise BadInput(f"{run.name}: was made from other weights than {name} has now: {run.remedy}")
    return run


def _fingerprint(run: Run) -> str:
    """A checksum of the weights of a finished run, or of those of an ensemble's members."""
    weights = [member.result.get("sha256", {}).get("weights.safetensors", "") for member in _members(run)]
    return hashlib.sha256(" ".join(weights).encode()).hexdigest()


def obtain(session: Session, specs: Sequence[Spec]) -> list[Document]:
    """The results of runs, in order; those that are not finished are trained now."""
    runs = {spec.name: session.run(spec) for spec in specs}
    missing = [run for run in runs.values() if not run.completed]
    before: dict[str, list[str]] = {}  # those finished before, by the commit that made them
    for run in runs.values():
        if run.completed and run.name not in session.known:
            _usable(session, open_run(run.root, run.name), "shown")
            commit = run.environment.get("git_commit")
            made_by = f", by commit {commit or 'unknown'}" if commit != session.commit else ""
            before.setdefault(made_by, []).append(run.name)
    for made_by, (first, *others) in before.items():
        session.note(f"{first}{f' and {len(others)} more' if others else ''}: finished before{made_by}")
    nets = [run for run in missing if run.spec.command != "ensemble"]  # to combine members is not worth a process
    if session.jobs > 1 and len(nets) > 1 and session.device.type == "cpu":
        train_all(session, missing)
    else:
        _train_here(session, _stackable(session, missing))
    session.known.update(runs)
    return [runs[spec.name].result for spec in specs]


def _train_here(session: Session, groups: list[list[Run]]) -> None:
    """Train groups one after another. One that fails takes no other down: a stack is taken apart, and when all have
    ended, what went wrong is raised."""
    failures: list[Exception] = []
    while groups:
        group, *groups = groups
        try:
            train(session, group)
        except (RuntimeError, OSError) as error:
            if len(group) > 1:
                groups = [[run] for run in group] + groups
            else:
                failures.append(Failed(f"{group[0].name}: {failure(error)}"))
        except BadInput as error:
            failures.append(error)
    raise_all(failures)


def _stackable(session: Session, runs: Sequence[Run]) -> list[list[Run]]:
    """On a GPU, runs that differ in seed and parents alone, which train in one stack; elsewhere each by itself."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alone = session.device.type != "cuda" or run.spec.command == "ensemble"
        key = run.name if alone else json.dumps([run.spec.command, run.spec.settings], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def train(session: Session, runs: Sequence[Run]) -> None:
    """Train runs that differ in seed and parents alone, or combine the one ensemble, and write their directories."""
    device = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    with ExitStack() as held:
        for run in runs:
            held.enter_context(run.writing(device, threads))
        work = _combine if runs[0].spec.command == "ensemble" else _train_nets
        for run, result in zip(runs, work(session, runs), strict=True):
            parents = {name: _fingerprint(open_run(run.root, name)) for name in run.spec.parents}
            result |= {"device": device, "threads": threads, "parents": parents}
            run.finish(result, _report(run, result))


def _train_nets(session: Session, runs: Sequence[Run]) -> list[Document]:
    """Train teachers, baselines or students, as the settings and parents of the runs say."""
    data, settings = session.dataset, runs[0].spec.settings
    omitted = settings.get("omitted", [])
    absent = torch.isin(data.train.labels, torch.tensor(omitted, device=session.device))
    if omitted:
        absent[data.heldout] = True
    transfer = (~absent).nonzero()[:, 0]
    if (count := settings.get("transfer", len(transfer))) < len(transfer):
        transfer = transfer[stratified(data.train.labels[transfer], count)]
    distillation = None
    if "distill" in settings:
        sources = [open_run(session.runs_dir, run.spec.parents[0]) for run in runs]
        distillation = Distill(**settings["distill"]), _soft_targets(session, sources, settings, transfer)
    nets, results = _fit(
        session, runs, data.train.at(transfer) if len(transfer) < len(data.train) else data.train, distillation
    )
    for run, net, result in zip(runs, nets, results, strict=True):
        logits = {"test": predict(net, data.test)}
        if omitted or run.spec.command == "train-teacher":
            logits["train"] = predict(net, data.train)
        run.save("logits", logits)
        result |= {"omitted": omitted, "bias": _corrections(logits, data, omitted)} if omitted else {}
    return results


def _combine(session: Session, runs: Sequence[Run]) -> list[Document]:
    """Both averages of an ensemble's members, and by how many errors the chosen one beats them."""
    (run,) = runs
    members, how = [member.result for member in _members(run)], run.spec.settings["average"]
    labels = session.dataset.test.labels.cpu()
    logits = teacher_logits(run, "test", len(labels))
    averages = {a: metrics.count_errors(core.average(logits, 1.0, a), labels) for a in ("arithmetic", "geometric")}
    errors = [member["test"]["errors"] for member in members]
    result = {
        "seconds": sum(member["seconds"] for member in members),
        "evaluated_on": members[0]["evaluated_on"],
        "test": averages[how],
        "average": how,
        "averages": averages,
        "members": [_brief(member) | {"seed": member["seed"]} for member in members],
        "fewer_errors_than": {
            "best_member": min(errors) - averages[how]["errors"],
            "mean_member": sum(errors) / len(errors) - averages[how]["errors"],
        },
    }
    return [result]


def _report(run: Run, result: Document) -> str:
    """report.md: what the run is and what came out, for a reader."""
    import yaml

    test = result["test"]
    per_class = " ".join(map(str, test["per_class_errors"]))
    lines = [
        f"# {run.name}",
        f"{test['errors']} errors on {test['total']} images ({result['evaluated_on']}); per class 0 to 9: {per_class}.",
        f"Trained in {result['seconds']:.0f} s on {result['device']}.",
        *[f"Learned from {parent}." for parent in run.spec.parents],
        f"```yaml\n{yaml.safe_dump(run.spec.settings, sort_keys=False)}```",
    ]
    return "\n\n".join(lines) + "\n"


def _brief(result: Document) -> Document:
    return {"run": result["run"], "errors": result["test"]["errors"]}


def discordant(labels: Tensor, student: Run, baseline: Run) -> dict[str, int]:
    """The test images that only the student gets right (`fixed`), and those that only the baseline does (`broken`)."""
    student_right, baseline_right = (_predictions(run, len(labels)) == labels.cpu() for run in (student, baseline))
    return {
        "fixed": int((student_right & ~baseline_right).sum()),
        "broken": int((baseline_right & ~student_right).sum()),
    }


def _predictions(run: Run, images: int) -> Tensor:
    return core.average(
        teacher_logits(run, "test", images), 1.0, run.spec.settings.get("average", "arithmetic")
    ).argmax(1)


def build(settings: Document, init: torch.Generator | None = None) -> core.MLP:
    """The net that a run's settings describe."""
    model = Model(**settings["model"])
    side = DATASETS[settings["data"]["name"]].side
    return core.MLP(
        side * side, model.hidden, CLASSES, dropout=model.dropout, input_dropout=model.input_dropout, init=init
    )


def _fit(
    session: Session, runs: Sequence[Run], transfer_set: Split, distill: tuple[Distill, Teacher] | None = None
) -> tuple[Sequence[core.MLP], list[Document]]:
    """Train the nets of runs, log every epoch, and save their weights. The last epoch counts, whatever came before."""
    spec, test = runs[0].spec, session.dataset.test
    train = Train(**spec.settings["train"])
    # A student of its teacher's shape must not start from its teacher's initial weights; it shares its baseline's.
    streams = [2 * run.spec.seed + (spec.command in STUDENTS) for run in runs]
    nets: Sequence[core.MLP]
    nets = [build(spec.settings, core.generator(stream, "init")).to(session.device) for stream in streams]
    saved = [run.load_state(session.note) for run in runs]
    if len({epochs for epochs, _ in saved}) > 1:  # a stack goes in step: all of it again
        saved = [run.restart() for run in runs]
    done = saved[0][0]
    before = [run.metrics()[done - 1]["seconds"] if done else 0.0 for run in runs]
    if done:
        session.note(f"{', '.join(run.name for run in runs)}: continued after epoch {done}")
    steps, started = math.ceil(len(transfer_set) / train.batch_size), time.perf_counter()
    last_save = last_epoch = started
    with ExitStack() as opened:
        logs = [opened.enter_context(run.logging()) for run in runs]
        for epoch in fit(nets, transfer_set, train, streams, distill, done, [state for _, state in saved if state]):
            nets, results = epoch.models, []
            speed = round(len(transfer_set) / (time.perf_counter() - last_epoch))
            for run, net, of_train, earlier, log in zip(runs, nets, epoch.metrics, before, logs, strict=True):
                logits = predict(net, test)
                _stop_if_diverged(run, train, of_train, steps, logits)
                counted = metrics.count_errors(logits, test.labels)
                seconds = round(earlier + time.perf_counter() - started, 3)
                logged = of_train | {"test_errors": counted["errors"], "seconds": seconds, "images_per_s": speed}
                log(logged)
                session.progress(run.name, train.epochs, logged)
                results.append({"seconds": seconds, "test": counted, "last_epoch": of_train})
            if time.perf_counter() - last_save >= SAVE_EVERY and of_train["epoch"] < train.epochs:
                for run, state in zip(runs, epoch.states, strict=True):
                    run.save_state(int(of_train["epoch"]), state)
                last_save = time.perf_counter()
            last_epoch = time.perf_counter()
    for run, net, result in zip(runs, nets, results, strict=True):
        run.save("weights", net.state_dict())
        on = "test images" if session.experiment.data.evaluate_on == "test" else "held-out training images"
        result |= {"samples": len(transfer_set), "evaluated_on": on, "trained_together": len(runs)}
    return nets, results


def _stop_if_diverged(run: Run, train: Train, of_epoch: dict[str, float], steps: int, logits: Tensor) -> None:
    """Raise RuntimeError, and say so in the run, if the loss or what the net says now is not finite."""
    if math.isfinite(of_epoch["loss"]) and bool(logits.isfinite().all()):
        return
    step = int(of_epoch.get("diverged_at", of_epoch["epoch"] * steps - 1))
    rate = learning_rate(train, step, steps)
    error = (
        f"diverged at step {step + 1} (epoch {of_epoch['epoch']}), at a learning rate of {rate:.3g}: "
        f"lower the lr of {train.lr:g}, or let it rise over a warmup"
    )
    run.end("diverged", error)
    raise RuntimeError(error)


def nets(run: Run, device: torch.device) -> list[core.MLP]:
    """The trained net of a run, or those of an ensemble's members: frozen, in eval mode."""
    found = []
    for member in _members(run):
        net = build(member.spec.settings)
        try:
            net.load_state_dict(member.load("weights"))
        except RuntimeError:
            raise BadInput(f"{member.path}: its weights do not fit its config.yaml: {member.remedy}") from None
        found.append(net.to(device).eval().requires_grad_(False))
    return found


def _members(run: Run) -> list[Run]:
    return [open_run(run.root, name) for name in run.spec.parents] if run.spec.command == "ensemble" else [run]


def _logits(run: Run, split: str, images: int) -> Tensor:
    """The logits [N, C] that a run kept on the `train` or `test` images. Raises BadInput when they are not there."""
    logits = run.load("logits").get(split)
    if logits is None or logits.shape != (images, CLASSES):
        raise BadInput(f"{run.path}: its logits are not those of the {images:,} {split} images: {run.remedy}")
    return logits


def teacher_logits(run: Run, split: str, images: int) -> Tensor:
    """The logits [M, N, C] that the members of a teacher kept; a lone teacher has M = 1."""
    return torch.stack([_logits(member, split, images) for member in _members(run)])


def _soft_targets(session: Session, sources: Sequence[Run], settings: Document, transfer: Tensor) -> Teacher:
    """The teachers of M students as `fit` asks them. Their logits on the images at `transfer` are read once; for a
    jittered transfer set no cached logits would be right, so the nets themselves are asked."""
    T = settings["distill"]["T"]
    averages = [source.spec.settings.get("average", "arithmetic") for source in sources]

    def soften(members: Sequence[Tensor]) -> Tensor:
        """Soft targets [M, N, C] of the logits [members, N, C] of M teachers."""
        return torch.stack([core.average(z, T, how).exp() for z, how in zip(members, averages, strict=True)])

    if settings["train"]["jitter"]:
        asked = [nets(source, session.device) for source in sources]
        return lambda index, x: soften(
            [torch.stack([net(own) for net in of_one]) for of_one, own in zip(asked, x, strict=True)]
        )
    images, device = len(session.dataset.train), session.device
    targets = soften([teacher_logits(source, "train", images).to(device)[:, transfer] for source in sources])
    student = torch.arange(len(sources), device=device)[:, None]
    return lambda index, x: targets[student, index]


def _corrections(logits: dict[str, Tensor], data: Dataset, omitted: list[int]) -> Document:
    """The bias correction chosen on the test set (the paper's way), on the held-out images, and by the class prior."""
    train, test, held = data.train.labels, data.test.labels, data.heldout
    share = float(torch.isin(train, torch.tensor(omitted, device=train.device)).double().mean())
    shifts = {
        "test": metrics.fewest_errors_shift(logits["test"], test, omitted),
        "heldout": metrics.fewest_errors_shift(logits["train"][held], train[held], omitted),
        "prior": metrics.prior_shift(logits["train"], omitted, share),
    }

    def corrected(shift: float) -> Document:
        counted = metrics.count_errors(metrics.shift_bias(logits["test"], omitted, shift), test)
        return {"shift": shift, "errors": counted["errors"], "per_class_errors": counted["per_class_errors"]}

    return {name: corrected(shift) for name, shift in shifts.items()}


def log_probabilities(session: Session, run: Run) -> Tensor:
    """log p [N, C] at T = 1 on the test images, from the weights; of an ensemble, by its own average."""
    logits = torch.stack([predict(net, session.dataset.test) for net in nets(run, session.device)])
    return core.average(logits, 1.0, run.spec.settings.get("average", "arithmetic"))


def _evaluation(session: Session, run: Run, log_p: dict[str, Tensor]) -> Document:
    """The scores of one run; `log_p` holds the log-probabilities of runs by name, and gains those of its teacher."""
    test, spec = session.dataset.test, run.spec
    scored = metrics.score(log_p[run.name], test.labels)
    kept = ("command", "experiment", "run", "seed", "status", "device", "seconds", "evaluated_on")
    document = {k: run.result[k] for k in kept}
    document["test"] = {k: scored.pop(k) for k in ("errors", "total", "per_class_errors")}
    document |= scored
    if spec.command in STUDENTS:  # a baseline is compared with the teacher that the experiment describes
        name = spec.parents[0] if spec.parents else _described_teacher(session, session.experiment, spec.seed).name
        if (run.root / name).is_dir():
            teacher = open_run(run.root, name)
            if name not in log_p and teacher.completed and not _orphaned(teacher):
                log_p[name] = log_probabilities(session, teacher)
        if name in log_p:
            document["teacher"] = {"run": name} | metrics.compare(log_p[run.name], log_p[name])
    own = nets(run, session.device)
    document["measured_on"] = f"{session.device.type}, {torch.get_num_threads()} thread(s)"
    document["cost"] = cost(own) | {
        "latency_ms": {
            str(n): metrics.latency(
                lambda x: torch.stack([net(x) for net in own]), test.inputs(torch.arange(n, device=session.device))
            )
            for n in (1, 128)
        },
    }
    if "teacher" in document:
        teacher = open_run(run.root, document["teacher"]["run"])
        right = [1 - r["test"]["errors"] / r["test"]["total"] for r in (document, teacher.result)]
        price = cost(nets(teacher, session.device))
        document["teacher"] |= {
            "accuracy_kept": right[0] / right[1] if right[1] else None,
            "multiply_adds_kept": document["cost"]["multiply_adds"] / price["multiply_adds"],
        }
    return document


def cost(nets: Sequence[core.MLP]) -> Document:
    """What it takes to hold the nets and to classify one image with all of them."""
    weights = [p for net in nets for p in net.parameters()]
    return {
        "parameters": sum(p.numel() for p in weights),
        "multiply_adds": sum(p.numel() for p in weights if p.dim() == 2),
        "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
    }
