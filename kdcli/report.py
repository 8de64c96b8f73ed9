"""What a person sees: progress, tables, the verdict, the pictures. Reads results, trains nothing."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from kdcli.config import CLASSES, Experiment, Key
from kdcli.runs import Document
from kdcli.verdict import Verdict, spread, verdict

GRID_ROWS = ("teacher", "ensemble", "baseline", "student", "student of ensemble")  # what the table of a grid shows
INTERVAL_LEGEND = "Intervals are of the mean over seeds (t); they do not cover the sampling of the test set."
PAPER_LEGEND = (
    "Verdict on the paper's one run: better or worse where the 95 % interval of our mean over seeds leaves it out, "
    "equal where it does not{single}. The intervals do not cover the sampling of the test set."
)


class Display:
    """Progress on stderr: a bar a run on a terminal; elsewhere a plain line an epoch, at most two a second."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        name, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
        self.bars = Progress(name, BarColumn(6), text, TimeRemainingColumn(), console=self.console)
        self.tasks: dict[str, TaskID] = {}
        self.printed = 0.0

    def epoch(self, run: str, epochs: int, metrics: Document) -> None:
        """Show the metrics of one finished epoch out of `epochs`."""
        last = metrics["epoch"] == epochs
        loss = f"T²KL {metrics['t2_kl']:.3g}" if "t2_kl" in metrics else f"loss {metrics['loss']:.3g}"
        text = f"epoch {metrics['epoch']}/{epochs}, {loss}, {metrics['test_errors']} errors, {metrics['seconds']:.1f} s"
        text += f", {metrics['images_per_s']:,} images/s"
        if self.console.is_terminal:  # the same in 80 columns, beside the bar and the time left
            short = f"{metrics['epoch']}/{epochs} {loss} {metrics['test_errors']} errors"
            short += f" {metrics['images_per_s'] / 1000:.1f}k images/s"
            if run not in self.tasks:
                self.tasks[run] = self.bars.add_task(run.partition("/")[2][:-7], total=epochs, text=short)
                self.bars.start()
            self.bars.update(self.tasks[run], completed=metrics["epoch"], text=short)
            if last:
                self.bars.remove_task(self.tasks.pop(run))
        if last or (not self.console.is_terminal and time.monotonic() - self.printed > 0.5):
            self.printed = time.monotonic()
            self.note(f"{run}: {text}")

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.bars.live.is_started:
            self.bars.stop()


class Table(NamedTuple):
    """A table before it is printed or written: cells are text; the first column is on the left, others on the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])

    def print(self, console: Console) -> None:
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        words = [len(word) for row in self.rows for word in row[0].split()]
        first = max(words, default=0)  # a run's name is whole, so that it can be copied
        for i, column in enumerate(self.columns):
            width = None if i else min(first, 50)
            table.add_column(column, justify="right" if i else "left", overflow="fold", min_width=width)
        for row in self.rows:
            table.add_row(*row)
        console.print(self.title, style="bold", highlight=False, markup=False)
        console.print(table)


# The tables of each command, from its documents.


def tables(command: str, documents: Sequence[Document]) -> list[Table | str]:
    """What a command has to show for the documents of its runs, one for each seed (and entry)."""
    make: dict[str, Callable[[Sequence[Document]], list[Table | str]]] = {
        "train-teacher": _trained,
        "ensemble": _ensembles,
        "distill": _distilled,
        "omit-classes": _omissions,
        "evaluate": _evaluations,
    }
    return make[command](documents)


def runs_table(listed: Sequence[Document]) -> Table:
    """What `kd runs` shows."""
    rows = []
    for d in listed:
        under_way = d["status"] != "completed" and d["epoch"]
        status = f"{d['status']} {d['epoch']}/{d['epochs']}" if under_way else d["status"]
        errors = "" if d["errors"] is None else str(d["errors"])
        rows.append([d["run"], status, errors, _age(d["age_s"]), size(d["bytes"])])
    return Table(number_of_runs(len(listed)), ("run", "status", "errors", "age", "size"), rows)


def number_of_runs(n: int) -> str:
    return f"{n} run" if n == 1 else f"{n} runs"


def size(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _age(seconds: float) -> str:
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def compare_tables(document: Document) -> list[Table | str]:
    """What `kd compare` shows: the groups, and of each the settings that differ from A's and the verdict against A."""
    groups, rows = document["groups"], []
    for g in groups:
        interval = "{:.1f} to {:.1f}".format(*g["interval"]) if g["interval"] else ""
        rows.append([g["group"], g["name"], str(len(g["errors"])), _spread(g), interval])
    title = f"Errors on {document['total']:,} {document['evaluated_on']}"
    result: list[Table | str] = [Table(title, ("", "runs", "n", "errors", "95 % interval"), rows)]
    for c in document["comparisons"]:
        found = {k: v for k, v in c.items() if k in Verdict._fields}
        changed = "; ".join(f"{key} {_value(b)}, not {_value(a)}" for key, (a, b) in c["changed"].items()) or "nothing"
        said = Verdict(**found).sentence(c["group"], groups[0]["group"]) if found else c["why_not"]
        if found and c["seeds"] != groups[0]["seeds"]:
            said = f"Over the seeds that both have ({', '.join(map(str, c['seeds']))}): {said}"
        result.append(f"{c['group']} against {groups[0]['group']}: {changed}.\n{said}\n")
    return [*result, INTERVAL_LEGEND]


