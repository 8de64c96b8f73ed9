"""What a person sees in the terminal and in Markdown: progress, tables, the verdict. Reads results, trains nothing."""

import math
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from kdcli import counted
from kdcli.config import LOSSES, STANDARDIZE, bias_row
from kdcli.evidence import verdict
from kdcli.evidence.verdict import Spread, Verdict, against
from kdcli.runs.spec import Correction, Counted, Epoch
from kdcli.runs.survey import Listed

if TYPE_CHECKING:  # they need torch, which `kd runs` does without
    from kdcli import plan
    from kdcli.evidence import compare, results
    from kdcli.evidence.results import Document, Summary
    from kdcli.use import predict

Parts = Iterator["Table | str"]  # what is printed, one below the other
WIDE = 12  # of more classes than these none has a column of its own
WORST = 3  # of the pairs that are taken for each other most are shown in the terminal
TOGETHER = "\N{NO-BREAK SPACE}"  # in place of a space at which a cell is not broken
UNLIKE = 0.99  # where so many of the test images are nearer to the training images, an image is unlike these
PAIRS = 20  # of classes that are taken for each other, or look alike, are shown instead of a matrix
GRID_ROWS = ("teacher", "ensemble", "baseline", "student", "student of ensemble")  # what the table of a grid shows
INTERVALS = "Intervals are t-intervals of the mean over seeds; they do not cover the sampling of the test set."
LEGENDS = {  # by column
    "unseen": "Unseen: errors on classes missing from the transfer set. Bias: a number added to the logits of these "
    "classes alone, chosen on the test set, as in the paper (test); on held-out (validation) images, which are not in "
    "the transfer set (heldout); or on the training images without their labels, from the known shares of the classes "
    "(prior).",
    "paper": "The verdict compares our seeds with the paper's single run (in brackets, its errors on unseen classes): "
    "better or worse if the 95 % interval of our mean excludes it, else not distinguishable; a single net is lower, "
    f"higher or the same. {INTERVALS}",
    "train error": "Train error: the baseline's and the student's error rate on the transfer set in the last epoch.",
    "fewer": f"Fewer: how many fewer errors than the baseline such a student makes. {INTERVALS} Verdict: by a paired "
    "t-test over seeds (a sign test if all differences are equal, McNemar's test for one seed) at p < 0.05.",
    "than the first": "Than the first: how many fewer errors than the student at the first point, tested likewise.",
    "p": "Corrected p (in tables, in brackets): for all comparisons, by Holm's procedure. Verdicts rest on it: if none "
    "had an effect, the chance of any such verdict is at most 5 %. Intervals are not corrected.",
}


