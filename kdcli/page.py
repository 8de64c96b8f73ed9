"""report.html: one self-contained page of what `kd run` found, and of what the teacher knows beyond the labels."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli import core, metrics, report
from kdcli.config import CLASSES
from kdcli.data import Split
from kdcli.recipes import Session, find_teachers, log_probabilities, omission_spec, teacher_logits
from kdcli.runs import Document, Run
from kdcli.verdict import Verdict

NETS = ("teacher", "baseline", "student")
HARDEST, TELLING = 12, 4
STYLE = Path(__file__).with_name("page.css")


def html(session: Session, document: Document, evaluation: Document, pictures: dict[str, bytes]) -> str:
    """The page of a finished experiment. It asks nothing of the network: pictures are inside."""
    body = [
        f"<h1>{escape(document['file'])}: knowledge distillation, errors on {escape(document['evaluated_on'])}</h1>"
    ]
    if "grid" in document:
        first, *others = report.remarks(document)
        body += [f'<p class="note">{escape(first)}</p>', _table(report.final_table(document))]
        body += [_figure(pictures, "grid.png", "Mean over seeds, with bars of one standard deviation.")]
        body += [f'<p class="note">{escape(line)}</p>' for line in others]
    else:
        body += _experiment(session, document, evaluation, pictures)
    body.append(f'<p class="note">Made by {_code(report.made(document))}</p>')
    title = escape(f"{document['file']}: kd report")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE.read_text()}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def _experiment(session: Session, document: Document, evaluation: Document, pictures: dict[str, bytes]) -> list[str]:
    """The parts of the page of an experiment without a grid; nets by image are those of the first seed."""
    first, *notes = report.remarks(document)
    runs = {row: next(d for d in document["runs"] if d["row"] == row) for row in NETS}
    scores = {e["run"]: e for e in evaluation["runs"]}
    log_p = {row: log_probabilities(session, session.open(d)).cpu() for row, d in runs.items()}
    test = session.dataset.test.to(torch.device("cpu"))
    seed = document["seeds"][0]
    body = [f'<p class="verdict">{escape(first)}</p>', _figures(document, scores[runs["student"]["run"]])]
    body += [_table(report.final_table(document)), *(f'<p class="note">{escape(note)}</p>' for note in notes)]
    body += [_figure(pictures, "errors.png", "Every seed is a dot, the bar their mean.")]
    body += [
        "<h2>Learning curves</h2>",
        _figure(pictures, "learning-curves.png", "Test errors by epoch, a line a seed."),
    ]
    body += ["<h2>Where the errors are</h2>", f'<p class="note">Of seed {seed}.</p>']
    body.append(_table(_per_class({row: scores[d["run"]] for row, d in runs.items()})))
    body.append(_confusion(scores[runs["student"]["run"]]["confusion"], "label", "the student says"))
    if "omitted-classes.png" in pictures:
        body.append(
            _figure(pictures, "omitted-classes.png", "Classes missing from the transfer set, before and after.")
        )
    body += ["<h2>Are the probabilities right?</h2>", _figure(pictures, "calibration.png", CALIBRATION_CAPTION)]
    body += ["<h2>The hardest test images</h2>", _hardest(log_p, test)]
    body += ["<h2>Cost against accuracy</h2>", _figure(pictures, "cost.png", "Errors against multiply-adds an image.")]
    return body + _knowledge(session, runs, pictures)


CALIBRATION_CAPTION = (
    "Accuracy of the images in each tenth of the top class's probability; on the diagonal a probability means what it "
    "says."
)


def _figures(document: Document, student: Document) -> str:
    """The numbers that matter, large."""
    rows = {row["row"]: row for row in document["table"]}
    cells = [(f"{rows[name]['mean']:g}", f"errors of the {name}") for name in NETS]
    fewer = Verdict(**document["verdict"]).fewer_errors
    cells.append((f"{abs(fewer):g}", f"{'fewer' if fewer >= 0 else 'more'} errors with soft targets"))
    kept = student["teacher"]["multiply_adds_kept"]
    cells.append((f"{100 * kept:.0f} %", "of the teacher's multiply-adds"))
    return f'<div class="figures">{"".join(f"<div><b>{value}</b>{name}</div>" for value, name in cells)}</div>'


def _table(table: report.Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _per_class(scores: dict[str, Document]) -> report.Table:
    rows = [[row, *map(str, s["test"]["per_class_errors"]), str(s["test"]["errors"])] for row, s in scores.items()]
    return report.Table("", ["errors by class", *map(str, range(CLASSES)), "all"], rows)


def _heat(rows: Sequence[Sequence[float]], corner: str, shown: str) -> str:
    """A table of CLASSES x CLASSES, the off-diagonal cells shaded from the least of them to the greatest."""
    others = [value for i, row in enumerate(rows) for j, value in enumerate(row) if i != j]
    least, most = min(others), max(others)

    def cell(i: int, j: int) -> str:
        share = 0 if i == j or most == least else (rows[i][j] - least) / (most - least)
        return f'<td class="heat" style="--share:{share:.2f}">{rows[i][j]:{shown}}</td>'

    head = "".join(f"<th>{c}</th>" for c in range(CLASSES))
    body = "".join(f"<tr><td>{i}</td>{''.join(cell(i, j) for j in range(CLASSES))}</tr>" for i in range(CLASSES))
    head = f"<thead><tr><th>{corner}</th>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _confusion(counts: list[list[int]], row: str, column: str) -> str:
    return _heat(counts, f"{row} \\ {column}", "d")


def _figure(pictures: dict[str, bytes], name: str, caption: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _code(text: str) -> str:
    """Text in which the first part between backticks is code."""
    _, code, rest = text.split("`", 2)
    return f"<code>{escape(code)}</code>{escape(rest)}"


def _image(pixels: Tensor, white: int) -> str:
    """A tag with an image [side, side], dark on light."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((255 - pixels.float() * (255 / white)).round().byte().numpy()).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _gallery(items: Sequence[tuple[str, str]]) -> str:
    return f'<div class="images">{"".join(f"<div>{image}{text}</div>" for image, text in items)}</div>'