def predictions(document: Document, top: int) -> list[Table | str]:
    """What `kd predict` shows: of each image the likeliest classes, a column a net and temperature, with bars."""
    result: list[Table | str] = []
    for image in document["images"]:
        views = image["views"]
        order = sorted(range(len(views[0]["p"])), key=lambda c: -float(views[0]["p"][c]))
        best = {max(order, key=view["p"].__getitem__) for view in views}  # of every view, its first class is shown
        shown = [c for i, c in enumerate(order) if i < top or c in best]
        rows = [[f"{c}{' *' if c == image['label'] else ''}", *(_bar(v["p"][c]) for v in views)] for c in shown]
        columns = ["class", *(f"{v['net']}, T = {v['T']:g}" if len(views) > 1 else "probability" for v in views)]
        label = f", the label is {image['label']} (*)" if image["label"] is not None else ""
        result.append(Table(f"{image['image']}: {order[0]}{label}", columns, rows))
    return result


def _bar(p: float) -> str:
    blocks = "█" * int(p * 6) + "▏▎▍▌▋▊▉█"[int(p * 48) % 8]
    return f"{blocks if p >= 1 / 96 else ''} {p:.4f}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_value(v)}" for key, v in value.items())
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _rate(errors: float, total: int) -> str:
    return f"{100 * errors / total:.2f} %"


def _on(document: Document) -> str:
    return f"{document['test']['total']:,} {document['evaluated_on']}"


def _trained(documents: Sequence[Document]) -> list[Table | str]:
    rows = []
    for d in documents:
        test = d["test"]
        rows.append([d["run"], str(test["errors"]), _rate(test["errors"], test["total"]), f"{d['seconds']:.0f} s"])
    return [Table(f"Errors on {_on(documents[0])}", ("run", "errors", "rate", "trained in"), rows)]


def _ensembles(documents: Sequence[Document]) -> list[Table | str]:
    result: list[Table | str] = []
    for d in documents:
        errors = [m["errors"] for m in d["members"]]
        rows = [[m["run"], str(m["errors"]), "", ""] for m in d["members"]]
        rows.append(["mean member", f"{statistics.mean(errors):.1f}", "", ""])
        for how, counted in d["averages"].items():
            beats = [min(errors) - counted["errors"], statistics.mean(errors) - counted["errors"]]
            rows.append([f"{how} average", str(counted["errors"]), f"{beats[0]:+d}", f"{beats[1]:+.1f}"])
        columns = ("member", "errors", "fewer than the best", "than the mean")
        result.append(Table(f"{d['run']}: errors on {_on(d)}", columns, rows))
    return result


def _distilled(documents: Sequence[Document]) -> list[Table | str]:
    counts = []
    for d in documents:
        beside = [d[key]["errors"] for key in ("teacher", "baseline") if key in d]
        counts.append([*beside, d["test"]["errors"]])
    names, total = [d["run"] for d in documents], documents[0]["test"]["total"]
    if len(documents) > 1:
        names, counts = [*names, "mean"], [*counts, [statistics.mean(column) for column in zip(*counts, strict=True)]]
    rows = [[name, *(f"{c:g}" for c in row), _rate(row[-1], total)] for name, row in zip(names, counts, strict=True)]
    with_baseline = "baseline" in documents[0]
    columns = ("run", "teacher", *(["baseline"] if with_baseline else []), "student", "rate")
    return [
        Table(f"Errors on {_on(documents[0])}", columns, rows),
        *([verdict(documents).sentence()] if with_baseline else []),
    ]


