"""The pictures of `kd run`, drawn with matplotlib."""

import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import core, metrics
from kdcli.config import CLASSES
from kdcli.data import Split
from kdcli.recipes import Session, log_probabilities, teacher_logits
from kdcli.runs import Document, Run

TEACHING, TELLING = ("teacher", "ensemble", "ensemble of baselines"), 4
SHOWN = 10  # images in a gallery: whole rows of five on a screen and of two on a phone
COLOURS = {
    "teacher": "#636363",
    "ensemble": "#969696",
    "baseline": "#e6550d",
    "ensemble of baselines": "#fdae6b",
    "student": "#3182bd",
    "student of ensemble": "#756bb1",
}


class Predictions(NamedTuple):
    """What the nets of the first seed say of the test images, on the CPU."""

    log_p: dict[str, Tensor]  # by row, those of `first_seed`: log-probabilities [N, C] at T = 1
    knowing: Tensor  # logits [M, N, C] of the teacher; of a report without one, of its only net
    average: str  # how those of M members are averaged
    test: Split


class Lesson(NamedTuple):
    """How classes were taught without examples: images, and what is said of them."""

    omitted: list[int]
    shift: float  # the bias chosen on held-out images
    transfer: list[tuple[int, float, int, float, float]]  # training image, unseen classes' share, most like, its, own
    changed: list[tuple[int, int, int]]  # test image of an unseen class, what the student says before and after
    corrected: int  # test images that the bias makes right
    spoilt: int  # and those that it makes wrong


class Knowledge(NamedTuple):
    """What the teacher of the first seed knows of the training images beyond their labels."""

    T: float
    mean: Tensor  # soft targets [C, C] by label, in per cent
    train: Split
    lessons: dict[str, Lesson]  # by entry of omit_classes: "omit 3"


def predictions(session: Session, document: Document) -> Predictions:
    """The predictions behind the report of an experiment without a grid, or of a run."""
    runs = {row: session.open(d) for row, d in first_seed(document).items()}
    test = session.dataset.test.to(torch.device("cpu"))
    log_p = {row: log_probabilities(session, run).cpu() for row, run in runs.items()}
    knowing = next(iter(runs.values()))
    average = knowing.spec.settings.get("average", "arithmetic")
    return Predictions(log_p, teacher_logits(knowing, "test", len(test)), average, test)


def first_seed(document: Document) -> dict[str, Document]:
    """The documents of teacher, baseline and student of the first seed, those that there are; of a report about a run
    alone, its ensemble in place of the teacher, or the student that never saw some classes."""
    first = {d["row"]: d for d in reversed(document["runs"])}
    teaching = [row for row in TEACHING if row in first][:1]
    students = ["student"] if "student" in first else [d["row"] for d in document["runs"] if "label" in d][:1]
    return {row: first[row] for row in (*teaching, "baseline", *students) if row in first}


def knowledge(session: Session, document: Document) -> Knowledge | None:
    """The soft targets behind the report; None of what no student can learn from, which keeps none."""
    runs, train = first_seed(document), session.dataset.train.to(torch.device("cpu"))
    known = list(runs.values())[-1].get("teacher") or next(iter(runs.values()))
    if known["run"].split("/")[1] == "baseline" or any(
        "/baseline/" in member for member in session.open(known).spec.parents
    ):
        return None
    teacher, T = session.open(known), session.experiment.distill.T
    logits, how = teacher_logits(teacher, "train", len(train)), teacher.spec.settings.get("average", "arithmetic")
    soft = core.average(logits, T, how).exp()
    mean = torch.stack([soft[train.labels == c].mean(0) for c in range(CLASSES)]) * 100
    first = {d["label"]: d for d in reversed(document["runs"]) if "label" in d}
    lessons = {label: _lesson(session, session.open(d), soft, train) for label, d in reversed(first.items())}
    return Knowledge(T, mean, train, lessons)


