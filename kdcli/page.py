"""The report of `kd run` or of one run: a page that is whole in itself, the same as Markdown and JSON, the pictures."""

import base64
import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, show
from kdcli.data import Dataset, Split
from kdcli.findings import SHOWN, Findings, find, largest, pixels, short
from kdcli.pictures import grid_picture, pictures
from kdcli.plan import Job
from kdcli.results import Document, Evaluation, Summary
from kdcli.runs import Places, write_aside
from kdcli.score import BINS

OWN_PICTURES = (
    r"(errors|learning-curves|calibration|cost|dark-knowledge|omitted-classes|soft-targets|grid|taught-.*)\.png"
)


class Shaded(NamedTuple):
    """A table and how dark its cells are, from 0 to 1, but for the first of each row; without shades, a plain one."""

    table: show.Table
    shades: Sequence[Sequence[float]] = ()


class Answer(NamedTuple):
    """What a net says of an image."""

    row: str
    says: str
    p: float
    wrong: bool


class Parts(NamedTuple):
    """What the page shows of an experiment without a grid, or of a run; nets by image are those of the first seed."""

    found: Findings
    main: str  # the net that it is about
    figures: list[tuple[str, str]]  # the numbers that matter, and what they are
    per_class: show.Table
    confusion: Shaded
    hardest: list[tuple[int, list[Answer]]]  # test images, and what each net says
    soft_targets: Shaded | None


def write_report(
    summary: Summary,
    evaluations: Sequence[Evaluation],
    jobs: Sequence[Job],
    dataset: Dataset,
    places: Places,
    folder: Path,
) -> list[Path]:
    """Write the page, the table, the document and the pictures to a folder; returns the files. `jobs`: those of the
    summary's runs. Raises BadInput when the folder cannot be made, or a run's logits are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    found = None if summary.grid else find(summary, jobs, dataset, places)
    drawn = pictures(found) if found else grid_picture(summary)
    files = {
        "report.html": html(summary, evaluations, found, drawn).encode(),
        "report.md": show.markdown(summary, list(drawn)).encode(),
        "report.json": (summary.model_dump_json(indent=1, exclude_none=True) + "\n").encode(),
        **drawn,
    }
    for old in folder.glob("*.png"):  # of a report that had more pictures; a file of the user's own stays
        if old.name not in files and re.fullmatch(OWN_PICTURES, old.name):
            old.unlink()
    for name, content in files.items():
        write_aside(folder / name, content)
    return [folder / name for name in files]


def html(summary: Summary, evaluations: Sequence[Evaluation], found: Findings | None, drawn: dict[str, bytes]) -> str:
    """The page of what was found; without it, of a grid."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["short"] = partial(short, most=60)
    runs: dict[str, dict[str, None]] = {}
    for document in (d for point in summary.points for d in point.runs if isinstance(d, Document)):
        runs.setdefault(document.row, {})[document.run] = None
    return environment.get_template("page.html").render(
        summary=summary,
        parts=_parts(found, {e.run: e for e in evaluations}) if found else None,
        table=show.final_table(summary),
        remarks=show.remarks(summary),
        pictures={name: _data_url(png) for name, png in drawn.items()},
        image=_image,
        bins=BINS,
        runs=runs,
        made=show.made(summary).removeprefix(f"`{summary.made.command_line}`"),
        settings=yaml.safe_dump(summary.settings, sort_keys=False, default_flow_style=None, width=90),
    )


def _parts(found: Findings, scores: dict[str, Evaluation]) -> Parts:
    last, known = found.nets[-1].document, found.knowledge
    return Parts(
        found,
        short(show.called(last), 60),
        _figures(found, scores[last.run]),
        _per_class(found, [scores[net.document.run] for net in found.nets]),
        _matrix(found, torch.tensor(scores[last.run].confusion), ("label", "taken for", "images"), "d"),
        _hardest(found),
        _matrix(found, known.mean, ("label", "soft target of", "per cent"), ".1f") if known else None,
    )


def _figures(found: Findings, evaluated: Evaluation) -> list[tuple[str, str]]:
    """The numbers that matter, and what they are; `evaluated`: the net that the report is about."""
    means = {row.row: row.mean for row in found.summary.only.table}
    digits, verdict = 1 if len(found.summary.seeds) > 1 else 0, found.summary.only.verdict
    documents = [net.document for net in found.nets]
    figures = [(f"{means[d.row]:.{digits}f}", f"errors of the {short(show.called(d), 60)}") for d in documents]
    if verdict:
        fewer = verdict.fewer_errors
        figures.append((f"{abs(fewer):.{digits}f}", f"{'fewer' if fewer >= 0 else 'more'} errors with soft targets"))
    if evaluated.teacher:
        kept = evaluated.teacher.multiply_adds_kept
        figures.append((f"{100 * kept:.2g} %", "of the teacher's multiply-adds"))
    return figures


def _per_class(found: Findings, scores: Sequence[Evaluation]) -> show.Table:
    """The errors of each net by class; of many classes, those with the most errors of the last net, a row each."""
    classes, names, tests = found.classes, [net.document.row for net in found.nets], [e.test for e in scores]
    if not found.wide:
        rows = [[name, *map(str, t.per_class_errors), str(t.errors)] for name, t in zip(names, tests, strict=True)]
        return show.Table("", ["errors by class", *classes, "all"], rows)
    worst = sorted(range(len(classes)), key=lambda c: -tests[-1].per_class_errors[c])[: show.WIDE]
    rows = [[classes[c], *(str(t.per_class_errors[c]) for t in tests)] for c in worst]
    return show.Table("", ["the worst classes", *names], [*rows, ["all", *(str(t.errors) for t in tests)]])


def _matrix(found: Findings, matrix: Tensor, columns: Sequence[str], form: str) -> Shaded:
    """A matrix [C, C], shaded off the diagonal from the least to the greatest; of many classes, its greatest pairs."""
    classes = found.classes
    if found.wide:
        rows = [[classes[i], classes[j], f"{matrix[i, j]:{form}}"] for i, j, _ in largest(matrix)]
        return Shaded(show.Table("", columns, rows))
    off = ~torch.eye(len(classes), dtype=torch.bool)
    least, most = matrix[off].min(), matrix[off].max()
    shades = ((matrix - least) / (most - least).clamp_min(1e-9) * off).tolist()
    rows = [[name, *(f"{value:{form}}" for value in row)] for name, row in zip(classes, matrix.tolist(), strict=True)]
    return Shaded(show.Table("", ["label", *classes], rows), shades)


def _hardest(found: Findings) -> list[tuple[int, list[Answer]]]:
    """The test images on which the last net's loss is greatest, and what each net says of them."""
    labels = found.dataset.test.labels
    loss = F.nll_loss(found.nets[-1].log_p, labels, reduction="none")

    def answers(i: int) -> list[Answer]:
        tops = [(net.document.row, int(net.log_p[i].argmax()), net.log_p[i].exp().max()) for net in found.nets[::-1]]
        return [Answer(row, found.classes[top], float(p), top != int(labels[i])) for row, top, p in tops]

    return [(i, answers(i)) for i in loss.topk(min(SHOWN, len(loss))).indices.tolist()]


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _image(split: Split, i: int) -> str:
    """An image of a split as a data URL, no larger than a page shows."""
    from PIL import Image

    buffer, image = io.BytesIO(), Image.fromarray(pixels(split, i))
    image.thumbnail((256, 256))
    image.save(buffer, "PNG")
    return _data_url(buffer.getvalue())
