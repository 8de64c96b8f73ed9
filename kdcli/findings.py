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
from kdcli.show import foremost
from kdcli.teacher import kept_logits, members

SHOWN = 10  # images in a gallery: whole rows of five on a screen and of two on a phone


class Net(NamedTuple):
    """A finished run, and its log p [N, C] at T = 1 on the test images; of an ensemble, by its average."""

    document: Document
    log_p: Tensor


class Lesson(NamedTuple):
    """How a student was taught classes without examples."""

    student: Document
    unseen: Tensor  # the classes, by number
    transfer: list[int]  # the training images that say most of them
    changed: list[int]  # test images of them of which the student says something else after the bias
    before: Tensor  # what the student says of every test image [N], and what it says after the bias
    after: Tensor
    corrected: int  # test images that the bias makes right
    spoilt: int  # and those that it makes wrong


class Knowledge(NamedTuple):
    """What the teacher of the first seed knows beyond the labels."""

    T: float
    log_p: Callable[[float], Tensor]  # [N, C] of the test images, softened by what it is given
    soft: Tensor  # targets [N, C] of the training images
    mean: Tensor  # of these [C, C] by label, in per cent
    lessons: list[Lesson]


class Findings(NamedTuple):
    """What there is to show of an experiment without a grid, or of a run; all tensors on the CPU."""

    summary: Summary
    train: Split
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
        train=dataset.train,
        test=test,
        nets=nets,
        curves=[(d.row, epochs) for d in documents if d.row in rows and (epochs := places.open(d.run).metrics())],
        omissions=omissions,
        worst=foremost(last.document.test.per_class_errors),
        hardest=F.nll_loss(last.log_p, test.labels, reduction="none").topk(min(SHOWN, len(test))).indices.tolist(),
        knowledge=_knowledge(last.document, firsts, dataset, places),
    )


def _knowledge(last: Document, firsts: Sequence[Document], data: Dataset, places: Places) -> Knowledge | None:
    """What the teacher of a net knows, or the net itself, at its T; None where it, or a member of it, is a baseline."""
    student = places.open(last.run)
    teacher = places.open(last.teacher.run) if last.teacher else student
    if any(member.spec.command == "baseline" for member in members(teacher)):
        return None
    labels, T = data.train.labels, student.spec.distill.T if student.spec.distill else 4.0
    how, weights = teacher.spec.average, teacher.spec.weights
    soft = losses.average(kept_logits(teacher, "train", len(labels)), T, how, weights).exp()
    mean = torch.stack([100 * soft[labels == c].mean(0) for c in range(soft.shape[1])])
    lessons = [_lesson(document, places.open(document.run), soft, data) for document in firsts]
    log_p = partial(losses.average, kept_logits(teacher, "test", len(data.test)), how=how, weights=weights)
    return Knowledge(T, log_p, soft, mean, lessons)


def _lesson(student: Document, run: Run, soft: Tensor, dataset: Dataset) -> Lesson:
    """The transfer images that the teacher finds most like classes never seen, by its soft targets [N, C] for the
    training images, and the test images of such classes that the bias changes."""
    labels, unseen = dataset.test.labels, dataset.numbers(student.omitted)
    transfer, share = dataset.transfer_set(student.omitted, run.spec.data.transfer), soft[:, unseen].sum(1)
    most = transfer[share[transfer].topk(min(SHOWN, len(transfer))).indices].tolist()
    logits = kept_logits(run, "test", len(labels))[0]
    shifted = score.shift_bias(logits, unseen.tolist(), student.bias["heldout"].shift)
    before, after = logits.argmax(1), shifted.argmax(1)
    changed = (torch.isin(labels, unseen) & (before != after)).nonzero()[:SHOWN, 0].tolist()
    return Lesson(student, unseen, most, changed, before, after, *score.discordant(shifted, logits, labels))


def shades(matrix: Tensor) -> list[list[float]]:
    """How dark the cells of a matrix [C, C] are: from 0, the least, to 1 off the diagonal; on the diagonal 0."""
    off = ~torch.eye(len(matrix), dtype=torch.bool)
    least, most = matrix[off].min(), matrix[off].max()
    return ((matrix - least) / (most - least).clamp_min(1e-9) * off).tolist()


def pixels(split: Split, i: int) -> NDArray[np.uint8]:
    """An image to look at, [H, W, 3]; one without three colours is the mean of its channels, dark on light. The row of
    a table is a strip, a cell a column, the darker the further above the mean of its column."""
    image = split.images(torch.tensor([i]))[0].float()
    if image.shape[1:] == (1, 1):
        columns = split.store[:, :, 0, 0].float()
        z = (image[:, 0, 0] - columns.mean(0)) / columns.std(0).clamp_min(1e-9)
        return np.asarray((255 * (0.5 - z / 6).clamp(0, 1)).round().byte()).reshape(1, -1, 1).repeat(3, 2)
    image *= 255 / split.white
    shown = image if len(image) == 3 else 255 - image.mean(0).expand(3, -1, -1)
    return np.asarray(shown.permute(1, 2, 0).round().byte())
