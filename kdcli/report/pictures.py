"""The pictures of a report, drawn with matplotlib, by file name."""

import io
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context, rcParams
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, SymmetricalLogLocator
from torch import Tensor
from torch.nn import functional as F

from kdcli import counted
from kdcli.evidence.findings import Findings, pixels
from kdcli.evidence.results import Summary
from kdcli.report.show import foremost, headings, short, spread
from kdcli.score import calibration

TELLING, LIKELIEST = 4, 8  # images whose soft targets are drawn; of many classes, the bars of each
BLUE, ORANGE, INK, LINE = "#3182bd", "#e6550d", "#1b1b1b", "#dddddd"
COLOURS = {
    "teacher": INK,
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
    "legend.fontsize": "small",
    "text.parse_math": False,  # a class may be called $x$
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
COLUMN: dict[Any, object] = {
    "font.size": 7,
    "lines.linewidth": 1,
    "lines.markersize": 3,
    "axes.linewidth": 0.6,
}  # in a column of a paper
# An SVG in a page is light or dark as the page is.
LIGHT, DARK = f"*{{--ink:{INK};--line:{LINE}}}", "*{--ink:#e8e6e1;--line:#3a3d42}"


def pictures(found: Findings | Summary, form: str = "png", column: bool = False) -> dict[str, bytes]:
    """The pictures of an experiment without a grid, or of a run; the one picture of a grid. In PNG, SVG or PDF, for a
    page or for a `column` of a paper, some for both of its columns."""
    if isinstance(found, Summary):
        return {f"grid.{form}": _drawn(_draw_grid, found, form, column)}
    table = found.summary.only.table
    wanted: dict[str, tuple[object, Callable[[Figure, Findings], None]]] = {
        "errors": (len(table) > 1, _draw_errors),
        "learning-curves": (found.curves, _draw_curves),
        "calibration": (True, _draw_calibration),
        "cost": (sum(row.kind != "omission" for row in table) > 1, _draw_cost),
        "omitted-classes": (found.omissions, _draw_omissions),
        "dark-knowledge": (found.knowledge, _draw_knowledge),
    }
    drawn = {name: draw for name, (draw_it, draw) in wanted.items() if draw_it}
    return {f"{name}.{form}": _drawn(draw, found, form, column) for name, draw in drawn.items()}


def _drawn(draw: Callable[..., None], shown: Summary | Findings, form: str, column: bool) -> bytes:
    """What `draw` draws of what is shown, on a figure that it is given."""
    buffer, themed = io.BytesIO(), form == "svg" and not column
    wide = draw in (_draw_knowledge, _draw_omissions, _draw_grid)
    width = (7 if wide else 3.35) if column else (8 if wide else 6.4)  # inches
    with rc_context(STYLE | (COLUMN if column else {})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of names in letters that the font lacks
        figure = Figure(figsize=(width, width * (0.56 if wide else 0.6)), dpi=200, layout="constrained")
        draw(figure, shown)
        figure.savefig(buffer, format=form, transparent=themed, metadata={"svg": {"Date": None}}.get(form))
    if not themed:
        return buffer.getvalue()
    text = buffer.getvalue().decode().replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    return text.replace(
        '<style type="text/css">', f'<style type="text/css">{LIGHT}@media(prefers-color-scheme:dark){{{DARK}}}', 1
    ).encode()


def _lines_high(n: float) -> float:
    """Inches of so many lines of 0.1 inches at the usual size of the font."""
    return n * float(rcParams["font.size"]) / 100


def _log_scale(axis: Axis, set_scale: Callable[..., None], at: Sequence[int] = (1, 2, 5)) -> None:
    """A logarithmic axis with numbers at these multiples of the powers of ten, on which 0 has a place."""
    set_scale("symlog", linthresh=1)
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=at))
    axis.set_major_formatter(EngFormatter(sep=""))