class Display:
    """Progress on stderr: a line a run when it ends, on a terminal a bar until then, elsewhere a line a minute."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self.console, self.quiet, self.verbose = Console(stderr=True), quiet, verbose
        columns = ("{task.description}", BarColumn(6), "{task.fields[text]}", TimeRemainingColumn())
        self.bars = Progress(*columns, console=self.console)
        self.tasks: dict[str, TaskID] = {}
        self.tested: dict[str, Epoch] = {}  # of each run the last one after which errors were counted
        self.printed, self.noted = time.monotonic(), set[str]()

    def epoch(self, run: str, epochs: int, epoch: Epoch) -> None:
        """Show one finished epoch out of `epochs`."""
        if self.quiet:
            return
        last, done = epoch.epoch == epochs, f"{epoch.epoch}/{epochs}"
        if epoch.test_errors is not None:
            self.tested[run] = epoch
        tested = self.tested.get(run)
        errors = f"{tested.test_errors} errors" if tested else "not tested"
        loss = f"loss {epoch.loss:.3g}" if epoch.t2_kl is None else f"T²KL {epoch.t2_kl:.3g}"
        loss = loss if epoch.soft is None else f"soft {epoch.soft:.3g}"
        if self.console.is_terminal:  # the same in 80 columns, beside the bar and the time left
            short = f"{done} {loss} {errors} {epoch.images_per_s / 1000:.1f}k images/s"
            if run not in self.tasks:
                self.tasks[run] = self.bars.add_task(run.partition("/")[2][:-7], total=epochs, text=short)
                self.bars.start()
            self.bars.update(self.tasks[run], completed=epoch.epoch, text=short, visible=not last)
        due = not self.console.is_terminal and time.monotonic() - self.printed > 60
        if last or due or self.verbose:
            self.printed = time.monotonic()
            after = f" after epoch {tested.epoch}" if tested and tested != epoch else ""
            speed = f"{epoch.seconds:.1f} s, {epoch.images_per_s:,} images/s"
            self.note(f"{run}: epoch {done}, {loss}, {errors}{after}, {speed}")

    def note(self, *lines: str) -> None:
        for line in lines:
            self.noted.add(line)
            say(self.console, line)

    def close(self) -> None:
        if self.bars.live.is_started:
            self.bars.stop()


def say(console: Console, line: str) -> None:
    """Print a line, on a terminal broken between words; not where it holds a command or a long path, to be copied."""
    long = max(map(cell_len, line.split()), default=0) > console.width
    whole = long or " kd " in f" {line}" or not console.is_terminal
    console.print(line, highlight=False, markup=False, soft_wrap=whole)


class Table(NamedTuple):
    """A table before it is printed or written: cells are text; the first column is on the left, others on the right.
    The first `keys` columns say what a row is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1

    def markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (self.columns, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in lines)])

    def _repr_markdown_(self) -> str:
        """How a notebook shows it."""
        return self.markdown()

    def legends(self) -> list[str]:
        return [LEGENDS[column] for column in self.columns if column in LEGENDS]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Words stay whole: columns for which there is no room follow below, beside the keys once more."""
        columns = list(zip(self.columns, *self.rows, strict=True))
        least = [max((cell_len(word) for cell in cells for word in cell.split(" ")), default=1) for cells in columns]
        while len(columns) > self.keys + 1 and sum(least[: len(columns)]) + 2 * len(columns) > options.max_width:
            columns.pop()
        widths = [max(map(cell_len, column)) for column in columns]
        room = options.max_width - 2 * len(columns)  # without what is between them
        while sum(widths) > room and (wide := [i for i, width in enumerate(widths) if width > least[i]]):
            widths[max(wide, key=widths.__getitem__)] -= 1
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for i, width in enumerate(widths):
            if wraps := width < max(map(cell_len, columns[i])):  # lines of prose begin on the left
                columns[i] = tuple(textwrap.fill(cell, width, break_long_words=False) for cell in columns[i])
            side: Literal["left", "right"] = "right" if i and not wraps else "left"
            table.add_column(Text(columns[i][0]), justify=side, overflow="fold", width=width)
        for row in zip(*(column[1:] for column in columns), strict=True):
            table.add_row(*(Text(cell.replace(TOGETHER, " ")) for cell in row))
        if self.title:
            yield Text(self.title, style="bold", no_wrap=False, overflow="fold")
        yield table
        if rest := len(self.columns) - len(columns):
            head, *rows = [[*cells[: self.keys], *cells[-rest:]] for cells in (self.columns, *self.rows)]
            yield Table("", head, rows, self.keys)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns that would be empty."""
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    return Table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def tables(command: str, documents: Sequence["Document"], classes: Sequence[str]) -> Parts:
    """What a training command has to show for its runs; of the runs that those are made from, the warnings alone."""
    from kdcli.evidence.results import verdict

    mine = [d for d in documents if d.command == command]
    rows = [row for d in mine for row in _lines(d, classes)]
    if len(mine) > 1 and len({d.row for d in mine}) == 1:
        counts = {"teacher": [d.teacher.errors for d in mine if d.teacher], "errors": [d.test.errors for d in mine]}
        counts["baseline"] = [d.baseline.errors for d in mine if d.baseline]
        rows.append({"run": "mean"} | {key: number(statistics.mean(of), len(of)) for key, of in counts.items() if of})
    columns = ["run", "teacher", "baseline", "errors", "rate", "fewer than the best", "than the mean", "bias", "unseen"]
    shown = table(f"Errors on {mine[0].on}", columns, [[row.get(key, "") for key in columns] for row in rows])
    yield shown
    if found := verdict(mine):
        yield found.sentence()
    yield from (*shown.legends(), *notes(documents))


