"""report.html: one self-contained page of what `kd run` found, or of one run, and of what the teacher knows beyond the
labels."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, report
from kdcli.config import CLASSES
from kdcli.data import Split
from kdcli.pictures import (
    SHOWN,
    Knowledge,
    Lesson,
    Predictions,
    first_seed,
    grid_picture,
    knowledge,
    pictures,
    predictions,
)
from kdcli.recipes import Session
from kdcli.runs import Document, write_aside
from kdcli.verdict import Verdict

HARDEST_NOTE = (
    "Those on which the loss of the {} is greatest, the greatest first: what each net says, with what probability; "
    "wrong answers in red."
)
OWN_PICTURES = (
    r"(errors|learning-curves|calibration|cost|dark-knowledge|omitted-classes|soft-targets|grid|taught-.*)\.png"
)
WRONG = ' class="wrong"'
STYLE = Path(__file__).with_name("page.css")


def write_report(session: Session, document: Document, evaluation: Document, folder: Path) -> list[Path]:
    """Write the page, the table, the document and the pictures of `kd run` to a folder; returns the files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    said, known = (None, None) if "grid" in document else (predictions(session, document), knowledge(session, document))
    drawn = pictures(session, document, said, known) if said else grid_picture(document)
    files = {
        "report.html": html(document, evaluation, drawn, said, known).encode(),
        "report.md": report.markdown(document, list(drawn)).encode(),
        "report.json": (json.dumps(document, indent=1) + "\n").encode(),
        **drawn,
    }
    for old in folder.glob("*.png"):  # of a report that had more pictures; a file of the user's own stays
        if old.name not in files and re.fullmatch(OWN_PICTURES, old.name):
            old.unlink()
    for name, content in files.items():
        write_aside(folder / name, content)
    return [folder / name for name in files]


def html(
    document: Document,
    evaluation: Document,
    drawn: dict[str, bytes],
    said: Predictions | None,
    known: Knowledge | None,
) -> str:
    """The page of a finished experiment, `said` and `known` what its nets said unless it is a grid. It asks nothing of
    the network: pictures are inside."""
    title = f"{document['file']}: knowledge distillation, errors on {document['evaluated_on']}"
    body = [f"<h1>{escape(title)}</h1>"]
    body += _experiment(document, evaluation, drawn, said) if said else _grid(document, drawn)
    body += _knowledge(known, drawn, said.test) if said and known else []
    body += ["<h2>How it was made</h2>", f'<p class="note">By {_code(report.made(document))}</p>', _runs(document)]
    settings = {key: value for key, value in document["settings"].items() if value not in ({}, [])}
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=90)
    body.append(f"<pre>{escape(text)}</pre>")
    title = escape(f"{document['file']}: kd report")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE.read_text()}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def _runs(document: Document) -> str:
    """The names of the runs, by row."""
    names: dict[str, dict[str, None]] = {}
    for point in document.get("points", [document]):
        for d in point["runs"]:
            names.setdefault(d["row"], {})[d["run"]] = None
    rows = "".join(
        f"<tr><td>{escape(row)}</td><td>{'<br>'.join(map(escape, of))}</td></tr>" for row, of in names.items()
    )
    return f'<details><summary>The runs</summary><div class="scroll"><table class="runs">{rows}</table></div></details>'


def _grid(document: Document, drawn: dict[str, bytes]) -> list[str]:
    """The parts of the page of a grid."""
    first, *others = report.remarks(document)
    others = [f'<p class="note">{escape(line)}</p>' for line in others]
    caption = "Errors at every point; where there are several seeds, their mean ± one standard deviation."
    verdict = f'<p class="verdict">{escape(first)}</p>'
    return [verdict, *_figure(drawn, "grid.png", caption), _table(report.final_table(document)), *others]