def _omissions(documents: Sequence[Document]) -> list[Table | str]:
    result: list[Table | str] = []
    for d in documents:
        rows = []
        for name, stage in {"before": d["test"], **d["bias"]}.items():
            per_class = stage["per_class_errors"]
            keeps = d["label"].startswith("keep")  # then b is what the kept biases gain: the same predictions
            shift = f"{-stage['shift'] if keeps else stage['shift']:+.2f}" if "shift" in stage else ""
            unseen = sum(per_class[c] for c in d["omitted"])
            rows.append([name, shift, str(stage["errors"]), str(unseen), *map(str, per_class)])
        moved = [c for c in range(CLASSES) if (c in d["omitted"]) != keeps]
        title = f"{d['run']}\n{d['label']}: errors on {_on(d)}; b is added to the bias of {', '.join(map(str, moved))}"
        result.append(Table(title, ("bias", "b", "all", "unseen", *map(str, range(CLASSES))), rows))
    return [*result, BIAS_LEGEND]


BIAS_LEGEND = (
    "Bias chosen by test: on the test set, as the paper did; heldout: on training images outside the transfer set; "
    "prior: on the unlabelled training images, from the known shares of the classes."
)
MATRICES = 4  # confusion matrices are shown for so many runs at most


def _evaluations(documents: Sequence[Document]) -> list[Table | str]:
    quality, cost, speed, classes = [], [], [], []
    for d in documents:
        test, price, teacher = d["test"], d["cost"], d.get("teacher", {})
        name = d["run"].partition("/")[2]
        follows = [_rate(teacher["agreement"], 1), f"{teacher['kl_from_teacher']:.4f}"] if teacher else ["", ""]
        quality.append([name, str(test["errors"]), *(f"{d[key]:.4f}" for key in ("nll", "brier", "ece")), *follows])
        kept = ""
        if teacher and teacher["accuracy_kept"]:
            kept = f"{100 * teacher['accuracy_kept']:.2f} % at {100 * teacher['multiply_adds_kept']:.2g} %"
        cost.append([name, *(f"{price[k]:,}" for k in ("parameters", "multiply_adds", "weight_bytes")), kept])
        latencies = [f"{price['latency_ms'][n][q]:.3f}" for n in ("1", "128") for q in ("p50", "p95")]
        speed.append([name, *latencies, f"{price['latency_ms']['128']['images_per_s']:,}"])
        classes.append([name, *map(str, test["per_class_errors"])])
    first, digits = documents[0], [str(c) for c in range(CLASSES)]
    result: list[Table | str] = [
        Table(
            f"{first['experiment']}: errors on {_on(first)}; agreement with and KL from the teacher",
            ("run", "errors", "NLL", "Brier", "ECE", "agrees", "KL"),
            quality,
        ),
        Table(
            "Cost of one image; accuracy kept of the teacher's, at which share of its multiply-adds",
            ("run", "parameters", "mult-adds", "bytes", "kept"),
            cost,
        ),
        Table(
            f"Milliseconds a batch of 1 and of 128 on this machine ({first['measured_on']})",
            ("run", "1: p50", "p95", "128: p50", "p95", "images/s"),
            speed,
        ),
        Table("Errors per class", ("run", *digits), classes),
    ]
    if len(documents) > MATRICES:
        return [*result, "Confusion matrices: with --json, or for a few runs named with --run."]
    for d in documents:
        rows = [[str(label), *map(str, counts)] for label, counts in enumerate(d["confusion"])]
        result.append(Table(f"{d['run']}\nimages by label (row) and prediction (column)", ("", *digits), rows))
    return result


# The whole experiment.


def summary(
    experiment: Experiment, points: Sequence[Key], documents: Sequence[Sequence[Document]], evaluation: Document
) -> Document:
    """The document of `kd run`: a row for each thing the experiment compares, the verdict, and the runs; for a grid,
    those of each of its points."""
    scores = {e["run"]: e for e in evaluation["runs"]}
    only_ensembles = bool(experiment.grid) and all(key.startswith("ensemble.") for key in experiment.grid)
    # the student that varies
    judged = "student of ensemble" if only_ensembles and "student of ensemble" in experiment.rows else "student"
    tables = [_summary(experiment, found, scores, judged) for found in documents]
    first = documents[0][0]
    head = {
        "experiment": experiment.name,
        "seeds": experiment.seed,
        "evaluated_on": _on(first),
        "total": first["test"]["total"],
    }
    if not experiment.grid:
        return head | tables[0]
    at = [dict(zip(experiment.grid, values, strict=True)) for values in points]
    head |= {"grid": list(experiment.grid), "judged": judged}
    return head | {"points": [{"at": a} | t for a, t in zip(at, tables, strict=True)]}