def _lines(d: "Document", classes: Sequence[str]) -> Iterator[dict[str, str]]:
    """A run; the members of an ensemble before it, and after it both averages, or the bias corrections."""
    yield from ({"run": member.run, "errors": str(member.errors)} for member in d.members)
    stages: dict[str, Counted | Correction] = {d.run: d.test}
    stages |= {f"{how} average": counted for how, counted in d.averages.items()}
    stages |= {bias_row(d.row, bias): corrected for bias, corrected in d.bias.items()}
    for name, c in stages.items():
        line = {"run": name, "errors": str(c.errors), "rate": _rate(c.errors, d.test.total)}
        if name == d.run:
            line |= {key: str(of.errors) for key, of in (("teacher", d.teacher), ("baseline", d.baseline)) if of}
        if members := [member.errors for member in d.members]:
            line["fewer than the best"] = f"{min(members) - c.errors:+d}"
            line["than the mean"] = f"{statistics.mean(members) - c.errors:+.1f}"
        if d.omitted:
            line["unseen"] = str(sum(c.per_class_errors[classes.index(name)] for name in d.omitted))
        if isinstance(c, Correction):
            line["bias"] = f"{c.shift:+.2f}"
        yield line


def notes(documents: Sequence["Document"]) -> list[str]:
    """Trainings that learned nothing, nets of several seeds that learn from the same teacher, and how many images that
    nobody labelled students saw."""
    taught = {called(d): [tuple(o.parents) for o in documents if o.row == d.row and o.parents] for d in documents}
    shared = [row for row, teachers in taught.items() if len(teachers) > 1 and len(set(teachers)) == 1]
    hides = "one teacher for all seeds: its interval does not include variation between teachers."
    lines = [f"{d.run}: {line}" for d in documents for line in d.warnings] + [
        f"The {row} has {hides}" for row in shared
    ]
    more = [d for d in documents if d.unlabelled]
    seen = "The {} saw {:,} labelled images and {:,} that only its teacher labels, which no baseline sees."
    lines += dict.fromkeys(seen.format(called(d), d.samples, d.unlabelled) for d in more)
    return [*lines, *["The unlabelled images may include classes left out."][: any(d.omitted for d in more)]]


def _rate(errors: float, total: int) -> str:
    return f"{100 * errors / total:.2f} %"


def number(mean: float, of: int) -> str:
    """A mean of so many whole numbers: whole itself where it is of one."""
    return f"{mean:.{1 if of > 1 else 0}f}"


def spread(row: Spread) -> str:
    return number(row.mean, len(row.errors)) + (f" ± {row.std:.1f}" if row.std is not None else "")


def foremost(weights: Sequence[float], most: int = WIDE) -> list[int]:
    """The classes to show: all; of too many for a column each, the `most` with the greatest weights."""
    order = sorted(range(len(weights)), key=lambda c: -weights[c])
    return order[:most] if len(weights) > WIDE else sorted(order)


def largest(matrix: Sequence[Sequence[float]]) -> list[tuple[int, int, float]]:
    """The largest positive values off the diagonal of a matrix [C, C], largest first: row, column, value."""
    off = [(i, j, v) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v > 0]
    return sorted(off, key=lambda cell: -cell[2])[:PAIRS]


