"""What there is to show of the nets of the first seed beyond their errors, for the pictures and the page."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdcli import losses, score
from kdcli.config import Kind
from kdcli.data import Dataset, Split
from kdcli.results import Document, Summary, log_probabilities
from kdcli.runs import Epoch, Places, Run
from kdcli.show import WIDE
from kdcli.teacher import kept_logits, members

SHOWN = 10  # images in a gallery: whole rows of five on a screen and of two on a phone
PAIRS = 20  # of classes that are taken for each other most


class Net(NamedTuple):
    """A finished run, and its log p [N, C] at T = 1 on the test images; of an ensemble, by its average."""

    document: Document
    log_p: Tensor


class Example(NamedTuple):
    """An image to look at, [H, W, 3], and lines to read below it; the last one says what matters, and may be wrong."""

    image: NDArray[np.uint8]
    lines: list[str]
    wrong: bool = False


class Lesson(NamedTuple):
    """How a student was taught classes without examples."""

    student: Document
    names: str  # of the classes; of many, of the first
    transfer: list[Example]  # the images that say most of them
    changed: list[Example]  # test images of them of which the student says something else after the bias
    corrected: int  # test images that the bias makes right
    spoilt: int  # and those that it makes wrong


class Knowledge(NamedTuple):
    """What the teacher of the first seed knows beyond the labels."""

    T: float
    log_p: Callable[[float], Tensor]  # [N, C] of the test images, softened by what it is given
    mean: Tensor  # soft targets [C, C] of the training images by label, in per cent
    lessons: list[Lesson]


class Findings(NamedTuple):
    """What there is to show of an experiment without a grid, or of a run; all tensors on the CPU."""

    summary: Summary
    classes: list[str]
    wide: bool  # whether these are too many for a column each
    test: Split
    nets: list[Net]  # of the first seed, those that there are: teacher or ensemble, baseline, student or omission
    curves: list[tuple[str, list[Epoch]]]  # the trainings of their rows, of all seeds
    omissions: dict[str, list[Document]]  # by row, of all seeds
    worst: list[int]  # the classes to show, by the errors of the last net
    hardest: list[int]  # the test images on which its loss is greatest
    knowledge: Knowledge | None  # None of what no student can learn from: that keeps no soft targets


def find(summary: Summary, dataset: Dataset, places: Places) -> Findings:
    """What the runs of a summary have to show."""
    test = dataset.test
    documents = [d for d in summary.only.runs if isinstance(d, Document)]
    roles: list[Sequence[Kind]] = [("teacher", "ensemble"), ("baseline",), ("student", "omission")]
    chosen = [next((d for d in documents if d.kind in kinds), None) for kinds in roles]
    nets = [Net(d, log_probabilities(places.open(d.run), len(test))) for d in chosen if d]
    rows, last = {net.document.row for net in nets}, nets[-1]
    omissions = {d.row: [o for o in documents if o.row == d.row] for d in documents if d.kind == "omission"}
    firsts = [same[0] for same in omissions.values()]
    return Findings(
        summary=summary,
        classes=dataset.facts.classes,
        wide=len(dataset.facts.classes) > WIDE,
        test=test,
        nets=nets,
        curves=[(d.row, epochs) for d in documents if d.row in rows and (epochs := places.open(d.run).metrics())],
        omissions=omissions,
        worst=foremost(torch.tensor(last.document.test.per_class_errors)),
        hardest=F.nll_loss(last.log_p, test.labels, reduction="none").topk(min(SHOWN, len(test))).indices.tolist(),
        knowledge=_knowledge(last.document, firsts, dataset, places),
    )


def _knowledge(last: Document, firsts: Sequence[Document], data: Dataset, places: Places) -> Knowledge | None:
    """What the teacher of a net knows, or the net itself, at its T; None where it, or a member of it, is a baseline."""
    student = places.open(last.run)
    teacher = places.open(last.teacher.run) if last.teacher else student
    if any(member.spec.command == "baseline" for member in members(teacher)):
        return None
    labels, how, T = data.train.labels, teacher.spec.average, student.spec.distill.T if student.spec.distill else 4.0
    soft = losses.average(kept_logits(teacher, "train", len(labels)), T, how).exp()
    mean = torch.stack([100 * soft[labels == c].mean(0) for c in range(soft.shape[1])])
    lessons = [_lesson(document, places.open(document.run), soft, data) for document in firsts]
    return Knowledge(T, partial(losses.average, kept_logits(teacher, "test", len(data.test)), how=how), mean, lessons)


def _lesson(student: Document, run: Run, soft: Tensor, dataset: Dataset) -> Lesson:
    """The transfer images that the teacher finds most like classes never seen, by its soft targets [N, C] for the
    training images, and the test images of such classes that the bias changes."""
    train, test, names, omitted = dataset.train, dataset.test, dataset.facts.classes, student.omitted
    unseen, transfer = dataset.numbers(omitted), dataset.transfer_set(omitted, run.spec.data.transfer)
    taught, changed, share = [], [], soft[:, unseen].sum(1)
    for i in transfer[share[transfer].topk(min(SHOWN, len(transfer))).indices].tolist():
        own, like = int(train.labels[i]), int(unseen[soft[i, unseen].argmax()])
        together = [f"unseen: {share[i]:.3f}"] if len(omitted) > 1 else []
        lines = [f"label {names[own]}: {soft[i, own]:.3f}", *together, f"{names[like]}: {soft[i, like]:.3f}"]
        taught.append(Example(pixels(train, i), lines))
    logits = kept_logits(run, "test", len(test))[0]
    shifted = score.shift_bias(logits, unseen.tolist(), student.bias["heldout"].shift)
    labels, before, after = test.labels, logits.argmax(1), shifted.argmax(1)
    for i in (torch.isin(labels, unseen) & (before != after)).nonzero()[:SHOWN, 0].tolist():
        label, first, then = (names[int(of[i])] for of in (labels, before, after))
        lines = [f"label {label}", f"before: {first}", f"after: {then}"]
        changed.append(Example(pixels(test, i), lines, wrong=then != label))
    corrected, spoilt = (before != labels) & (after == labels), (before == labels) & (after != labels)
    listed = ", ".join(omitted[:WIDE]) + (f" and {len(omitted) - WIDE} more" if len(omitted) > WIDE else "")
    return Lesson(student, listed, taught, changed, int(corrected.sum()), int(spoilt.sum()))


def largest(matrix: Tensor) -> list[tuple[int, int, float]]:
    """The largest positive values off the diagonal of a matrix [C, C], largest first: row, column, value."""
    values, at = (matrix - matrix.diag().diag()).flatten().topk(min(PAIRS, matrix.numel()))
    return [(*divmod(i, len(matrix)), v) for i, v in zip(at.tolist(), values.tolist(), strict=True) if v > 0]


def shades(matrix: Tensor) -> list[list[float]]:
    """How dark the cells of a matrix [C, C] are: from 0, the least, to 1 off the diagonal; on the diagonal 0."""
    off = ~torch.eye(len(matrix), dtype=torch.bool)
    least, most = matrix[off].min(), matrix[off].max()
    return ((matrix - least) / (most - least).clamp_min(1e-9) * off).tolist()


def foremost(weights: Tensor, most: int = WIDE) -> list[int]:
    """The classes to show: all; of too many for a column each, the `most` with the greatest weights [C]."""
    few = len(weights) <= WIDE
    return list(range(len(weights))) if few else weights.argsort(descending=True, stable=True)[:most].tolist()


def short(name: str, most: int = 18) -> str:
    """A name without its middle where it is long."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def pixels(split: Split, i: int) -> NDArray[np.uint8]:
    """An image to look at, [H, W, 3]; one without three colours is the mean of its channels, dark on light."""
    image = split.images[i].float() * (255 / split.white)
    shown = image if len(image) == 3 else 255 - image.mean(0).expand(3, -1, -1)
    return np.asarray(shown.permute(1, 2, 0).round().byte())