def _lesson(session: Session, run: Run, soft: Tensor, train: Split) -> Lesson:
    """The transfer images that the teacher finds most like classes never seen, and test images of such classes that
    the bias changes."""
    omitted, labels = run.spec.settings["omitted"], session.dataset.test.labels.cpu()
    seen = ~torch.isin(train.labels, torch.tensor(omitted))
    if session.dataset.held:
        seen[session.dataset.heldout.cpu()] = False
    transfer = []
    for i in torch.where(seen, soft[:, omitted].sum(1), -1.0).topk(SHOWN).indices.tolist():
        like = max(omitted, key=lambda c: float(soft[i, c]))
        share = float(soft[i, omitted].sum())
        transfer.append((i, share, like, float(soft[i, like]), float(soft[i, train.labels[i]])))
    shift, before = run.result["bias"]["heldout"]["shift"], run.load("logits")["test"]
    said, says = before.argmax(1), metrics.shift_bias(before, omitted, shift).argmax(1)
    unseen = torch.isin(labels, torch.tensor(omitted))
    changed = (unseen & (said != says)).nonzero()[:SHOWN, 0].tolist()
    shown = [(i, int(said[i]), int(says[i])) for i in changed]
    corrected, spoilt = ((said != labels) & (says == labels)).sum(), ((said == labels) & (says != labels)).sum()
    return Lesson(omitted, shift, transfer, shown, int(corrected), int(spoilt))


def grid_picture(document: Document) -> dict[str, bytes]:
    """The one picture of a grid, PNG, by file name."""
    return {"grid.png": _png(lambda figure: _draw_grid(figure, document))}


def pictures(session: Session, document: Document, said: Predictions, known: Knowledge | None) -> dict[str, bytes]:
    """The pictures of an experiment without a grid, PNG, by file name."""
    hot = sorted({1.0, 4.0, 20.0, session.experiment.distill.T})
    several = len(document["table"]) > 1
    rows = first_seed(document)
    curves = [(d["row"], session.open(d).metrics()) for row in rows for d in document["runs"] if d["row"] == row]
    draw: dict[str, tuple[bool, Callable[[Any], None]]] = {
        "errors.png": (several, lambda figure: _draw_errors(figure, document)),
        "learning-curves.png": (any(m for _, m in curves), lambda figure: _draw_curves(figure, document, curves)),
        "calibration.png": (True, lambda figure: _draw_calibration(figure, said.log_p, said.test.labels)),
        "cost.png": (
            sum("unseen" not in r for r in document["table"]) > 1,
            lambda figure: _draw_cost(figure, document),
        ),
        "dark-knowledge.png": (True, lambda figure: _draw_knowledge(figure, said, hot)),
        "omitted-classes.png": (
            any("bias" in d for d in document["runs"]),
            lambda figure: _draw_omissions(figure, document),
        ),
    }
    drawn = {name: _png(drawing) for name, (wanted, drawing) in draw.items() if wanted}
    if known:
        drawn["soft-targets.png"] = _png(lambda figure: _draw_soft_targets(figure, known))
        for label, lesson in known.lessons.items():
            name = f"taught-{label.replace(' ', '-').replace(',', '-')}.png"
            drawn[name] = _png(partial(_draw_lesson, lesson=lesson, train=known.train, test=said.test))
    return drawn


def _png(draw: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_errors(figure: Any, document: Document) -> None:
    """The errors of every row: a dot a seed, a bar for the mean, a diamond for the paper; log scale where far apart."""
    rows = document["table"][::-1]
    figure.set_figheight(1.5 + 0.42 * len(rows))  # room for a number above every bar
    axes = figure.subplots()
    for i, r in enumerate(rows):
        axes.axhline(i, color="#eeeeee", linewidth=1, zorder=0)
        axes.plot(r["errors"], [i] * r["n"], "o", color="#3182bd", markersize=5, alpha=0.6)
        axes.plot(r["mean"], i, "|", color="black", markersize=16, markeredgewidth=2)
        axes.plot(r.get("paper", [])[:1], [i] * ("paper" in r), "D", color="#e6550d", fillstyle="none", markersize=6)
        text = f"{r['mean']:.1f}" if r["n"] > 1 else f"{r['mean']:g}"
        axes.annotate(text, (r["mean"], i), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [r["row"] for r in rows])
    papers = [r["paper"][0] for r in rows if "paper" in r]
    every = [errors for r in rows for errors in r["errors"]] + papers
    wide = max(every) > 4 * max(min(every), 1)
    if wide:
        _log_scale(axes.xaxis, axes.set_xscale)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.1)
    axes.set_ylim(-0.5, len(rows) - 0.35)
    scale = ", logarithmic scale" if wide else ""
    paper = "; diamond: the paper's" if papers else ""
    axes.set_xlabel(f"errors on {document['evaluated_on']}{scale}\ndots: seeds; bar: their mean{paper}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{document['file']}: errors", loc="left")


