"""The pictures of a report, drawn with matplotlib: PNG, by file name."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import losses, score
from kdcli.findings import Findings, Lesson, largest, pixels, short
from kdcli.results import Document, Summary, Table
from kdcli.show import WIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

TELLING, LIKELIEST = 4, 8  # images whose soft targets are drawn; of many classes, the bars of each
COLOURS = {
    "teacher": "#636363",
    "ensemble": "#969696",
    "baseline": "#e6550d",
    "ensemble of baselines": "#fdae6b",
    "student": "#3182bd",
    "student of ensemble": "#756bb1",
}


def grid_picture(summary: Summary) -> dict[str, bytes]:
    """The one picture of a grid."""
    return {"grid.png": _png(_draw_grid, summary)}


def pictures(found: Findings) -> dict[str, bytes]:
    """The pictures of an experiment without a grid, or of a run."""
    table, known = found.summary.only.table, found.knowledge
    wanted: dict[str, tuple[bool, Callable[[Figure, Findings], None]]] = {
        "errors.png": (len(table) > 1, _draw_errors),
        "learning-curves.png": (any(epochs for _, epochs in found.curves), _draw_curves),
        "calibration.png": (True, _draw_calibration),
        "cost.png": (sum(row.kind != "omission" for row in table) > 1, _draw_cost),
        "dark-knowledge.png": (known is not None, _draw_knowledge),
        "omitted-classes.png": (any(d.bias for d in found.documents), _draw_omissions),
        "soft-targets.png": (known is not None, _draw_pairs if found.wide else _draw_soft_targets),
    }
    drawn = {name: _png(draw, found) for name, (draw_it, draw) in wanted.items() if draw_it}
    for row, lesson in known.lessons.items() if known else ():
        stem = "taught-" + re.sub(r"\W+", "-", row)[:60].strip("-")
        name = f"{stem}-{len(drawn)}.png" if f"{stem}.png" in drawn else f"{stem}.png"
        drawn[name] = _png(_draw_lesson, found, lesson)
    return drawn


def _png(draw: Callable[..., None], *shown: Summary | Findings | Lesson) -> bytes:
    """What `draw` draws of what is shown, on a figure that it is given."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    settings = rc_context(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "text.parse_math": False,  # a class may be called $x$
        }
    )
    with settings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of names in letters that the font lacks
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        draw(figure, *shown)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colour(row: str) -> str:
    return COLOURS.get(row, COLOURS["student"])


def _name_below(axes: "Axes", names: Sequence[str]) -> None:
    """The names of classes at 0, 1, … of the x axis; long ones are turned, so that they do not overlap."""
    axes.set_xticks(range(len(names)), [short(name) for name in names])
    if max(map(len, names)) > 3:
        axes.tick_params("x", labelsize=8)
        for label in axes.get_xticklabels():
            label.set(rotation=60, ha="right", rotation_mode="anchor")


def _log_scale(axis: "Axis", set_scale: Callable[..., None], at: Sequence[int] = (1, 2, 5)) -> None:
    """A logarithmic axis with plain numbers at these multiples of the powers of ten, on which 0 has a place."""
    from matplotlib.ticker import NullFormatter, SymmetricalLogLocator

    set_scale("symlog", linthresh=1)
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=at))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_errors(figure: "Figure", found: Findings) -> None:
    """The errors of every row: a dot a seed, a bar for the mean, a diamond for the paper; log scale where far apart."""
    rows, summary = found.summary.only.table[::-1], found.summary
    figure.set_figheight(1.5 + 0.42 * len(rows))  # room for a number above every bar
    axes = figure.subplots()
    for i, r in enumerate(rows):
        axes.axhline(i, color="#eeeeee", linewidth=1, zorder=0)
        axes.plot(r.errors, [i] * r.n, "o", color="#3182bd", markersize=5, alpha=0.6)
        axes.plot(r.mean, i, "|", color="black", markersize=16, markeredgewidth=2)
        axes.plot(r.paper[:1], [i] * bool(r.paper), "D", color="#e6550d", fillstyle="none", markersize=6)
        text = f"{r.mean:.1f}" if r.n > 1 else f"{r.mean:g}"
        axes.annotate(text, (r.mean, i), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [short(r.row, 40) for r in rows])
    papers = [r.paper[0] for r in rows if r.paper]
    every = [errors for r in rows for errors in r.errors] + papers
    wide = max(every) > 4 * max(min(every), 1)
    if wide:
        _log_scale(axes.xaxis, axes.set_xscale)
    else:
        axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.1)
    axes.set_ylim(-0.5, len(rows) - 0.35)
    scale = ", logarithmic scale" if wide else ""
    paper = "; diamond: the paper's" if papers else ""
    axes.set_xlabel(f"errors on {summary.evaluated_on}{scale}\ndots: seeds; bar: their mean{paper}")
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{summary.file}: errors", loc="left")


