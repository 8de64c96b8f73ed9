"""Was a teacher that was trained elsewhere misread? What its answers on labelled images say of that."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kdcli import score
from kdcli.config import Input, Origin
from kdcli.data.dataset import Dataset, Split
from kdcli.runs.spec import Facts, Reading
from kdcli.teachers.imports import Seen
from kdcli.teachers.teacher import predict

TRIED = 1_000  # training images that another normalisation is tried on
# The usual normalisations by name: mean and standard deviation of inputs in [0, 1].
USUAL = {
    "ImageNet's": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "CIFAR-10's": ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]),
    "MNIST's": ([0.1307], [0.3081]),
    "from -1 to 1": ([0.5], [0.5]),
    "none": ([0.0], [1.0]),
}


def reading(net: nn.Module | None, logits: Tensor, data: Dataset, origin: Origin, said: list[str]) -> Reading:
    """How a teacher reads the images of a dataset, by its logits [N, C] on the training images; a net is tried with
    other normalisations too."""
    labels, warnings = data.train.labels, list[str]()
    train, guessing = score.count_errors(logits, labels), score.errors_of_guessing(labels)
    if train.errors >= guessing:
        of = f"{train.errors:,} errors on {train.total:,} training images"
        warnings.append(f"It makes {of}: no better than guessing, {guessing:,}.")
    order = permutation(logits, labels)
    classes = _renamed(order, data.facts.classes, origin) if order else []
    if order:
        after = int((logits.argmax(1) != torch.tensor(order)[labels]).sum())
        found = _of_order(order, data.facts.classes, train.errors, after, classes)
        file = " or, where the file names its columns, correct them" if origin.logits and not origin.classes else ""
        warnings.append(f"{found}{file}.")
    own = None
    if isinstance(net, Seen) and not order:
        own, text = _renormalised(net, data)
        warnings += [text] if text else []
    return Reading(said=said, transfer=train, classes=classes, input=own, warnings=warnings)


def permutation(logits: Tensor, labels: Tensor) -> list[int] | None:
    """Which output of logits [N, C] stands for each class where another order of them at least halves the errors on
    labels [N]; None where it does not. The best order is a linear assignment on the confusion matrix."""
    from scipy.optimize import linear_sum_assignment

    n, c = logits.shape
    pairs = torch.bincount(labels * c + logits.argmax(1), minlength=c * c).view(c, c)
    _, columns = linear_sum_assignment(pairs.numpy(), maximize=True)
    before, after = n - int(pairs.diag().sum()), n - int(pairs[torch.arange(c), torch.from_numpy(columns)].sum())
    explained = 2 * after <= before and after < score.errors_of_guessing(labels)
    return list(map(int, columns)) if before and explained else None


def _renamed(order: Sequence[int], classes: Sequence[str], origin: Origin) -> list[str]:
    """The names of a teacher's outputs as they must be: the output `order[c]` of those in use is class c."""
    names = list(origin.classes or classes)
    places = [names.index(name) for name in classes]
    for c, output in enumerate(order):
        names[places[output]] = classes[c]
    return names


def _of_order(order: Sequence[int], classes: Sequence[str], before: int, after: int, names: Sequence[str]) -> str:
    moved = [f"what it calls {classes[output]} is {classes[c]}" for c, output in enumerate(order) if output != c]
    some = "; ".join(moved[:10]) + (f"; and {len(moved) - 10} more" if len(moved) > 10 else "")
    whole = f": [{', '.join(names)}]" if len(names) <= 20 else " in that order (--json has it whole)"
    return (
        f"Its classes seem to be in another order, with which it makes {after:,} errors on the training images, not "
        f"{before:,}: {some}. Set teacher.classes{whole}"
    )


def _renormalised(net: Seen, data: Dataset) -> tuple[Input | None, str]:
    """The usual normalisation with which a net makes far fewer errors than with its own: two thirds at most, and ten
    fewer; and what to say of it."""
    step = max(len(data.train) // TRIED, 1)
    images = data.train.at(torch.arange(0, len(data.train), step)).to(next(net.buffers(), torch.empty(0)).device)
    before = score.count_errors(predict(net, images), images.labels).errors
    found = [
        (_errors(net, images, mean, std, range_), name, mean, std, range_)
        for name, mean, std, range_ in _usual(data.facts, net.own.shape[0])
    ]
    fewest, name, mean, std, range_ = min(found, key=lambda one: one[0])
    if 3 * fewest > 2 * before or before - fewest <= 10:
        return None, ""
    given = Input(range=255 if range_ == 255 else 1, mean=mean, std=std)
    key = "{range: 255}" if range_ == 255 else f"{{mean: {mean}, std: {std}}}"
    return given, (
        f"With another normalisation of its inputs ({name}) it makes {fewest:,} errors on {len(images):,} training "
        f"images, not {before:,}: set teacher.input to {key}."
    )


def _usual(facts: Facts, channels: int) -> Iterator[tuple[str, list[float], list[float], int]]:
    """Name, mean, std and range of what is usual for a net that sees so many channels."""
    known = {"the data's": (facts.mean, facts.std)} | ({} if facts.table else USUAL)
    for name, (mean, std) in known.items():
        if len(mean) in (1, channels):
            yield name, mean, std, 1
    if not facts.table:
        yield "bytes, from 0 to 255", [0.0], [1.0], 255


def _errors(net: Seen, images: Split, mean: list[float], std: list[float], range_: int) -> int:
    return score.count_errors(predict(net.normalised(mean, std, range_ == 255), images), images.labels).errors