def short(name: str, most: int = 18) -> str:
    """A name without its middle where it is long."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"


def evaluations(documents: Sequence["Document"], classes: Sequence[str], every: bool) -> Parts:
    """What `kd evaluate` shows: the means of each row over its runs, or every run."""
    rows: dict[str, list[Document]] = {}
    for d in documents:
        rows.setdefault(d.run.partition("/")[2] if every else d.row, []).append(d)
    several, scores, costs, by_class, on = len(documents) > len(rows), [], [], [], ""
    for name, of in rows.items():
        quality, taught, cost = [d.quality for d in of], [d.teacher for d in of], of[0].cost
        cells = [str(len(of)) * several, spread(verdict.spread([d.test.errors for d in of]))]
        cells += [_mean(100, "{:.2f} %", [q.balanced for q in quality]), _mean(1, "{:g}", [q.top5 for q in quality])]
        cells += [_mean(1, "{:.4f}", [getattr(q, key) for q in quality]) for key in ("nll", "brier", "ece")]
        follows = {"agreement": "{:.3f}", "kl_from_teacher": "{:.4f}", "soft": "{:.3g}"}
        cells += [_mean(1, form, [getattr(t, key, None) for t in taught]) for key, form in follows.items()]
        scores.append([name, *cells])
        by_class.append([name, *_worst(of, classes)])
        if cost:
            on, times = cost.measured_on, [f"{ms:.3g}" for t in cost.latency_ms.values() for ms in (t.p50, t.p95)]
            costs.append([name, f"{cost.parameters:,}", f"{cost.multiply_adds:,}", *times])
    title = f"{documents[0].experiment}: errors on {documents[0].on}; agreement with and KL from the teacher"
    title += ", and the loss (soft)" if any(row[-1] for row in scores) else ""
    title += "; means over n runs" if several else ""
    first = "run" if every else ""
    columns = (first, "n", "errors", "balanced", "top-5", "NLL", "Brier", "ECE", "agrees", "KL", "soft")
    yield table(title, columns, scores)
    title = f"Cost per image, and milliseconds for a batch of 1 and of 128 on this machine ({on})"
    if costs:  # of nets of torch's alone
        yield table(title, (first, "params", "mult-adds", "1: p50", "p95", "128: p50", "p95"), costs)
    where = (first, "errors by class, most first", "most frequent confusions")
    yield Table("Where the errors are", where, by_class)


def _mean(scale: float, form: str, values: Sequence[float | None]) -> str:
    """The mean of values that are all there; else empty."""
    there = [value for value in values if value is not None]
    return form.format(scale * statistics.mean(there)) if len(there) == len(values) else ""


def _worst(documents: Sequence["Document"], classes: Sequence[str]) -> list[str]:
    """The classes with the most errors, and the pairs of label and prediction, each with their mean number."""
    n, matrices = len(documents), [d.quality.confusion for d in documents]
    errors = [sum(of) / n for of in zip(*(d.test.per_class_errors for d in documents), strict=True)]
    pairs = largest([[sum(cell) / n for cell in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)])
    first = sorted((c for c in range(len(classes)) if errors[c]), key=lambda c: -errors[c])[:WIDE]
    said = [f"{short(classes[c])}: {number(errors[c], n)}" for c in first]
    taken = [f"{short(classes[i])} → {short(classes[j])}: {number(k, n)}" for i, j, k in pairs[:WORST]]
    return [", ".join(part.replace(" ", TOGETHER) for part in parts) for parts in (said, taken)]


def planned(runs: Sequence["plan.Planned"]) -> Table:
    """What `--dry-run` shows of the runs of a command."""
    sizes = [(f"{p.parameters:,}", f"{p.steps:,}") if p.parameters else ("", "") for p in runs]
    rows = [[p.run, p.row, *size, p.status] for p, size in zip(runs, sizes, strict=True)]
    there = sum(p.status == "completed" for p in runs)
    title = f"{counted(len(runs), 'run')}, of which {there} {'is' if there == 1 else 'are'} completed"
    return Table(title, ("run", "row", "parameters", "steps", "status"), rows)


def runs_table(listed: Sequence[Listed]) -> Table:
    """What `kd runs` shows."""
    rows = []
    for d in listed:
        done = f" {d.epoch}/{d.epochs}" if d.status != "completed" and d.epoch else ""
        errors = "" if d.errors is None else str(d.errors)
        rows.append([d.run, d.status + done, errors, duration(d.age_s), decimal(d.bytes)])
    return Table(counted(len(listed), "run"), ("run", "status", "errors", "age", "size"), rows)


def duration(seconds: float) -> str:
    """Seconds for a reader: `40 s`, `12 min`, `3 h 10 min`, `2.1 days`."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 2 * 24 * 60 else f"{minutes / 1440:.1f} days"


