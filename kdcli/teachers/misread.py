"""Was a teacher that was trained elsewhere misread? What its answers on labelled images say of that."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcli import score
from kdcli.config import Input, Origin
from kdcli.data.dataset import Dataset
from kdcli.runs.spec import Reading
from kdcli.teachers.imports import Seen
from kdcli.teachers.teacher import predict

TRIED = 1_000  # training images, or up to twice as many, that another normalisation is tried on
USUAL = {  # how nets usually see images, by name
    "ImageNet's": Input(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    "CIFAR-10's": Input(mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616]),
    "MNIST's": Input(mean=[0.1307], std=[0.3081]),
    "from -1 to 1": Input(mean=[0.5], std=[0.5]),
    "none": Input(mean=[0.0], std=[1.0]),
    "bytes, from 0 to 255": Input(range=255, mean=[0.0], std=[1.0]),
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
        own, text = _renormalised(net, data, origin)
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
        f"{before:,}: {some}. Set its classes{whole}"
    )


def _renormalised(net: Seen, data: Dataset, origin: Origin) -> tuple[Input | None, str]:
    """The usual normalisation with which a net makes far fewer errors than with its own: two thirds at most, and ten
    fewer; and what to say of it."""
    images = data.train.at(torch.arange(0, len(data.train), max(len(data.train) // TRIED, 1))).to(net.pick.device)

    def errors(seen: Seen) -> int:
        return score.count_errors(predict(seen, images), images.labels).errors

    ways = {"the data's": Input(mean=data.facts.mean, std=data.facts.std)} if data.facts.mean else {}
    ways |= {} if data.facts.table else USUAL
    tried = {
        name: errors(net.normalised(way)) for name, way in ways.items() if len(way.mean or []) in (1, net.own.shape[0])
    }
    before, name = errors(net), min(tried, key=lambda name: tried[name])
    fewest, way = tried[name], ways[name]
    if 3 * fewest > 2 * before or before - fewest <= 10:
        return None, ""
    kept = origin.input.model_dump(include={"size", "channels"}, exclude_none=True) if origin.input else {}
    keys = kept | ({"range": 255} if way.range == 255 else {"mean": way.mean, "std": way.std})
    key = ", ".join(f"{name}: {value}" for name, value in keys.items())
    return way.model_copy(update=kept), (
        f"With another normalisation of its inputs ({name}) it makes {fewest:,} errors on {len(images):,} training "
        f"images, not {before:,}: set its input to {{{key}}}."
    )
