"""The pictures of a report, drawn with matplotlib: PNG, by file name."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, SymmetricalLogLocator
from torch import Tensor
from torch.nn import functional as F

from kdcli.findings import Findings, pixels
from kdcli.results import Summary
from kdcli.score import calibration
from kdcli.show import foremost, short, spread

TELLING, LIKELIEST = 4, 8  # images whose soft targets are drawn; of many classes, the bars of each
BLUE, ORANGE = "#3182bd", "#e6550d"
COLOURS = {
    "teacher": "#636363",
    "ensemble": "#969696",
    "baseline": ORANGE,
    "ensemble of baselines": "#fdae6b",
    "student": BLUE,
    "student of ensemble": "#756bb1",
}
STYLE: dict[Any, object] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $x$
}


def pictures(found: Findings | Summary) -> dict[str, bytes]:
    """The pictures of an experiment without a grid, or of a run; the one picture of a grid."""
    if isinstance(found, Summary):
        return {"grid.png": _png(_draw_grid, found)}
    table = found.summary.only.table
    wanted: dict[str, tuple[object, Callable[[Figure, Findings], None]]] = {
        "errors.png": (len(table) > 1, _draw_errors),
        "learning-curves.png": (found.curves, _draw_curves),
        "calibration.png": (True, _draw_calibration),
        "cost.png": (sum(row.kind != "omission" for row in table) > 1, _draw_cost),
        "omitted-classes.png": (found.omissions, _draw_omissions),
        "dark-knowledge.png": (found.knowledge, _draw_knowledge),
    }
    return {name: _png(draw, found) for name, (draw_it, draw) in wanted.items() if draw_it}


def _png(draw: Callable[..., None], shown: Summary | Findings) -> bytes:
    """What `draw` draws of what is shown, on a figure that it is given."""
    buffer = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of names in letters that the font lacks
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        draw(figure, shown)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _log_scale(axis: Axis, set_scale: Callable[..., None], at: Sequence[int] = (1, 2, 5)) -> None:
    """A logarithmic axis with numbers at these multiples of the powers of ten, on which 0 has a place."""
    set_scale("symlog", linthresh=1)
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=at))
    axis.set_major_formatter(EngFormatter(sep=""))


def _draw_errors(figure: Figure, found: Findings) -> None:
    """The errors of every row: a dot a seed, a bar for the mean, a diamond for the paper; log scale where far apart."""
    rows, summary, axes = found.summary.only.table[::-1], found.summary, figure.subplots()
    figure.set_figheight(1.5 + 0.42 * len(rows))  # room for a number above every bar
    for i, r in enumerate(rows):
        axes.axhline(i, color="#eeeeee", linewidth=1, zorder=0)
        axes.plot(r.errors, [i] * len(r.errors), "o", color=BLUE, markersize=5, alpha=0.6)
        axes.plot(r.mean, i, "|", color="black", markersize=16, markeredgewidth=2)
        axes.plot(r.paper[:1], [i] * bool(r.paper), "D", color=ORANGE, fillstyle="none", markersize=6)
        axes.annotate(spread(r), (r.mean, i), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=8)
    every = [errors for r in rows for errors in (*r.errors, *r.paper[:1])]
    scale = ", logarithmic scale" if max(every) > 4 * max(min(every), 1) else ""
    paper = "; diamond: the paper's" if any(r.paper for r in rows) else ""
    axes.locator_params(axis="x", integer=True)
    if scale:
        _log_scale(axes.xaxis, axes.set_xscale)
    axes.set_yticks(range(len(rows)), [short(r.row, 40) for r in rows])
    axes.set(xmargin=0.1, ylim=(-0.5, len(rows) - 0.35), title=f"{summary.file}: errors")
    axes.set_xlabel(f"errors on {summary.evaluated_on}{scale}\ndots: seeds; bar: their mean{paper}")
    axes.spines["left"].set_visible(False)


def _draw_grid(figure: Figure, summary: Summary) -> None:
    """Errors at each value of the first key, a colour for each combination of the others (of a grid with one key, for
    each net) and a style for each net; with bars of one standard deviation. Of sections, whose names are long, a line
    each, one below the other."""
    axes, (first, *others), n = figure.subplots(), summary.grid, len(summary.seeds)
    ticks = list(dict.fromkeys(point.at[first] for point in summary.points))
    below = any("=" in tick for tick in ticks)
    lines = [", ".join(f"{key.rpartition('.')[2]} {point.at[key]}" for key in others) for point in summary.points]
    for i, line in enumerate(dict.fromkeys(lines)):
        points = [point for point, its in zip(summary.points, lines, strict=True) if its == line]
        for row, style in (("baseline", "--"), ("student", "-"), ("student of ensemble", "-."), ("ensemble", ":")):
            found = [(ticks.index(p.at[first]), r) for p in points for r in p.table if r.row == row]
            x = [at + 0.04 * (i - (row == "baseline")) for at, _ in found]  # so that no bar hides another
            means, spread = [r.mean for _, r in found], [r.std or 0 for _, r in found]
            colour, label = (f"C{i}", f"{row}, {line}") if line else (COLOURS[row], row)
            if found and below:
                axes.errorbar(means, x, None, spread, style if row == "baseline" else "o", color=colour, label=label)
            elif found:
                axes.errorbar(x, means, spread, None, style, color=colour, label=label)
    if below:
        figure.set_size_inches(10, 2 + 0.25 * len(ticks))
        axes.set_yticks(range(len(ticks)), ticks, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel=f"errors on {summary.evaluated_on}", ylabel=first)
    else:
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel=f"{first} (the values in a row, not to scale)", ylabel=f"errors on {summary.evaluated_on}")
    axes.set_title(f"{summary.file}: " + (f"mean over {n} seeds, ± one std" if n > 1 else "one seed"))
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=3.5)


def _draw_curves(figure: Figure, found: Findings) -> None:
    """Test errors by epoch of teachers, baselines and students, a thin line a seed; an ensemble has none."""
    axes, lines = figure.subplots(), {}
    for row, epochs in found.curves:
        x, y = [e.epoch for e in epochs], [e.test_errors for e in epochs]
        (lines[short(row, 40)],) = axes.plot(x, y, color=COLOURS.get(row, BLUE), linewidth=1, alpha=0.8)
    axes.legend(lines.values(), lines.keys())
    _log_scale(axes.yaxis, axes.set_yscale, (1, 2, 3, 5, 7))
    axes.set(xlabel="epoch", ylabel=f"errors on {found.summary.evaluated_on}, logarithmic scale")
    axes.set_title(f"{found.summary.file}: learning curves, a line a seed")


def _draw_omissions(figure: Figure, found: Findings) -> None:
    """Errors per class of the students that never saw some, before and after the held-out bias; the unseen first."""
    every, classes = figure.subplots(1, len(found.omissions), squeeze=False)[0], found.summary.classes
    for axes, (row, documents) in zip(every, found.omissions.items(), strict=True):
        stages = [d.test for d in documents], [d.bias["heldout"] for d in documents]
        before, after = (np.mean([of.per_class_errors for of in stage], 0) for stage in stages)
        unseen = np.isin(classes, documents[0].omitted)
        shown = foremost((before + after + unseen * (before + after).max()).tolist())
        for at, label, means, colour in ((-0.2, "before", before, "#9ecae1"), (0.2, "heldout bias", after, BLUE)):
            axes.bar(np.arange(len(shown)) + at, means[shown], 0.4, color=colour, label=label)
        names = [short(classes[c]) + "*" * bool(unseen[c]) for c in shown]
        long = max(map(len, names)) > 3  # so turned, that they do not overlap
        axes.set_xticks(range(len(names)), names, ha="right" if long else "center", rotation=60 * long)
        axes.set_xlabel("class" if len(shown) == len(classes) else "unseen and worst classes")
        axes.set(ylabel="errors on its test images", title=short(row, 60 // len(every)))
    labelled = axes.get_legend_handles_labels()
    figure.legend(*labelled, loc="outside lower center", ncols=2, title="*: not in the transfer set")


def _draw_calibration(figure: Figure, found: Findings) -> None:
    """Accuracy against confidence in the bins of the calibration error of at least five images, a line a net."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#bbbbbb", linewidth=1, label="as it says")
    for net in found.nets:
        row, label = net.document.row, f"{short(net.document.row, 40)}, ECE {net.document.quality.ece:.4f}"
        bins = [(x, y) for n, x, y in calibration(net.log_p, found.test.labels) if n >= 5]
        axes.plot([x for x, _ in bins], [y for _, y in bins], "o-", color=COLOURS.get(row, BLUE), label=label)
    axes.set(xlabel="probability of the top class", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend()


def _draw_cost(figure: Figure, found: Findings) -> None:
    axes = figure.subplots()
    for r in found.summary.only.table:
        if r.multiply_adds and r.kind != "omission":
            axes.errorbar(r.multiply_adds, r.mean, r.std or 0, fmt="o", color=COLOURS.get(r.row, BLUE), label=r.row)
    _log_scale(axes.xaxis, axes.set_xscale)
    axes.legend()
    axes.set(xlabel="multiply-adds an image, logarithmic scale", ylabel=f"errors on {found.summary.evaluated_on}")


def _draw_knowledge(figure: Figure, found: Findings) -> None:
    """For each telling image its hard label and the teacher's output at each temperature, for the likeliest classes."""
    labels, known = found.test.labels, found.knowledge
    assert known
    images, temperatures = telling(known.log_p(1), labels), sorted({1.0, 4.0, 20.0, known.T})
    columns = {"hard label": F.one_hot(labels[images], len(found.summary.classes)).double()}
    columns |= {f"T = {T:g}": known.log_p(T)[images].exp() for T in temperatures}
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for k, (left, *panels) in enumerate(grid.tolist()):
        left.imshow(pixels(found.test, images[k]))
        left.axis("off")
        shown = foremost(columns["T = 1"][k].tolist(), LIKELIEST)
        names = [found.summary.classes[c] for c in shown]
        for axes, (title, p) in zip(panels, columns.items(), strict=True):
            shares = p[k, shown].tolist()  # the first at the top, on a scale of their own
            bars = axes.barh(range(len(shares)), shares, color=BLUE)
            axes.bar_label(bars, [f"{p:.3f}" if p >= 0.0005 else "" for p in shares], padding=2, fontsize=5.5)
            named = axes is panels[0] or max(map(len, names)) <= 3  # long names stand at the first bars alone
            axes.set_yticks(range(len(names)), [short(name, 40) * named for name in names])
            axes.tick_params(labelsize=6, length=0)
            axes.set(xlim=(0, 1.35 * (max(shares) or 1)), xticks=[])
            axes.invert_yaxis()
            axes.spines["bottom"].set_visible(False)
            if k == 0:
                axes.set_title(title, fontsize=9)


def telling(log_p: Tensor, labels: Tensor) -> list[int]:
    """The images that a teacher gets right while it hesitates most, at most one a class: log-probabilities [N, C]."""
    entropy = -(log_p.exp() * log_p).sum(1)
    entropy[log_p.argmax(1) != labels] = -1
    best: dict[int, int] = {}
    for i in entropy.argsort(descending=True).tolist():
        best.setdefault(int(labels[i]), i)
    return list(best.values())[:TELLING]