def _says(name: str, p: Tensor, label: int) -> str:
    top = int(p.argmax())
    mark = "" if top == label else ' class="wrong"'
    return f"<span{mark}>{name}: <b>{top}</b> {float(p[top]):.2f}</span><br>"


def _hardest(log_p: dict[str, Tensor], test: Split) -> str:
    """The test images on which the student's loss is greatest, and what each net says of them."""
    loss = F.nll_loss(log_p["student"], test.labels, reduction="none")
    items = []
    for i in loss.topk(HARDEST).indices.tolist():
        label = int(test.labels[i])
        says = "".join(_says(row, log_p[row][i].exp(), label) for row in ("student", "baseline", "teacher"))
        items.append((_image(test.images[i], test.white), f"test image {i}, label {label}<br>{says}"))
    return _gallery(items)


# What the teacher knows beyond the labels.


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


def _knowledge(session: Session, runs: dict[str, Document], pictures: dict[str, bytes]) -> list[str]:
    train, distill = session.dataset.train.to(torch.device("cpu")), session.experiment.distill
    teacher = session.open(runs["student"]["teacher"])
    logits, how = teacher_logits(teacher, "train", len(train)), teacher.spec.settings.get("average", "arithmetic")
    soft = core.average(logits, distill.T, how).exp()
    mean = torch.stack([soft[train.labels == c].mean(0) for c in range(CLASSES)]) * 100
    caption = "The hard label, and what the teacher says at each temperature: which other digits an image resembles."
    body = ["<h2>What the teacher knows beyond the labels</h2>", _figure(pictures, "dark-knowledge.png", caption)]
    body.append(
        f'<p class="note">Mean soft targets at T = {distill.T:g}, in per cent, by label: which digits look like which. '
        "The higher T, the flatter.</p>"
    )
    body.append(_heat(mean.tolist(), "label", ".1f"))
    for entry in session.experiment.omit_classes:
        run = _omission(session, entry.label)
        body += [f"<h2>{escape(entry.label)}: a class taught without examples</h2>"] if run else []
        body += _omitted(session, run, soft, train) if run else []
    return body


def _omission(session: Session, label: str) -> Run | None:

    entry = next(e for e in session.experiment.omit_classes if e.label == label)
    run = session.run(omission_spec(session.experiment, session.experiment.seed[0], find_teachers(session)[0], entry))
    return run if run.completed else None