def _draw_errors(figure: Figure, found: Findings) -> None:
    """The errors of every row: a dot a seed, a bar for the mean, a diamond for the paper; log scale where far apart."""
    rows, summary, axes = found.summary.only.table[::-1], found.summary, figure.subplots()
    figure.set_figheight(_lines_high(15 + 3.4 * len(rows)))  # room for a number above every bar
    for i, r in enumerate(rows):
        axes.axhline(i, color=LINE, linewidth=1, zorder=0)
        axes.plot(r.errors, [i] * len(r.errors), "o", color=BLUE, alpha=0.6)
        axes.plot(r.mean, i, "|", color=INK, markersize=1.4 * rcParams["font.size"], markeredgewidth=2)
        axes.plot(r.paper[:1], [i] * bool(r.paper), "D", color=ORANGE, fillstyle="none")
        axes.annotate(
            spread(r), (r.mean, i), xytext=(0, 0.9), textcoords="offset fontsize", ha="center", fontsize="small"
        )
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
    names = dict(zip(summary.grid, headings(summary.grid), strict=True))
    lines = [", ".join(f"{names[key]} {point.at[key]}" for key in others) for point in summary.points]
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
        figure.set_figheight(_lines_high(20 + 2.5 * len(ticks)))
        axes.set_yticks(range(len(ticks)), ticks, fontsize="small")
        axes.invert_yaxis()
        axes.set(xlabel=f"errors on {summary.evaluated_on}", ylabel=first)
    else:
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel=f"{first} (the values in a row, not to scale)", ylabel=f"errors on {summary.evaluated_on}")
    axes.set_title(f"{summary.file}: " + (f"mean over {n} seeds, ± one std" if n > 1 else "one seed"))
    figure.legend(loc="outside lower center", ncols=2, handlelength=3.5)


def _draw_curves(figure: Figure, found: Findings) -> None:
    """Test errors by epoch of teachers, baselines and students: the mean over seeds, and a band of one standard
    deviation on either side; an ensemble has none."""
    axes, n = figure.subplots(), len(found.summary.seeds)
    for row in dict.fromkeys(row for row, _ in found.curves):
        curves = [
            {e.epoch: e.test_errors for e in epochs if e.test_errors is not None}
            for own, epochs in found.curves
            if own == row
        ]
        x = sorted(set.intersection(*map(set, curves)))  # an older kd counted them after other epochs
        errors = np.array([[counted[epoch] for epoch in x] for counted in curves])
        mean, colour = errors.mean(0), COLOURS.get(row, BLUE)
        axes.plot(x, mean, color=colour, label=short(row, 40))
        if len(errors) > 1:
            std = errors.std(0, ddof=1)
            axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    axes.legend()
    low, high = axes.dataLim.intervaly
    axes.locator_params(integer=True)
    if far := high > 4 * max(low, 1):
        _log_scale(axes.yaxis, axes.set_yscale, (1, 2, 3, 5, 7))
    axes.set(xlabel="epoch", ylabel=f"errors on {found.summary.evaluated_on}")
    over = f"mean ± one std over {n} seeds" if n > 1 else "learning curves"
    axes.set_title(f"{found.summary.file}: {over}{', log scale' if far else ''}")


