"""What there is to show of the nets of the first seed beyond their errors, for the pictures and the page."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdcli import losses, score
from kdcli.config import Kind
from kdcli.data.dataset import Dataset, Split
from kdcli.evidence.results import Document, Summary, log_probabilities
from kdcli.runs.directory import Places, Run
from kdcli.teachers.teacher import kept_logits, members

SHOWN = 10  # images in a gallery: whole rows of five on a screen and of two on a phone


class Net(NamedTuple):
    """A finished run, and its log p [N, C] at T = 1 on the test images; of an ensemble, by its average."""

    document: Document
    log_p: Tensor


class Lesson:
    """How a student was taught classes without examples."""

    def __init__(self, student: Document, run: Run, soft: Tensor, data: Dataset) -> None:
        labels, unseen = data.test.labels, data.numbers(student.omitted)
        self.student, self.unseen = student, unseen  # the classes, by number
        transfer, share = data.transfer_set(student.omitted, run.spec.data.transfer), soft[:, unseen].sum(1)
        self.transfer = transfer[_most(share[transfer])].tolist()  # the training images that say most of them
        logits = kept_logits(run, "test", len(labels))[0]
        shifted = score.shift_bias(logits, unseen.tolist(), student.bias["heldout"].shift)
        self.before, self.after = logits.argmax(1), shifted.argmax(1)  # the bias: what it says of every test image [N]
        changed = torch.isin(labels, unseen) & (self.before != self.after)
        self.changed = changed.nonzero()[:SHOWN, 0].tolist()  # of the test images of these classes
        self.corrected, self.spoilt = score.discordant(shifted, logits, labels)  # of all test images


class Knowledge:
    """What the teacher of the first seed knows beyond the labels."""

    def __init__(self, teacher: Run, student: Run, data: Dataset) -> None:
        labels, how, weights = data.train.labels, teacher.spec.average, teacher.spec.weights
        self.of_loss = student.spec.distill and student.spec.distill.T  # the temperature, of a loss that has one
        self.T = self.of_loss or 4.0
        # log p [N, C] of the test images, softened by what it is given
        self.log_p = partial(losses.average, kept_logits(teacher, "test", len(data.test)), how=how, weights=weights)
        # targets [N, C] of the training images, and their mean [C, C] by label, in per cent
        self.soft = losses.average(kept_logits(teacher, "train", len(labels)), self.T, how, weights).exp()
        self.mean = torch.stack([100 * self.soft[labels == c].mean(0) for c in range(self.soft.shape[1])])


class Findings:
    """What there is to show of an experiment without a grid, or of a run; all tensors on the CPU."""

    def __init__(self, summary: Summary, data: Dataset, places: Places) -> None:
        self.summary, self.train, self.test = summary, data.train, data.test
        self.names = data.files["test"]  # of the test images, where they are files
        documents = [d for d in summary.only.runs if isinstance(d, Document)]

        # Of all seeds, the nets that there are by row; of the first, also the test images on which the last is worst.
        roles: list[Sequence[Kind]] = [("teacher", "ensemble"), ("baseline",), ("student", "omission")]
        chosen = [next((d.row for d in documents if d.kind in kinds), None) for kinds in roles]
        self.over_seeds = {
            row: [Net(d, log_probabilities(places.open(d.run), len(self.test))) for d in documents if d.row == row]
            for row in filter(None, chosen)
        }
        self.nets = [nets[0] for nets in self.over_seeds.values()]
        last = self.nets[-1]
        self.hardest = _most(F.nll_loss(last.log_p, self.test.labels, reduction="none")).tolist()

        # The trainings of their rows, and the students without some classes by row.
        rows = self.over_seeds.keys()
        self.curves = [(d.row, epochs) for d in documents if d.row in rows and (epochs := places.open(d.run).metrics())]
        self.omissions = {d.row: [o for o in documents if o.row == d.row] for d in documents if d.kind == "omission"}

        # What the last net's teacher knows, or the net itself if it is one, if it kept what it says of all images.
        student = places.open(last.document.run)
        own = student if last.document.kind in roles[0] else None
        teacher = places.open(last.document.teacher.run) if last.document.teacher else own
        if teacher and not all({"train", "test"} <= member.load("logits").keys() for member in members(teacher)):
            teacher = None
        self.knowledge = known = Knowledge(teacher, student, data) if teacher else None
        firsts = [same[0] for same in self.omissions.values()]
        self.lessons = [Lesson(d, places.open(d.run), known.soft, data) for d in firsts] if known else []


def _most(values: Tensor) -> Tensor:
    """The positions of the largest values, as many as are shown."""
    return values.argsort(descending=True)[:SHOWN]


def pixels(split: Split, i: int, photo: bool) -> NDArray[np.uint8]:
    """An image to look at, [H, W, 3]; one without three colours is the mean of its channels and, unless it is a photo,
    dark on light. The row of a table is a strip, a cell a column, the darker the further above the mean of its column.
    """
    image = split.images(torch.tensor([i]))[0].float()
    if image.shape[1:] == (1, 1):
        columns = split.store[:, :, 0, 0].float()
        z = (image[:, 0, 0] - columns.mean(0)) / columns.std(0).clamp_min(1e-9)
        return np.asarray((255 * (0.5 - z / 6).clamp(0, 1)).round().byte()).reshape(1, -1, 1).repeat(3, 2)
    image *= 255 / split.white
    grey = image.mean(0).expand(3, -1, -1)
    shown = image if len(image) == 3 else grey if photo else 255 - grey
    return np.asarray(shown.permute(1, 2, 0).round().byte())