def compare_tables(document: "compare.Comparisons") -> Parts:
    """What `kd compare` shows: the groups, and of each the settings that differ from A's and the verdict against A."""
    first, rows, seeds = document.groups[0], [], {g.group: g.seeds for g in document.groups}
    for g in document.groups:
        interval = "{:.1f} to {:.1f}".format(*g.interval) if g.interval else ""
        rows.append([g.group, g.name, str(len(g.errors)), spread(g), interval])
    title = f"Errors on {document.total:,} {document.evaluated_on}"
    yield Table(title, ("", "runs", "n", "errors", "95 % interval"), rows)
    for c in document.comparisons:
        own, other = c.group, first.group
        changed = "; ".join(f"{key} {_value(b)} ({other}: {_value(a)})" for key, (a, b) in c.changed.items())
        none = "The groups share no seed: nothing to pair, so no verdict."
        said = c.verdict.sentence(own, other) if c.verdict else none
        some = c.seeds and not c.seeds == first.seeds == seeds[own]
        part = f"Seeds in both: {', '.join(map(str, c.seeds))}. " if some else ""
        yield f"{own} differs from {other}: {changed or 'in no setting'}.\n{part}{said}\n"
    several = any(c.verdict and c.verdict.comparisons for c in document.comparisons)
    yield f"{INTERVALS} {LEGENDS['p']}" if several else INTERVALS


def _value(value: Any) -> str:
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={_value(v)}" for key, v in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def losses() -> Parts:
    """What `kd losses` shows."""
    columns, rows = ("T", "alpha", "beta", "gamma", "lambda1", "lambda2", "warmup"), []
    for name, loss in (*LOSSES.items(), ("standardize", STANDARDIZE)):
        numbers = {"T": loss.T, "lambda1": loss.lambda1, "lambda2": loss.lambda2, "warmup": loss.warmup or None}
        numbers |= loss.parameters
        rows.append([name, *("" if numbers.get(c) is None else f"{numbers[c]:g}" for c in columns)])
        yield f"{name}: {loss.formula} ({loss.source})"
    yield "\np, q: the teacher's and the student's softmax, softened by T; y: the label; a hat: without y."
    yield "The soft term is the mean over the samples of a batch, times lambda1.\n"
    yield Table("Their authors' settings", ("", *columns), rows)


def predictions(document: "predict.Predictions", top: int) -> Parts:
    """What `kd predict` shows: of each image the likeliest classes, a column a net and temperature, with bars."""
    names = document.classes
    for image in document.images:
        views, order = image.views, sorted(range(len(names)), key=lambda c: -image.views[0].p[c])
        best = {max(order, key=view.p.__getitem__) for view in views}  # of every view, its first class is shown
        shown = [c for i, c in enumerate(order) if i < top or c in best]
        rows = [[f"{names[c]}{' *' if names[c] == image.label else ''}", *(_bar(v.p[c]) for v in views)] for c in shown]
        columns = ["class", *(f"{v.net}, T = {v.T:g}" if len(views) > 1 else "probability" for v in views)]
        label = f", the label is {image.label} (*)" if image.label is not None else ""
        yield Table(f"{image.image}: {names[order[0]]}{label}{_likeness(image.nearer)}", columns, rows)


def _likeness(nearer: float | None) -> str:
    """How far an image is from the training images, by the share of test images that are nearer."""
    if nearer is None:
        return ""
    if nearer < UNLIKE:
        return f" ({100 * nearer:.0f} % of the test images lie closer to the training set)"
    few = "no test image is" if nearer == 1 else f"only {100 - 100 * nearer:.1g} % of the test images are"
    return f", but it is unlike the training images: {few} as far from them"