def _log_scale(axis: Any, set_scale: Callable[..., None], at: Sequence[int] = (1, 2, 5)) -> None:
    """A logarithmic axis with plain numbers at these multiples of the powers of ten, on which 0 has a place."""
    from matplotlib.ticker import NullFormatter, SymmetricalLogLocator

    set_scale("symlog", linthresh=1)
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=at))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_grid(figure: Any, document: Document) -> None:
    """Errors at each value of the first key, a colour for each combination of the others (of a grid with one key, for
    each net) and a style for each net; with bars of one standard deviation."""
    axes, (first, *others) = figure.subplots(), document["grid"]
    lines: dict[str, list[Document]] = {}
    for point in document["points"]:
        lines.setdefault(", ".join(f"{key.rpartition('.')[2]} {point['at'][key]}" for key in others), []).append(point)
    ticks = list(dict.fromkeys(point["at"][first] for point in document["points"]))
    for i, (name, points) in enumerate(lines.items()):
        for row, style in (("baseline", "--"), ("student", "-"), ("student of ensemble", "-."), ("ensemble", ":")):
            found = [(ticks.index(p["at"][first]), r) for p in points for r in p["table"] if r["row"] == row]
            rows = [r for _, r in found]
            x = [at + 0.04 * (i - (row == "baseline")) for at, _ in found]  # so that no bar hides another
            spread, colour = [r["std"] or 0 for r in rows], f"C{i}" if name else COLOURS[row]
            label = f"{row}, {name}" if name else row
            if rows:
                axes.errorbar(x, [r["mean"] for r in rows], spread, None, style, color=colour, label=label)
    recipes = [tick.replace(" ", "\n") if "=" in tick else tick for tick in ticks]  # a line a setting
    axes.set_xticks(range(len(ticks)), recipes)
    axes.set(xlabel=f"{first} (the values in a row, not to scale)", ylabel=f"errors on {document['evaluated_on']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3.5)
    n = len(document["seeds"])
    axes.set_title(f"{document['file']}: " + (f"mean over {n} seeds, ± one std" if n > 1 else "one seed"), loc="left")


def _draw_curves(figure: Any, document: Document, curves: Sequence[tuple[str, list[Document]]]) -> None:
    """Test errors by epoch of teachers, baselines and students, a thin line a seed; an ensemble has none."""
    axes = figure.subplots()
    for row, epochs in curves:
        seen = row in axes.get_legend_handles_labels()[1]
        x, y = [e["epoch"] for e in epochs], [e["test_errors"] for e in epochs]
        if epochs:
            axes.plot(
                x, y, color=COLOURS.get(row, COLOURS["student"]), linewidth=1, alpha=0.8, label=None if seen else row
            )
    _log_scale(axes.yaxis, axes.set_yscale, (1, 2, 3, 5, 7))
    axes.set(xlabel="epoch", ylabel=f"errors on {document['evaluated_on']}, logarithmic scale")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"{document['file']}: learning curves, a line a seed", loc="left")