def _summary(
    experiment: Experiment, documents: Sequence[Document], scores: dict[str, Document], judged: str
) -> Document:
    rows = []
    for name in experiment.rows:
        found = [d for d in documents if d["row"] == name]
        if found:
            rows.append(_row(experiment, name, found, [d["test"] for d in found], [scores[d["run"]] for d in found]))
        for bias in found[0].get("bias", {}) if found else ():
            rows.append(_row(experiment, f"{name}, {bias} bias", found, [d["bias"][bias] for d in found], []))
    compared = [d for d in documents if d["row"] == judged and "baseline" in d]
    return {"table": rows, "runs": list(documents)} | ({"verdict": verdict(compared)._asdict()} if compared else {})


def _row(
    experiment: Experiment,
    name: str,
    documents: Sequence[Document],
    counted: Sequence[Document],
    scores: Sequence[Document],
) -> Document:
    errors, unseen = [c["errors"] for c in counted], documents[0].get("omitted", [])
    row: Document = {"row": name, "n": len(errors)} | spread(errors)
    if unseen:
        row["unseen"] = statistics.mean(sum(c["per_class_errors"][k] for k in unseen) for c in counted)
    if "last_epoch" in documents[0]:
        row["train_errors"] = statistics.mean(d["last_epoch"]["train_errors"] for d in documents)
        row["samples"] = documents[0]["samples"]
    for key in ("nll", "ece") if scores else ():
        row[key] = statistics.mean(s[key] for s in scores)
    if scores:
        row["multiply_adds"] = scores[0]["cost"]["multiply_adds"]
    if name in experiment.expect:
        row |= {"expect": experiment.expect[name], "met": row["mean"] <= experiment.expect[name]}
    if name in experiment.paper:
        paper = experiment.paper[name]
        row["paper"] = paper
        row["against_paper"] = _against(row["paper"][0], row["mean"], row["interval"])
    return row


def _against(paper: float, mean: float, interval: tuple[float, float] | None) -> str:
    """better or worse where the interval of the mean leaves the paper's one run out; of one seed lower or higher."""
    low, high = interval or (mean, mean)
    if low <= paper <= high:
        return "equal"
    word = ("better", "worse") if interval else ("lower", "higher")
    return word[0] if mean < paper else word[1]


def final_table(document: Document) -> Table:
    """The one table that `kd run` ends with."""
    seeds = document["seeds"]
    over = f"mean ± std over {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    title = f"{document['file']}: errors on {document['evaluated_on']}, {over}"
    columns, rows = _grid_rows(document) if "grid" in document else _rows(document)
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    return Table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _rows(document: Document) -> tuple[list[str], list[list[str]]]:
    rows = []
    for r in document["table"]:
        paper = [f"{value:g}" for value in r.get("paper", [])]
        paper_shown = f"{paper[0]} ({paper[1]})" if len(paper) > 1 else "".join(paper)
        unseen = f"{r['unseen']:.1f}" if "unseen" in r else ""
        rate = _rate(r["mean"], document["total"])
        rows.append([r["row"], _spread(r), rate, unseen, paper_shown, r.get("against_paper", "")])
    return ["", "errors", "rate", "unseen", "paper", "verdict"], rows


def _spread(row: Document) -> str:
    if row["std"] is None:
        return f"{row['mean']:g}"
    return f"{row['mean']:.1f} ± {row['std']:.1f}"


def _grid_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """A row a point and a column for each net whose errors vary; `train error` is the rate on the transfer set, shown
    where that is a part of the training images."""
    varying = [name for name in GRID_ROWS if name == document["judged"] or len(_at_points(document, name)) > 1]
    tables = [{r["row"]: r for r in point["table"]} for point in document["points"]]
    part = any(nets["baseline"]["samples"] < nets["teacher"]["samples"] for nets in tables)
    rows = []
    for point, nets in zip(document["points"], tables, strict=True):
        cells = [_spread(nets[name]) if name in nets else "" for name in varying]
        trained = [100 * nets[name]["train_errors"] / nets[name]["samples"] for name in ("baseline", "student") if part]
        train = ["{:.2f}, {:.2f} %".format(*trained)] if part else []
        found = Verdict(**point["verdict"])
        rows.append([*point["at"].values(), *cells, *train, _fewer(found), found.verdict])
    keys = [key.rpartition(".")[2] for key in document["grid"]]
    return [*keys, *varying, *(["train error"] if part else []), "fewer", "verdict"], rows


def _fewer(found: Verdict) -> str:
    if found.interval is None:
        return f"{found.fewer_errors:g}"
    numbers = [found.fewer_errors, *found.interval]
    mean, low, high = (f"{number:.{0 if max(map(abs, numbers)) >= 100 else 1}f}" for number in numbers)
    return f"{mean} ({low} to {high})"


