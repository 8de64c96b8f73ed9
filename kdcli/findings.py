"""What there is to show of the nets of the first seed beyond their errors, for the pictures and the page."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli import losses, score
from kdcli.config import Average, Kind
from kdcli.data import Dataset, Split
from kdcli.plan import Job
from kdcli.results import Document, Summary, log_probabilities
from kdcli.runs import Epoch, Places, Run
from kdcli.show import WIDE
from kdcli.teacher import kept_logits, members

SHOWN = 10  # images in a gallery: whole rows of five on a screen and of two on a phone
PAIRS = 20  # of classes that are taken for each other most


class Net(NamedTuple):
    """A finished run and its log p [N, C] at T = 1 on the test images; of an ensemble, by its average."""

    document: Document
    run: Run
    log_p: Tensor


class Taught(NamedTuple):
    """A transfer image and its soft targets: of all unseen classes, of the likeliest of them, of its own class."""

    image: int
    unseen: float
    like: str
    p: float
    own: float


class Changed(NamedTuple):
    """A test image of an unseen class, and what the student says of it before and after the bias."""

    image: int
    before: str
    after: str


class Lesson(NamedTuple):
    """How classes were taught without examples."""

    omitted: list[str]
    shift: float  # the bias chosen on held-out images
    transfer: list[Taught]
    changed: list[Changed]
    corrected: int  # test images that the bias makes right
    spoilt: int  # and those that it makes wrong

    @property
    def names(self) -> str:
        """The classes; of many, the first of them."""
        more = len(self.omitted) - WIDE
        return ", ".join(self.omitted[:WIDE]) + (f" and {more} more" if more > 0 else "")


class Knowledge(NamedTuple):
    """What the teacher of the first seed knows beyond the labels."""

    T: float
    logits: Tensor  # [M, N, C] of its M members on the test images
    average: Average
    mean: Tensor  # soft targets [C, C] of the training images by label, in per cent
    lessons: dict[str, Lesson]  # by row: "omit 3"


class Findings(NamedTuple):
    """What there is to show of an experiment without a grid, or of a run; all tensors on the CPU."""

    summary: Summary
    documents: list[Document]
    dataset: Dataset
    nets: list[Net]  # of the first seed, those that there are: teacher or ensemble, baseline, student or omission
    curves: list[tuple[str, list[Epoch]]]  # the trainings of their rows, of all seeds
    knowledge: Knowledge | None  # None of what no student can learn from: that keeps no soft targets

    @property
    def classes(self) -> list[str]:
        return self.summary.classes

    @property
    def wide(self) -> bool:
        """Whether there are too many classes for a column each."""
        return len(self.classes) > WIDE

    def label(self, split: Split, i: int) -> str:
        return self.classes[int(split.labels[i])]


def find(summary: Summary, jobs: Sequence[Job], dataset: Dataset, places: Places) -> Findings:
    """What the runs of some jobs, those of the summary, have to show."""
    dataset = dataset.to(torch.device("cpu"))
    runs = {job.spec.name: Run(places.runs_dir, job.spec) for job in jobs}
    documents = [d for d in summary.only.runs if isinstance(d, Document)]
    roles: list[Sequence[Kind]] = [("teacher", "ensemble"), ("baseline",), ("student", "omission")]
    chosen = [next((d for d in documents if d.kind in kinds), None) for kinds in roles]
    nets = [Net(d, runs[d.run], log_probabilities(runs[d.run], len(dataset.test))) for d in chosen if d]
    rows = {net.document.row for net in nets}
    curves = [(d.row, runs[d.run].metrics()) for d in documents if d.row in rows]
    taught_by = nets[-1].document.teacher
    teacher = places.open(taught_by.run) if taught_by else nets[0].run
    lacking: dict[str, Document] = {}
    for d in documents:
        if d.kind == "omission":
            lacking.setdefault(d.row, d)
    known = _knowledge(teacher, nets[-1].run, dataset, [(d, runs[d.run]) for d in lacking.values()])
    return Findings(summary, documents, dataset, nets, curves, known)


def _knowledge(
    teacher: Run, student: Run, dataset: Dataset, omissions: Sequence[tuple[Document, Run]]
) -> Knowledge | None:
    """What a teacher knows, at its student's T; None where it, or a member of it, is a baseline."""
    if any(member.spec.command == "baseline" for member in members(teacher)):
        return None
    labels, T = dataset.train.labels, student.spec.distill.T if student.spec.distill else 4.0
    soft = losses.average(kept_logits(teacher, "train", len(labels)), T, teacher.spec.average).exp()
    classes = soft.shape[1]
    sums = torch.zeros(classes, classes, dtype=soft.dtype).index_add_(0, labels, soft)
    return Knowledge(
        T,
        kept_logits(teacher, "test", len(dataset.test)),
        teacher.spec.average,
        100 * sums / torch.bincount(labels, minlength=classes)[:, None],
        {document.row: _lesson(document, run, soft, dataset) for document, run in omissions},
    )


def _lesson(document: Document, run: Run, soft: Tensor, dataset: Dataset) -> Lesson:
    """The transfer images that the teacher finds most like classes never seen, by its soft targets [N, C] for the
    training images, and the test images of such classes that the bias changes."""
    spec, train, labels, names = run.spec, dataset.train, dataset.test.labels, dataset.facts.classes
    unseen, transfer = dataset.numbers(spec.omitted), dataset.transfer_set(spec.omitted, spec.data.transfer)
    taught = []
    share = soft[transfer][:, unseen].sum(1)
    for k in share.topk(min(SHOWN, len(share))).indices.tolist():
        i = int(transfer[k])
        like = int(unseen[soft[i, unseen].argmax()])
        taught.append(Taught(i, float(share[k]), names[like], float(soft[i, like]), float(soft[i, train.labels[i]])))
    shift, logits = document.bias["heldout"].shift, kept_logits(run, "test", len(labels))[0]
    before, after = logits.argmax(1), score.shift_bias(logits, unseen.tolist(), shift).argmax(1)
    changed = (torch.isin(labels, unseen) & (before != after)).nonzero()[:SHOWN, 0].tolist()
    corrected, spoilt = (before != labels) & (after == labels), (before == labels) & (after != labels)
    return Lesson(
        spec.omitted,
        shift,
        taught,
        [Changed(i, names[int(before[i])], names[int(after[i])]) for i in changed],
        int(corrected.sum()),
        int(spoilt.sum()),
    )


def largest(matrix: Tensor) -> list[tuple[int, int, float]]:
    """The largest positive values off the diagonal of a matrix [C, C], largest first: row, column, value."""
    classes = len(matrix)
    values, at = matrix.double().clone().fill_diagonal_(0).flatten().topk(min(PAIRS, classes**2))
    return [(i // classes, i % classes, v) for i, v in zip(at.tolist(), values.tolist(), strict=True) if v > 0]


def short(name: str, most: int = 18) -> str:
    """A name without its middle where it is long."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def pixels(split: Split, i: int) -> NDArray[np.uint8]:
    """An image to look at: [H, W, 3] of a colour image; else [H, W], the mean of the channels, dark on light."""
    image = split.images[i].float() * (255 / split.white)
    shown = image.permute(1, 2, 0) if len(image) == 3 else 255 - image.mean(0)
    return np.asarray(shown.round().byte())