def _draw_grid(figure: "Figure", summary: Summary) -> None:
    """Errors at each value of the first key, a colour for each combination of the others (of a grid with one key, for
    each net) and a style for each net; with bars of one standard deviation."""
    axes, (first, *others) = figure.subplots(), summary.grid
    lines: dict[str, list[Table]] = {}
    for point in summary.points:
        lines.setdefault(", ".join(f"{key.rpartition('.')[2]} {point.at[key]}" for key in others), []).append(point)
    ticks = list(dict.fromkeys(point.at[first] for point in summary.points))
    for i, (name, points) in enumerate(lines.items()):
        for row, style in (("baseline", "--"), ("student", "-"), ("student of ensemble", "-."), ("ensemble", ":")):
            found = [(ticks.index(p.at[first]), r) for p in points for r in p.table if r.row == row]
            x = [at + 0.04 * (i - (row == "baseline")) for at, _ in found]  # so that no bar hides another
            means, spread = [r.mean for _, r in found], [r.std or 0 for _, r in found]
            colour, label = (f"C{i}", f"{row}, {name}") if name else (COLOURS[row], row)
            if found:
                axes.errorbar(x, means, spread, None, style, color=colour, label=label)
    recipes = [tick.replace(" ", "\n") if "=" in tick else tick for tick in ticks]  # a line a setting
    axes.set_xticks(range(len(ticks)), recipes)
    axes.set(xlabel=f"{first} (the values in a row, not to scale)", ylabel=f"errors on {summary.evaluated_on}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=3.5)
    n = len(summary.seeds)
    axes.set_title(f"{summary.file}: " + (f"mean over {n} seeds, ± one std" if n > 1 else "one seed"), loc="left")


def _draw_curves(figure: "Figure", found: Findings) -> None:
    """Test errors by epoch of teachers, baselines and students, a thin line a seed; an ensemble has none."""
    axes, named = figure.subplots(), set()
    for row, epochs in found.curves:
        label = None if row in named else short(row, 40)
        x, y = [e.epoch for e in epochs], [e.test_errors for e in epochs]
        if epochs:
            axes.plot(x, y, color=_colour(row), linewidth=1, alpha=0.8, label=label)
            named.add(row)
    _log_scale(axes.yaxis, axes.set_yscale, (1, 2, 3, 5, 7))
    axes.set(xlabel="epoch", ylabel=f"errors on {found.summary.evaluated_on}, logarithmic scale")
    axes.legend()
    axes.set_title(f"{found.summary.file}: learning curves, a line a seed", loc="left")


def _draw_omissions(figure: "Figure", found: Findings) -> None:
    """Errors per class of the students that never saw some classes, before and after the held-out bias; of many
    classes, the unseen and then the others with the most errors."""
    rows: dict[str, list[Document]] = {}
    for d in found.documents:
        if d.bias:
            rows.setdefault(d.row, []).append(d)
    for axes, (row, mine) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        before = torch.tensor([d.test.per_class_errors for d in mine]).double().mean(0)
        after = torch.tensor([d.bias["heldout"].per_class_errors for d in mine]).double().mean(0)
        shown = torch.arange(len(before))
        if found.wide:
            weight = before + after
            weight[found.dataset.numbers(mine[0].omitted)] += float(weight.max())
            shown = weight.argsort(descending=True, stable=True)[:WIDE]
        for at, name, means, colour in ((-0.2, "before", before, "#9ecae1"), (0.2, "heldout bias", after, "#3182bd")):
            axes.bar([k + at for k in range(len(shown))], means[shown].tolist(), 0.4, color=colour, label=name)
        names = [found.classes[c] for c in shown.tolist()]
        _name_below(axes, [f"{name}*" if name in mine[0].omitted else name for name in names])
        axes.set(xlabel="unseen and worst classes" if found.wide else "class", ylabel="errors on its test images")
        axes.set_title(short(row, 60 // len(rows)))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, title="*: not in the transfer set")


def _draw_calibration(figure: "Figure", found: Findings) -> None:
    """Accuracy against confidence in the bins of the calibration error, a line a net; bins of fewer than five images
    are left out."""
    axes, labels = figure.subplots(), found.dataset.test.labels
    axes.plot([0, 1], [0, 1], "--", color="#bbbbbb", linewidth=1, label="as it says")
    for net in found.nets:
        confidence, predicted = net.log_p.exp().max(1)
        bins, right = (confidence * score.BINS).ceil().clamp(1, score.BINS), (predicted == labels).double()
        mine = [bins == b for b in range(1, score.BINS + 1) if int((bins == b).sum()) >= 5]
        x, y = [float(confidence[m].mean()) for m in mine], [float(right[m].mean()) for m in mine]
        row, ece = net.document.row, score.calibration_error(net.log_p, labels)
        axes.plot(x, y, "o-", color=_colour(row), label=f"{short(row, 40)}, ECE {ece:.4f}")
    axes.set(xlabel="probability of the top class", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend()


def _draw_cost(figure: "Figure", found: Findings) -> None:
    """Errors against multiply-adds, a point a row of the table."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes = figure.subplots()
    rows = [(r, r.multiply_adds) for r in found.summary.only.table if r.multiply_adds and r.kind != "omission"]
    for r, cost in rows:
        axes.errorbar(cost, r.mean, r.std or 0, fmt="o", color=_colour(r.row))
        beside = [other for other, its in rows if its == cost]
        below = (
            -13 if len(beside) > 1 and r is min(beside, key=lambda other: other.mean) else 5
        )  # the names of near points keep apart
        axes.annotate(r.row, (cost, r.mean), xytext=(6, below), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.2)
    axes.set(xlabel="multiply-adds an image, logarithmic scale", ylabel=f"errors on {found.summary.evaluated_on}")


def _draw_knowledge(figure: "Figure", found: Findings) -> None:
    """For each telling image its hard label and the teacher's output at each temperature; of many classes, the
    likeliest of the image."""
    test, known = found.dataset.test, found.knowledge
    assert known
    log_p = losses.average(known.logits, 1.0, known.average)
    images, hot = telling(log_p, test.labels), sorted({1.0, 4.0, 20.0, known.T})
    grid = figure.subplots(len(images), 2 + len(hot), squeeze=False)
    for (left, *panels), i in zip(grid.tolist(), images, strict=True):
        left.imshow(pixels(test, i), cmap="gray", vmin=0, vmax=255)
        left.axis("off")
        shown = log_p[i].topk(LIKELIEST).indices if found.wide else torch.arange(log_p.shape[1])
        names = [found.classes[c] for c in shown.tolist()]
        columns = [("hard label", F.one_hot(test.labels[i], log_p.shape[1]).double())]
        columns += [(f"T = {T:g}", losses.average(known.logits[:, i], T, known.average).exp()) for T in hot]
        for axes, (title, p) in zip(panels, columns, strict=True):
            again = axes is panels[0] or max(map(len, names)) <= 3  # long names stand at the first bars alone
            _draw_bars(axes, names if again else [""] * len(names), p[shown].tolist(), ".3f")
            if i == images[0]:
                axes.set_title(title, fontsize=9)


def telling(log_p: Tensor, labels: Tensor) -> list[int]:
    """The images that a teacher gets right while it hesitates most, at most one a class: log-probabilities [N, C]."""
    entropy = -(log_p.exp() * log_p).sum(1)
    entropy[log_p.argmax(1) != labels] = -1
    best: dict[int, int] = {}
    for i in entropy.argsort(descending=True).tolist():
        best.setdefault(int(labels[i]), i)
        if len(best) == TELLING:
            break
    return list(best.values())


def _draw_bars(axes: "Axes", names: Sequence[str], shares: Sequence[float], form: str, size: float = 6) -> None:
    """Bars with names and numbers, the first at the top, on a scale of their own."""
    axes.barh(range(len(shares)), shares, color="#3182bd")
    most = max(shares) or 1.0
    for k, share in enumerate(shares):
        text = "" if float(f"{share:{form}}") == 0 else f"{share:{form}}"
        axes.text(share + 0.02 * most, k, text, va="center", fontsize=size - 0.5)
    axes.set_yticks(range(len(names)), [short(name, 40) for name in names])
    axes.tick_params(labelsize=size, length=0)
    axes.set(xlim=(0, 1.35 * most), xticks=[])
    axes.invert_yaxis()
    axes.spines["bottom"].set_visible(False)


def _draw_soft_targets(figure: "Figure", found: Findings) -> None:
    """The table of mean soft targets, the diagonal left white."""
    known, C = found.knowledge, len(found.classes)
    assert known
    figure.set_size_inches(6, 5.4)
    axes, others = figure.subplots(), known.mean.masked_fill(torch.eye(C, dtype=torch.bool), float("nan"))
    axes.imshow(others.numpy(), cmap="Blues", vmax=1.4 * float(others.nan_to_num().max()))
    for i in range(C):
        for j in range(C):
            axes.text(j, i, f"{known.mean[i, j]:.1f}", ha="center", va="center", fontsize=8)
    _name_below(axes, found.classes)
    axes.set_yticks(range(C), [short(name) for name in found.classes])
    axes.set(xlabel="soft target, per cent", ylabel="label", title=f"mean soft targets at T = {known.T:g}")


def _draw_pairs(figure: "Figure", found: Findings) -> None:
    """Of many classes: the largest mean soft targets of other classes than the label."""
    known = found.knowledge
    assert known
    axes, pairs = figure.subplots(), largest(known.mean)
    names = [f"{short(found.classes[i])} → {short(found.classes[j])}" for i, j, _ in pairs]
    _draw_bars(axes, names, [share for _, _, share in pairs], ".1f", size=8)
    axes.set_title(f"label → class: the largest mean soft targets at T = {known.T:g}, per cent", fontsize=10)


def _draw_lesson(figure: "Figure", found: Findings, lesson: Lesson) -> None:
    """Transfer images that teach the unseen classes, above test images of these before and after the bias."""
    train, test, names = found.dataset.train, found.dataset.test, short(lesson.names, 40)
    taught = [
        (train, t.image, [f"label {found.label(train, t.image)}: {t.own:.3f}", f"{t.like}: {t.p:.3f}"])
        for t in lesson.transfer
    ]
    changed = [
        (test, c.image, [f"label {found.label(test, c.image)}", f"before {c.before}", f"after {c.after}"])
        for c in lesson.changed
    ]
    titles = [
        f"transfer images that teach most about {names}",
        f"test images of {names} that the bias of {lesson.shift:+.2f} changes",
    ]
    for part, title, row in zip(figure.subfigures(2, 1, squeeze=False)[:, 0], titles, (taught, changed), strict=True):
        part.suptitle(title, fontsize=10)
        for axes, (split, i, lines) in zip(part.subplots(1, 5), row[:5], strict=False):
            axes.imshow(pixels(split, i), cmap="gray", vmin=0, vmax=255)
            axes.set_title("\n".join(short(line, 26) for line in lines), fontsize=7)
        for axes in part.axes:
            axes.axis("off")