def _omitted(session: Session, run: Run, soft: Tensor, train: Split) -> list[str]:
    """The transfer images that the teacher finds most like a class never seen, and test images of such classes before
    and after the bias."""
    omitted, test = run.spec.settings["omitted"], session.dataset.test.to(torch.device("cpu"))
    seen = ~torch.isin(train.labels, torch.tensor(omitted))
    if session.dataset.held:
        seen[session.dataset.heldout.cpu()] = False
    mass = torch.where(seen, soft[:, omitted].sum(1), -1.0)
    lessons, changes = [], []
    for i in mass.topk(8).indices.tolist():
        label, like = int(train.labels[i]), max(omitted, key=lambda c: float(soft[i, c]))
        text = (
            f"label {label}, soft target<br><b>{like}</b> {float(soft[i, like]):.3f}, own {float(soft[i, label]):.3f}"
        )
        lessons.append((_image(train.images[i], train.white), text))
    shift, before = run.result["bias"]["heldout"]["shift"], run.load("logits")["test"]
    said, says = before.argmax(1), metrics.shift_bias(before, omitted, shift).argmax(1)
    unseen = torch.isin(test.labels, torch.tensor(omitted))
    for i in (unseen & (said != says)).nonzero()[:8, 0].tolist():
        text = f"label {int(test.labels[i])}<br>before the bias: <b>{int(said[i])}</b><br>after: <b>{int(says[i])}</b>"
        changes.append((_image(test.images[i], test.white), text))
    names = ", ".join(map(str, omitted))
    return [
        f'<p class="note">Of the transfer set, which holds no {names}: the images that teach most about it.</p>',
        _gallery(lessons),
        f'<p class="note">Test images of {names} on which the bias ({shift:+.2f}, chosen on held-out images) changes '
        "what the student says.</p>",
        _gallery(changes) if changes else '<p class="note">None.</p>',
    ]


def pictures(session: Session, document: Document) -> dict[str, Callable[[Any], None]]:
    """What draws the pictures that need predictions: of the first seed's nets."""
    runs = {row: session.open(next(d for d in document["runs"] if d["row"] == row)) for row in NETS}
    log_p = {row: log_probabilities(session, run).cpu() for row, run in runs.items()}
    test, teacher = session.dataset.test.to(torch.device("cpu")), runs["teacher"]
    logits = teacher_logits(teacher, "test", len(test))
    hot = sorted({1.0, 4.0, 20.0, session.experiment.distill.T})
    images = telling(log_p["teacher"], test.labels)
    return {
        "calibration.png": lambda figure: draw_calibration(figure, log_p, test.labels),
        "cost.png": lambda figure: draw_cost(figure, document),
        "dark-knowledge.png": lambda figure: draw_knowledge(figure, logits, "arithmetic", test, images, hot),
    }


def draw_calibration(figure: Any, log_p: dict[str, Tensor], labels: Tensor) -> None:
    """Accuracy against confidence in ten bins, a line a net; bins of fewer than five images are left out."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for row, colour in report.COLOURS.items():
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
            color=colour,
            label=f"{row}, ECE {metrics.calibration_error(log_p[row], labels):.4f}",
        )
    axes.set(xlabel="probability of the top class", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_cost(figure: Any, document: Document) -> None:
    """Errors against multiply-adds, a point a row of the table."""
    axes = figure.subplots()
    rows = [r for r in document["table"] if "multiply_adds" in r and "unseen" not in r]
    for r in rows:
        axes.errorbar(
            r["multiply_adds"], r["mean"], r["std"] or 0, fmt="o", color=report.COLOURS.get(r["row"], "#9e9ac8")
        )
        below = -11 if r["row"] in ("student of ensemble", "ensemble of baselines") else 5
        at = (r["multiply_adds"], r["mean"])
        axes.annotate(r["row"], at, xytext=(7, below), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set(xlabel="multiply-adds an image, logarithmic scale", ylabel=f"errors on {document['evaluated_on']}")
    axes.spines[["top", "right"]].set_visible(False)


def draw_knowledge(
    figure: Any, teacher: Tensor, how: str, test: Split, images: Sequence[int], temperatures: Sequence[float]
) -> None:
    """For each image its hard label and the teacher's output at each temperature, as bars with numbers; teacher: the
    logits [M, N, C] of its members."""
    grid = figure.subplots(len(images), 2 + len(temperatures), squeeze=False)
    for row, i in zip(grid.tolist(), images, strict=True):
        row[0].imshow(test.images[i].numpy(), cmap="gray_r")
        row[0].axis("off")
        hard = F.one_hot(test.labels[i], CLASSES).double()
        columns = [("hard label", hard)]
        columns += [(f"T = {T:g}", core.average(teacher[:, i : i + 1], T, how)[0].exp()) for T in temperatures]
        for axes, (name, p) in zip(row[1:], columns, strict=True):
            axes.barh(range(CLASSES), p.tolist(), color="#3182bd")
            for c, share in enumerate(p.tolist()):
                axes.text(share + 0.02, c, f"{share:.3f}" if share >= 5e-4 else "", va="center", fontsize=5.5)
            axes.set(xlim=(0, 1.25), xticks=[], yticks=range(CLASSES))
            axes.tick_params(labelsize=6, length=0)
            axes.invert_yaxis()
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            if i == images[0]:
                axes.set_title(name, fontsize=9)