def _bar(p: float) -> str:
    blocks = "█" * int(p * 6) + "▏▎▍▌▋▊▉█"[int(p * 48) % 8]
    return f"{blocks if p >= 1 / 96 else ''} {p:.4f}"


def final_table(summary: "Summary") -> Table:
    """The one table that `kd run` ends with: without the columns that would be empty."""
    over = f"mean ± std over {len(summary.seeds)} seeds" if len(summary.seeds) > 1 else f"seed {summary.seeds[0]}"
    title = f"{summary.file}: errors on {summary.evaluated_on}, {over}"
    shown = table(title, *(_grid_rows(summary) if summary.grid else _rows(summary)))
    return shown._replace(keys=max(len(summary.grid), 1))


def _rows(summary: "Summary") -> tuple[list[str], list[list[str]]]:
    rows = []
    for r in summary.only.table:
        unseen, top5 = ("" if mean is None else number(mean, len(r.errors)) for mean in (r.unseen, r.top5))
        paper = ("", "{:g}", "{:g} ({:g})")[len(r.paper)].format(*r.paper)
        verdict = against(r.paper[0], r.mean, r.interval) if r.paper else ""
        balanced = "" if r.balanced is None else _rate(r.balanced, 1)
        rows.append([r.row, spread(r), _rate(r.mean, summary.total), balanced, top5, unseen, paper, verdict])
    return ["", "errors", "rate", "balanced", "top-5", "unseen", "paper", "verdict"], rows


def _grid_rows(summary: "Summary") -> tuple[list[str], list[list[str]]]:
    """A row a point and a column for each net whose errors vary; `train error` is the rate on the transfer set, shown
    where that is a part of the training images."""
    found, fixed = [{r.row: r for r in point.table} for point in summary.points], _fixed(summary)
    part = any((nets["baseline"].samples or 0) < (nets["teacher"].samples or 0) for nets in found if "teacher" in nets)
    rows = []
    for point, nets in zip(summary.points, found, strict=True):
        cells = [spread(nets[name]) if name in nets and name not in fixed else "" for name in GRID_ROWS]
        pair = nets["baseline"], nets["student"]
        rates = ", ".join(f"{100 * (net.train_errors or 0) / (net.samples or 1):.2f}" for net in pair)
        said = [*_judged(point.verdict), *_judged(point.than_first)]
        rows.append([*point.at.values(), *cells, f"{rates} %" if part else "", *said])
    verdicts = ["fewer", "p", "verdict", "than the first", "p ", "verdict "]
    return [*headings(summary.grid), *GRID_ROWS, "train error", *verdicts], rows


def headings(grid: Sequence[str]) -> list[str]:
    """The keys of a grid by their last part, unless two of them share it."""
    last = [key.rpartition(".")[2] for key in grid]
    return last if len({*last}) == len(last) else [*grid]


def _judged(v: Verdict | None) -> list[str]:
    return [_fewer(v), f"{v.p:.2g} ({v.p_corrected:.2g})" if v.comparisons else "", v.verdict] if v else [""] * 3


def _fewer(found: Verdict) -> str:
    if found.interval is None:
        return f"{found.fewer_errors:g}"
    numbers = (found.fewer_errors, *found.interval)
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*numbers, d=0 if max(map(abs, numbers)) >= 100 else 1)


def _fixed(summary: "Summary") -> dict[str, str]:
    """The errors of the nets that have the same at every point of a grid, but for those that it is about."""
    rows = [row for point in summary.points for row in point.table]
    found = {name: [spread(row) for row in rows if row.row == name] for name in GRID_ROWS if name != summary.judged}
    return {name: e[0] for name, e in found.items() if len(e) == len(summary.points) and len({*e}) == 1}


def remarks(summary: "Summary") -> list[str]:
    """The verdict, and what the reader of the table must know."""
    said = _grid_verdict(summary) if summary.grid else _verdict(summary)
    lines = [*said, *final_table(summary).legends(), *summary.remarks]
    for point in summary.points:
        lines += notes([d for d in point.runs if not isinstance(d, str)])
    return list(dict.fromkeys(lines))