def _draw_omissions(figure: Any, document: Document) -> None:
    """Errors per class of the students that never saw some classes, before and after the held-out bias."""
    runs = [d for d in document["runs"] if d["command"] == "omit-classes"]
    labels = list(dict.fromkeys(d["label"] for d in runs))
    for axes, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        mine = [d for d in runs if d["label"] == label]
        stages = [
            ("before", [d["test"] for d in mine], "#9ecae1"),
            ("heldout bias", [d["bias"]["heldout"] for d in mine], "#3182bd"),
        ]
        for i, (name, stage, colour) in enumerate(stages):
            means = [statistics.mean(s["per_class_errors"][c] for s in stage) for c in range(CLASSES)]
            axes.bar([c + 0.4 * i - 0.2 for c in range(CLASSES)], means, 0.4, color=colour, label=name)
        unseen = mine[0]["omitted"]
        axes.set_xticks(range(CLASSES), [f"{c}*" if c in unseen else str(c) for c in range(CLASSES)])
        axes.set(xlabel="class (*: not in the transfer set)", ylabel="errors on its test images", title=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def _draw_calibration(figure: Any, log_p: dict[str, Tensor], labels: Tensor) -> None:
    """Accuracy against confidence in ten bins, a line a net; bins of fewer than five images are left out."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#bbbbbb", linewidth=1, label="as it says")
    for row in log_p:
        confidence, predicted = log_p[row].exp().max(1)
        bins = (confidence * 10).ceil().clamp(1, 10) - 1
        points = []
        for b in range(10):
            mine = bins == b
            if int(mine.sum()) >= 5:
                points.append((float(confidence[mine].mean()), float((predicted == labels)[mine].double().mean())))
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=COLOURS.get(row, COLOURS["student"]),
            label=f"{row}, ECE {metrics.calibration_error(log_p[row], labels):.4f}",
        )
    axes.set(xlabel="probability of the top class", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_cost(figure: Any, document: Document) -> None:
    """Errors against multiply-adds, a point a row of the table."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes = figure.subplots()
    rows = [r for r in document["table"] if "multiply_adds" in r and "unseen" not in r]
    for r in rows:
        axes.errorbar(r["multiply_adds"], r["mean"], r["std"] or 0, fmt="o", color=COLOURS[r["row"]])
        beside = [other["mean"] for other in rows if other["multiply_adds"] == r["multiply_adds"]]
        below = -13 if len(beside) > 1 and r["mean"] == min(beside) else 5  # the names of near points keep apart
        at = (r["multiply_adds"], r["mean"])
        axes.annotate(r["row"], at, xytext=(6, below), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.2)
    axes.set(xlabel="multiply-adds an image, logarithmic scale", ylabel=f"errors on {document['evaluated_on']}")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_knowledge(figure: Any, said: Predictions, temperatures: Sequence[float]) -> None:
    """For each telling image its hard label and the teacher's output at each temperature, as bars with numbers."""
    test, known = said.test, core.average(said.knowing, 1.0, said.average)
    images = telling(known, test.labels)
    grid = figure.subplots(len(images), 2 + len(temperatures), squeeze=False)
    for row, i in zip(grid.tolist(), images, strict=True):
        row[0].imshow(test.images[i].numpy(), cmap="gray_r")
        row[0].axis("off")
        hard = F.one_hot(test.labels[i], CLASSES).double()
        columns = [("hard label", hard)]
        columns += [(f"T = {T:g}", core.average(said.knowing[:, i], T, said.average).exp()) for T in temperatures]
        for axes, (name, p) in zip(row[1:], columns, strict=True):
            axes.barh(range(CLASSES), p.tolist(), color="#3182bd")
            for c, share in enumerate(p.tolist()):
                axes.text(
                    share + 0.02 * float(p.max()), c, f"{share:.3f}" if share >= 5e-4 else "", va="center", fontsize=5.5
                )
            axes.set(xlim=(0, 1.35 * float(p.max())), xticks=[], yticks=range(CLASSES))
            axes.tick_params(labelsize=6, length=0)
            axes.invert_yaxis()
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            if i == images[0]:
                axes.set_title(name, fontsize=9)


def _draw_soft_targets(figure: Any, known: Knowledge) -> None:
    """The table of mean soft targets, the diagonal left white."""
    figure.set_size_inches(6, 5.4)
    axes, others = figure.subplots(), known.mean.masked_fill(torch.eye(CLASSES, dtype=torch.bool), float("nan"))
    axes.imshow(others.numpy(), cmap="Blues", vmax=1.4 * float(others.nan_to_num().max()))
    for i in range(CLASSES):
        for j in range(CLASSES):
            axes.text(j, i, f"{known.mean[i, j]:.1f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(CLASSES))
    axes.set_yticks(range(CLASSES))
    axes.set(xlabel="soft target, per cent", ylabel="label", title=f"mean soft targets at T = {known.T:g}")


def _draw_lesson(figure: Any, lesson: Lesson, train: Split, test: Split) -> None:
    """Transfer images that teach the unseen classes, above test images of these before and after the bias."""
    rows = [
        [
            (train, i, f"label {train.labels[i]}\n{like}: {p:.3f}, own {own:.3f}")
            for i, _, like, p, own in lesson.transfer
        ],
        [(test, i, f"label {test.labels[i]}\nbefore {said}, after {says}") for i, said, says in lesson.changed],
    ]
    names = ", ".join(map(str, lesson.omitted))
    titles = [
        f"transfer images that teach most about {names}",
        f"test images of {names} that the bias of {lesson.shift:+.2f} changes",
    ]
    for part, title, row in zip(figure.subfigures(2, 1), titles, rows, strict=True):
        part.suptitle(title, fontsize=10)
        for axes, (split, i, text) in zip(part.subplots(1, 5), row[:5], strict=False):
            axes.imshow(split.images[i].numpy(), cmap="gray_r")
            axes.set_title(text, fontsize=7)
        for axes in part.axes:
            axes.axis("off")


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