def _experiment(document: Document, evaluation: Document, drawn: dict[str, bytes], said: Predictions) -> list[str]:
    """The parts of the page of an experiment without a grid; nets by image are those of the first seed."""
    first, *notes = report.remarks(document)
    runs = first_seed(document)
    scores = {e["run"]: e for e in evaluation["runs"]}
    seed, (main, last) = document["seeds"][0], list(runs.items())[-1]
    body = [f'<p class="verdict">{escape(first)}</p>', _figures(document, scores[last["run"]])]
    body += [f'<p class="note">{_words(document)}</p>', _table(report.final_table(document))]
    body += [f'<p class="note">{escape(note)}</p>' for note in notes]
    body += _figure(drawn, "errors.png", "Every seed is a dot, the bar their mean.")
    body += _figure(drawn, "learning-curves.png", "Test errors by epoch, a line a seed.", "Learning curves")
    note = f"Of seed {seed}. Below, a row a label, a column what the {report.called(main)} says."
    body += ["<h2>Where the errors are</h2>", f'<p class="note">{note}</p>']
    body.append(_table(_per_class({row: scores[d["run"]] for row, d in runs.items()})))
    body.append(_heat(scores[last["run"]]["confusion"], "label", "d"))
    caption = "Students without some classes, before and after the bias; mean over the seeds."
    body += _figure(drawn, "omitted-classes.png", caption)
    body += _figure(drawn, "calibration.png", f"{CALIBRATION_CAPTION} Of seed {seed}.", "Are the probabilities right?")
    body += [
        "<h2>The hardest test images</h2>",
        f'<p class="note">{HARDEST_NOTE.format(report.called(main))} Of seed {seed}.</p>',
    ]
    body.append(_hardest(said.log_p, said.test))
    caption = "Errors against multiply-adds an image; the bars are one std over seeds."
    return body + _figure(drawn, "cost.png", caption, "Cost against accuracy")


CALIBRATION_CAPTION = (
    "Accuracy of the images in each tenth of the top class's probability; on the diagonal a probability means what it "
    "says. ECE, expected calibration error, is the mean distance to the diagonal, each tenth weighted by its images: "
    "most lie in the last, and the others, of few images, scatter; tenths of fewer than five are left out."
)


PAPER = '<a href="https://arxiv.org/abs/1503.02531">Distilling the Knowledge in a Neural Network</a>'


def _words(document: Document) -> str:
    """What the rows and columns of the table are called, of those that it has."""
    rows = {row["row"]: row for row in document["table"]}
    softened = f", its output softened by T = {document['settings']['distill']['T']:g}" if "student" in rows else ""
    entries = [row for row in rows if re.fullmatch(r"(omit|keep) [\d,]+", row)]
    said = {
        "teacher": "Teacher: the large net.",
        "ensemble": "Ensemble: the predictions of several teachers, averaged.",
        "baseline": "Baseline: the small net, trained on the labels.",
        "student": f"Student: the small net, trained on the teacher's soft targets{softened}.",
    }
    words = [text for row, text in said.items() if row in rows]
    if entries:
        words.append(
            f"{', '.join(entries)}: students whose transfer set, the images that they are trained on, "
            "lacks some classes; bias: one number then added to the logits of the classes that they never saw."
        )
    words += ["±: one standard deviation over the seeds."] * any(row["std"] is not None for row in rows.values())
    words += [f"Paper: Hinton, Vinyals and Dean, {PAPER}."] * any("paper" in row for row in rows.values())
    return " ".join(words)


def _figures(document: Document, evaluated: Document) -> str:
    """The numbers that matter, large; `evaluated` is the net that the report is about."""
    rows = {row["row"]: row for row in document["table"]}
    digits = 1 if len(document["seeds"]) > 1 else 0
    means = {name: f"{rows[name]['mean']:.{digits}f}" for name in first_seed(document)}
    cells = [(mean, f"errors of the {report.called(name)}") for name, mean in means.items()]
    if "verdict" in document:
        fewer = Verdict(**document["verdict"]).fewer_errors
        cells.append((f"{abs(fewer):.{digits}f}", f"{'fewer' if fewer >= 0 else 'more'} errors with soft targets"))
    if "teacher" in evaluated:
        kept = evaluated["teacher"]["multiply_adds_kept"]
        cells.append((f"{100 * kept:.2g} %", "of the teacher's multiply-adds"))
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