def _grid_verdict(summary: "Summary") -> Iterator[str]:
    points, judged, one = summary.points, summary.judged, len(summary.seeds) == 1
    students = [(row, point.at) for point in points for row in point.table if row.row == judged]
    best, at = min(students, key=lambda pair: pair[0].mean)
    fewest = f"A {judged} makes the fewest errors, {spread(best)}{_at(at)}."
    said = _counted([point.verdict for point in points if point.verdict])
    yield f"The soft targets {said}{', on this one seed' if one else ''}. {fewest}"
    if others := [point.than_first for point in points if point.than_first]:
        yield f"Compared with the first point, {' '.join(points[0].at.values())}, the others {_counted(others)}."
    if same := [" ".join(pair) for pair in _fixed(summary).items()]:
        yield f"The same at every point: {', '.join(same)}."


def _at(point: dict[str, str]) -> str:
    """Which point of a grid is meant; empty without one."""
    return f", at {', '.join(f'{key} = {value}' for key, value in point.items())}" if point else ""


def _counted(verdicts: Sequence[Verdict]) -> str:
    words, n = [v.verdict for v in verdicts], len(verdicts)
    counted = [f"{word} at {words.count(word)}" for word in ("helped", "hurt") if word in words]
    said = " and ".join(counted) or "neither helped nor hurt, as far as can be told, at any"
    return f"{said} of {n} points{f', corrected for {n} comparisons' if n > 1 else ''}"


def _verdict(summary: "Summary") -> Iterator[str]:
    own, means = summary.only.runs[-1], {row.row: row.mean for row in summary.only.table}
    if summary.only.verdict:
        yield summary.only.verdict.sentence()
    elif not isinstance(own, str):  # the report of a run with nothing to hold it against
        bias = f" With the bias chosen on held-out images: {own.bias['heldout'].errors}." if own.bias else ""
        rate = _rate(own.test.errors, own.test.total)
        yield f"The {called(own)} makes {own.test.errors} errors on {own.on}, {rate}.{bias}"
    if means.get("teacher", -1) >= means.get("baseline", math.inf):
        yield (
            "The teacher makes no fewer errors than the baseline: it has little to teach. Take one that was trained "
            "longer, or a larger net."
        )


def called(row: "results.TableRow | Document") -> str:
    """A row's net in a sentence: omit 3 is a student."""
    return f"student ({row.row})" if row.kind == "omission" else row.row


def missed(summary: "Summary") -> list[str]:
    """The expectations that were not met, a line each."""
    rows = [(row, row.expect, point.at) for point in summary.points for row in point.table if row.expect is not None]
    uncounted = summary.expect.keys() - {row.row for row, *_ in rows}
    return [f"expect.{row}: its errors are not counted" for row in summary.expect if row in uncounted] + [
        f"expect.{row.row}: {number(row.mean, len(row.errors))} errors{_at(at)}, not {most:g} or fewer"
        for row, most, at in rows
        if row.mean > most
    ]


def markdown(summary: "Summary", pictures: Sequence[str]) -> str:
    """The report of `kd run` as Markdown."""
    text = [f"# {summary.file}", final_table(summary).markdown(), *remarks(summary), made(summary)]
    return "\n\n".join([*text, *(f"![{name}]({name})" for name in pictures)]) + "\n"


def made(summary: "Summary") -> str:
    """How, where and by what the runs were made."""
    m, minutes = summary.made, summary.made.seconds / 60
    spent = f"{m.seconds:.0f} seconds" if minutes < 1 else f"{minutes:.{0 if minutes > 10 else 1}f} minutes"
    commits, devices, torch, python = map(", ".join, (m.git_commit, m.device, m.torch, m.python))
    how = f"`{m.command_line}`; commit {commits}; {devices}, {m.cores} cores, torch {torch}, Python {python}, {m.date}"
    return f"{how}; {spent} of training in all."