def _at_points(document: Document, name: str) -> list[str]:
    """The different errors that a row has at the points of a grid."""
    found = [_spread(r) for point in document["points"] for r in point["table"] if r["row"] == name]
    return list(dict.fromkeys(found))


def remarks(document: Document) -> list[str]:
    """The verdict, and what the reader of the table must know."""
    if "grid" in document:
        same = {name: _at_points(document, name) for name in GRID_ROWS if name != document["judged"]}
        constant = [f"{name} {found[0]}" for name, found in same.items() if len(found) == 1]
        return (
            [_headline(document)]
            + [f"The same at every point: {', '.join(constant)}."] * bool(constant)
            + _grid_legend(document)
        )
    if "verdict" in document:
        lines = [Verdict(**document["verdict"]).sentence()]
    else:  # the report of a run with nothing to hold it against
        own = document["runs"][-1]
        errors, total = own["test"]["errors"], own["test"]["total"]
        lines = [f"The {called(own['row'])} makes {errors} errors on {_on(own)}, {_rate(errors, total)}."]
        if "bias" in own:
            lines[0] += f" With the bias chosen on held-out images: {own['bias']['heldout']['errors']}."
    against = {row.get("against_paper") for row in document["table"]}
    if against != {None}:
        single = "; of a single net lower or higher" if against & {"lower", "higher"} else ""
        lines.append(PAPER_LEGEND.format(single=single))
    if any("unseen" in row for row in document["table"]):
        brackets = (
            "; in brackets, the paper's" if any(len(row.get("paper", [])) > 1 for row in document["table"]) else ""
        )
        lines.append(f"Unseen: the errors on classes missing from the transfer set{brackets}.")
    return lines + [BIAS_LEGEND] * any("bias" in d for d in document["runs"])


def called(row: str) -> str:
    """A row's net in a sentence: omit 3 is a student."""
    return f"student ({row})" if row.startswith(("omit ", "keep ")) else row


def _at(point: Document) -> str:
    return ", ".join(f"{key} = {value}" for key, value in point["at"].items())


def _grid_legend(document: Document) -> list[str]:
    tests = dict.fromkeys(point["verdict"]["test"] for point in document["points"])
    interval = f". {INTERVAL_LEGEND}" if len(document["seeds"]) > 1 else "."
    train = "Train error: the baseline's and the student's error rate on the transfer set in the last epoch."
    return [train] * ("train error" in _grid_rows(document)[0]) + [
        f"Fewer: how many errors fewer than the baseline's the {document['judged']}'s are{interval} Verdict: by "
        f"{' or '.join(tests)} at p < 0.05, each point on its own: where nothing helps, one in twenty says otherwise."
    ]


def _headline(document: Document) -> str:
    """Of a grid: at how many points the soft targets helped, and where the student did best."""
    points, judged = document["points"], document["judged"]
    words = [point["verdict"]["verdict"] for point in points]
    students = [next(r for r in point["table"] if r["row"] == judged) for point in points]
    best, point = min(zip(students, points, strict=True), key=lambda pair: pair[0]["mean"])
    counted = [
        f"{said} at {words.count(word)}" for word, said in (("helped", "helped"), ("hurt", "hurt")) if word in words
    ]
    said = " and ".join(counted) or "neither helped nor hurt, as far as this shows, at any"
    seeds = "" if len(document["seeds"]) > 1 else ", on this one seed"
    return (
        f"The soft targets {said} of {len(points)} points{seeds}. "
        f"The fewest errors of a {judged}, {_spread(best)}, are at {_at(point)}."
    )


def missed(document: Document) -> list[str]:
    """The expectations that were not met, a line each."""
    tables = [point["table"] for point in document.get("points", [document])]
    return [
        f"expect.{row['row']}: {row['mean']:.1f} errors, not {row['expect']:g} or fewer"
        for table in tables
        for row in table
        if not row.get("met", True)
    ]


def markdown(document: Document, pictures: Sequence[str]) -> str:
    """The report of `kd run` as Markdown."""
    text = [f"# {document['file']}", final_table(document).markdown(), *remarks(document), made(document)]
    return "\n\n".join([*text, *(f"![{name}]({name})" for name in pictures)]) + "\n"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.{0 if seconds > 600 else 1}f} minutes"


def made(document: Document) -> str:
    """How, where and by what the runs were made."""
    m = document["made"]
    return (
        f"`{m['command_line']}`; commit {', '.join(m['commits'])}; {', '.join(m['devices'])}, {m['versions']}, "
        f"{m['date']}; {_duration(m['seconds'])} of training in all."
    )