def _figure(drawn: dict[str, bytes], name: str, caption: str, heading: str = "") -> list[str]:
    """A picture with its heading and caption; nothing where it was not drawn."""
    if name not in drawn:
        return []
    data = base64.b64encode(drawn[name]).decode()
    image = f'<div class="scroll"><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></div>'
    title = [f"<h2>{heading}</h2>"] if heading else []
    return [*title, f"<figure>{image}<figcaption>{caption}</figcaption></figure>"]


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
    mark = "" if top == label else WRONG
    return f"<span{mark}>{name}: <b>{top}</b> {float(p[top]):.2f}</span><br>"


def _hardest(log_p: dict[str, Tensor], test: Split) -> str:
    """The test images on which the last net's loss is greatest, and what each net says of them."""
    loss = F.nll_loss(list(log_p.values())[-1], test.labels, reduction="none")
    items = []
    for i in loss.topk(SHOWN).indices.tolist():
        label = int(test.labels[i])
        says = "".join(_says(row, log_p[row][i].exp(), label) for row in reversed(log_p))
        items.append((_image(test.images[i], test.white), f"test image {i}<br>label {label}<br>{says}"))
    return _gallery(items)


# What the teacher knows beyond the labels.


def _knowledge(known: Knowledge, drawn: dict[str, bytes], test: Split) -> list[str]:
    """What the teacher says of the training images and, where classes were omitted, what it taught about them."""
    caption = (
        "Test images: the hard label, and what the teacher of the first seed says at each temperature, with a scale "
        "of its own in every panel: which other digits an image resembles."
    )
    body = _figure(drawn, "dark-knowledge.png", caption, "What the teacher knows beyond the labels")
    body.append(
        f'<p class="note">Mean soft targets at T = {known.T:g}, in per cent, by label: which digits look like which. '
        "The higher T, the flatter. The darker, the larger; the diagonal is left uncoloured.</p>"
    )
    body.append(_heat(known.mean.tolist(), "label", ".1f"))
    for label, lesson in known.lessons.items():
        what = "a class" if len(lesson.omitted) == 1 else "classes"
        body.append(f"<h2>{escape(label)}: {what} taught without examples</h2>")
        body += _taught(lesson, known, test)
    return body


def _taught(lesson: Lesson, known: Knowledge, test: Split) -> list[str]:
    """The transfer images that teach classes never seen, and test images of such classes before and after the bias."""
    train, one = known.train, len(lesson.omitted) == 1
    lessons = [
        (
            _image(train.images[i], train.white),
            f"label {train.labels[i]}: {own:.3f}<br><b>{c}</b>: {p:.3f}" + ("" if one else f"<br>unseen: {share:.3f}"),
        )
        for i, share, c, p, own in lesson.transfer
    ]
    changes = [
        (
            _image(test.images[i], test.white),
            f"label {test.labels[i]}<br>before the bias: <b>{said}</b><br>"
            f"<span{'' if says == test.labels[i] else WRONG}>after: <b>{says}</b></span>",
        )
        for i, said, says in lesson.changed
    ]
    names = ", ".join(map(str, lesson.omitted))
    return [
        f'<p class="note">Of the transfer set, which holds no {names}: the images whose soft targets at '
        f"T = {known.T:g} say most of {'it' if one else 'them all together, and of which most'}.</p>",
        _gallery(lessons),
        f'<p class="note">The bias ({lesson.shift:+.2f} for the logits of the unseen, chosen on held-out images) '
        f"corrects {lesson.corrected} test images and spoils {lesson.spoilt}. The first of {names} on which it changes "
        "what the student of the first seed says:</p>",
        _gallery(changes) if changes else '<p class="note">None.</p>',
    ]