def _draw_omissions(figure: Figure, found: Findings) -> None:
    """Errors per class of the students that never saw some, before and after the held-out bias; the unseen first."""
    every, classes = figure.subplots(1, len(found.omissions), squeeze=False)[0], found.summary.classes
    for axes, (row, documents) in zip(every, found.omissions.items(), strict=True):
        stages = [d.test for d in documents], [d.bias["heldout"] for d in documents]
        before, after = (np.mean([of.per_class_errors for of in stage], 0) for stage in stages)
        unseen = np.isin(classes, documents[0].omitted)
        shown = foremost((before + after + unseen * (before + after).max()).tolist())
        for at, label, means, colour in ((-0.2, "without bias", before, "#9ecae1"), (0.2, "heldout bias", after, BLUE)):
            axes.bar(np.arange(len(shown)) + at, means[shown], 0.4, color=colour, label=label)
        names = [short(classes[c]) + "*" * bool(unseen[c]) for c in shown]
        long = max(map(len, names)) > 3  # so turned, that they do not overlap
        axes.set_xticks(range(len(names)), names, ha="right" if long else "center", rotation=60 * long)
        axes.set_xlabel("class" if len(shown) == len(classes) else "unseen and worst classes")
        axes.set(ylabel="errors on its test images", title=short(row, 60 // len(every)))
    labelled = axes.get_legend_handles_labels()
    figure.legend(
        *labelled, loc="outside lower center", ncols=2, title="*: not in the transfer set", title_fontsize="small"
    )


def _draw_calibration(figure: Figure, found: Findings) -> None:
    """Accuracy against confidence over all seeds, a line a net, in the bins of the calibration error that hold at least
    five images a seed; no more of the unit square than they need."""
    axes, least = figure.subplots(), 1.0
    axes.plot([0, 1], [0, 1], "--", color="#999999", linewidth=1, label="calibrated")
    for row, nets in found.over_seeds.items():
        log_p, labels = torch.cat([net.log_p for net in nets]), found.test.labels.repeat(len(nets))
        bins = [(x, y) for n, x, y in calibration(log_p, labels) if n >= 5 * len(nets)]
        label = f"{short(row, 40)}, ECE {statistics.mean(net.document.quality.ece for net in nets):.4f}"
        axes.plot([x for x, _ in bins], [y for _, y in bins], "o-", color=COLOURS.get(row, BLUE), label=label)
        least = min(least, *(at for both in bins for at in both)) if bins else least
    around = least - 0.05 * (1 - least) - 0.005, 1.005 + 0.02 * (1 - least)
    axes.set_title(f"{found.summary.file}: calibration, {counted(len(found.summary.seeds), 'seed')}")
    axes.set(xlabel="confidence (probability of the top class)", ylabel="accuracy", xlim=around, ylim=around)
    axes.legend()


def _draw_cost(figure: Figure, found: Findings) -> None:
    """Errors against multiply-adds, a point a net; those of one size stand side by side."""
    axes, drawn = figure.subplots(), Counter[int]()
    for r in found.summary.only.table:
        if r.multiply_adds and r.kind != "omission":
            at = r.multiply_adds * 1.08 ** drawn[r.multiply_adds]
            axes.errorbar(at, r.mean, r.std or 0, fmt="o", color=COLOURS.get(r.row, BLUE), label=r.row)
            drawn[r.multiply_adds] += 1
    axes.set_title(f"{found.summary.file}: errors against cost, ± one std over seeds")
    _log_scale(axes.xaxis, axes.set_xscale)
    axes.legend()
    axes.set(xlabel="multiply-adds per image, logarithmic scale", ylabel=f"errors on {found.summary.evaluated_on}")


def _draw_knowledge(figure: Figure, found: Findings) -> None:
    """For each telling image its hard label and the teacher's output at each temperature, for the likeliest classes."""
    labels, known = found.test.labels, found.knowledge
    assert known
    images, temperatures = telling(known.log_p(1), labels), sorted({1.0, 4.0, 20.0, known.T})
    columns = {"hard label": F.one_hot(labels[images], len(found.summary.classes)).double()}
    columns |= {f"T = {T:g}": known.log_p(T)[images].exp() for T in temperatures}
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for k, (left, *panels) in enumerate(grid.tolist()):
        left.imshow(pixels(found.test, images[k], bool(found.names)))
        left.axis("off")
        shown = foremost(columns["T = 1"][k].tolist(), LIKELIEST)
        names = [found.summary.classes[c] for c in shown]
        for axes, (title, p) in zip(panels, columns.items(), strict=True):
            shares = p[k, shown].tolist()  # the first at the top, on a scale of their own
            bars = axes.barh(range(len(shares)), shares, color=BLUE)
            axes.bar_label(bars, [f"{p:.3f}" if p >= 0.0005 else "" for p in shares], padding=2, fontsize="xx-small")
            named = axes is panels[0] or max(map(len, names)) <= 3  # long names stand at the first bars alone
            axes.set_yticks(range(len(names)), [short(name, 40) * named for name in names])
            axes.tick_params(labelsize="x-small", length=0)
            axes.set(xlim=(0, 1.35 * (max(shares) or 1)), xticks=[])
            axes.invert_yaxis()
            axes.spines["bottom"].set_visible(False)
            if k == 0:
                axes.set_title(title, fontsize="medium")


def telling(log_p: Tensor, labels: Tensor) -> list[int]:
    """The images that a teacher gets right while it hesitates most, at most one a class: log-probabilities [N, C]."""
    entropy = -(log_p.exp() * log_p).sum(1)
    entropy[log_p.argmax(1) != labels] = -1
    best: dict[int, int] = {}
    for i in entropy.argsort(descending=True).tolist():
        best.setdefault(int(labels[i]), i)
    return list(best.values())[:TELLING]
