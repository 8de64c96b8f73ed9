"""Teachers that were trained elsewhere: a net with a file of weights, or a library's; an ONNX file. Each becomes a net
that takes the images of a dataset and gives a logit for each of its classes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli import BadInput, BadKeys, code
from kdcli.config import Input, Model, Origin, TeacherSection
from kdcli.data.dataset import Dataset
from kdcli.data.sources import listed
from kdcli.machine.device import seeded
from kdcli.nets import models
from kdcli.runs.spec import Facts
from kdcli.teachers import hub
from kdcli.teachers.answers import CLOSE, PARTS, TINY, Answers, read_answers
from kdcli.teachers.weights import classes_of, fit_weights, last_layer, read_weights, stripped

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601), as Pillow converts


class Imported(NamedTuple):
    """A net as it was read, and what the reader should know of how."""

    net: nn.Module
    said: list[str]


class Seen(nn.Module):
    """A net before the images of a dataset that is not its own: given them in [0, 1], it sees them with its number of
    channels, size, range of values, mean and std; of its outputs those of the dataset's classes are taken. What a file
    may say of that is in the buffers, so that a run keeps it."""

    def __init__(self, net: nn.Module, own: Facts, bytes_: bool, pick: list[int]) -> None:
        super().__init__()
        self.net, self.own, self.scale = net, own, 255 if bytes_ else 1
        self.mean, self.std = (
            nn.Buffer(torch.tensor(values or [empty]).view(-1, 1, 1).repeat(own.shape[0] // max(len(values), 1), 1, 1))
            for values, empty in ((own.mean, 0.0), (own.std, 1.0))
        )
        self.pick = nn.Buffer(torch.tensor(pick))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes of the dataset] of images [N, C, H, W]."""
        channels, *size = self.own.shape
        if channels == 1 and x.shape[1] == 3:
            x = (x * x.new_tensor(LUMA).view(-1, 1, 1)).sum(1, keepdim=True)
        elif channels != x.shape[1]:
            x = x.expand(-1, channels, -1, -1)
        if size != list(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        logits: Tensor = self.net((x * self.scale - self.mean) / self.std)
        return logits.index_select(1, self.pick)

    def normalised(self, how: Input) -> "Seen":
        """The same net with another normalisation of its inputs."""
        own = self.own.model_copy(update={"mean": how.mean, "std": how.std})
        return Seen(self.net, own, how.range == 255, self.pick.tolist()).to(self.pick.device)


def resolved(origin: Origin, model: Model | None) -> tuple[Origin, str]:
    """An origin with what its library says of its inputs, and what tells its content: the checksum of its file, or the
    name of the library's weights. Raises BadInput when the file cannot be read, or the library has no weights."""
    if origin.file:
        try:
            return origin, _checksum(origin.file, Path(origin.file).stat().st_mtime_ns)
        except OSError as error:
            raise BadInput(f"{origin.file}: cannot be read: {error.strerror}") from None
    known = hub.pretrained(model.name or "" if model else "")
    given = origin.input.model_dump(exclude_unset=True) if origin.input else {}
    own = {"size": known.size, "channels": 3} | ({} if "mean" in given else {"mean": known.mean, "std": known.std})
    return origin.model_copy(update={"input": Input(**own | given)}), known.name


@cache
def _checksum(file: str, _: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def problems(key: str, teacher: TeacherSection, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """What keeps a teacher that was trained elsewhere from classifying the images of a dataset, by key."""
    if not teacher.origin:
        return
    facts = dataset.facts
    if facts.table and teacher.input and (teacher.input.size or teacher.input.channels or teacher.input.range != 1):
        yield f"{key}.input", "size, channels and range belong to images, and this is a table: remove them"
    elif absent := [c for c in facts.classes if c not in (teacher.classes or facts.classes)]:
        yield f"{key}.classes", f"lacks {', '.join(absent[:5])}: name the classes of its outputs, in their order"
    else:
        try:
            origin, content = resolved(teacher.origin, teacher.model)
            _tried(origin, teacher.model, dataset, bool(teacher.train), content)
        except BadKeys as error:
            yield from ((f"{key}.{name}", message) for name, message in error.problems)
        except BadInput as error:
            at = next((name for name in ("weights", "onnx", "logits") if getattr(teacher, name)), "model.name")
            yield f"{key}.{at}", "\n".join(error.lines)


@cache
def _tried(origin: Origin, model: Model | None, dataset: Dataset, trained: bool, _: str) -> None:
    """Read a teacher, once for each content. Raises BadInput as `answers` or `imported` does."""
    if origin.logits:
        answers(origin, dataset)
        return
    with seeded(0, "sample"):
        net = imported(origin, model, dataset.facts, load=bool(origin.file)).net
        if model:
            models.fits(net, model, dataset.facts, trained)  # of a net to throw away: it changes what BatchNorm keeps


def answers(origin: Origin, dataset: Dataset) -> Answers:
    """What a file of logits says of the images of a dataset. Raises BadInput as `answers_for` does, or where students
    see images that it leaves out."""
    file = Path(origin.logits or "")
    found = answers_for(dataset, file, origin.classes)
    if dataset.unlabelled and "unlabelled" not in found.logits:
        raise BadInput(f"{file}: has no answers for the images of data.unlabelled: add them")
    return found


def answers_for(dataset: Dataset, file: Path, order: Sequence[str] | None = None) -> Answers:
    """What a file says of the images of a dataset; where errors are counted on held-out images, what it says of all
    training images holds both. Raises BadInput as `read_answers` does."""
    sizes, files = {part: len(getattr(dataset, part) or ()) for part in PARTS}, dataset.files
    if not dataset.on_heldout:
        return read_answers(file, sizes, dataset.facts.classes, order, files)
    sizes, files = sizes | {"train": len(dataset.train.store), "test": 0}, listed(dataset.listings)
    found = read_answers(file, sizes, dataset.facts.classes, order, files)
    return found._replace(logits=found.logits | dataset.apart(found.logits["train"]))


def imported(
    origin: Origin | None, model: Model | None, facts: Facts, load: bool = True, content: bytes | None = None
) -> Imported:
    """The net of an origin, or a new one where there is none, for the images of a dataset: with the origin's weights
    unless `load` is false, when they are to come from a run; of ONNX they come with the file, or its `content`. Raises
    BadInput when the file or the library does not give such a net."""
    if origin and origin.onnx:
        return _of_onnx(content or Path(origin.onnx).read_bytes(), origin, facts)
    assert model
    if not origin:
        return Imported(models.build(model, facts), [])
    own = _facts_of(origin, model, facts)
    said: list[str] = []
    names = own.classes
    if model.pretrained and not origin.head:
        names = origin.classes or hub.pretrained(model.name or "").classes
    with code.blaming(model.file, f"{model.name or 'model'}: cannot be made"):
        inner = models.build(model, own.model_copy(update={"classes": names, "mean": [], "std": []}))
    fresh = last_layer(inner) if origin.head else ""
    if load and origin.weights:
        said, names, own = _loaded(inner, origin, own, names, fresh)
    elif load:
        said = hub.load(inner, model, len(names), own.shape[0], fresh)
    if origin.head:
        said.append(f"Its head, {fresh}, is newly initialised for the {len(facts.classes)} classes of the data.")
    if origin.freeze:
        head = last_layer(inner)
        for key, weight in inner.named_parameters():
            weight.requires_grad_(key.startswith(f"{head}."))
    return Imported(Seen(inner, own, _reads_bytes(origin), _picked(names, facts, said)), said)


def _facts_of(origin: Origin, model: Model | None, facts: Facts) -> Facts:
    """What the images and classes are to a net: its own where it says so, else the dataset's."""
    given, (channels, height, width) = origin.input or Input(), facts.shape
    shape = [given.channels or channels, given.size or height, given.size or width]
    mean, std = (facts.mean, facts.std) if model and facts.normalises(model) and not _reads_bytes(origin) else ([], [])
    if shape[0] == 1 < len(mean):
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    if given.mean:
        mean, std = given.mean, given.std or []
    if len(mean) not in (0, 1, shape[0]):
        numbers = "1 number" if shape[0] == 1 else f"1 number, or {shape[0]}: one per channel"
        raise BadKeys(("input.mean", f"must have {numbers}, not {len(mean)}"))
    classes = facts.classes if origin.head else origin.classes or facts.classes
    return facts.model_copy(update={"shape": shape, "mean": mean, "std": std, "classes": classes})


def _reads_bytes(origin: Origin) -> bool:
    return bool(origin.input and origin.input.range == 255)


def _loaded(
    inner: nn.Module, origin: Origin, own: Facts, names: list[str], fresh: str
) -> tuple[list[str], list[str], Facts]:
    """Give a net the weights of its file; how they were read, the names of its outputs and what its images are, both as
    `kd export` wrote them if it did."""
    file, given = Path(origin.weights or ""), bool(origin.input and (origin.input.mean or origin.input.range == 255))
    found = read_weights(file)
    tensors, said = stripped(found.tensors, [f"net.{key}" for key in inner.state_dict()])
    if {"mean", "scale"} <= tensors.keys():  # a net of kd's that normalises its inputs itself
        mean, std = tensors.pop("mean").flatten().tolist(), (1 / tensors.pop("scale")).flatten().tolist()
        found = found._replace(tensors=tensors)
        if not given:
            own = own.model_copy(update={"mean": mean, "std": std})
            said.append("Its own mean and std are in the file.")
    elif own.mean and not given:
        said = ["Its inputs are normalised with the mean and std of the data: set its input to change that."]
    said = [*found.said, *fit_weights(inner, found, file, fresh), *said]
    written = classes_of(found.about)
    if not origin.classes and not fresh and set(written) == set(names) and written != names:
        names = written
        said.append(f"The order of its classes is the one in the file: {', '.join(written[:10])}.")
    return said, names, own


def _picked(names: list[str], facts: Facts, said: list[str]) -> list[int]:
    """Which of a net's outputs are the dataset's classes, in their order."""
    if absent := [name for name in facts.classes if name not in names]:
        raise BadInput(
            f"has {len(names):,} classes, but not {absent[0]}, one of the data: name them in teacher.classes, "
            "in the order of its outputs, or replace its last layer with head: new"
        )
    if len(names) > len(facts.classes):
        said.append(f"Of its {len(names):,} classes the {len(facts.classes)} of the data are used.")
    return [names.index(name) for name in facts.classes]


class OnnxNet(nn.Module):
    """A net in an ONNX file, asked through onnxruntime on the CPU: in batches where it takes any number of images, else
    as many at a time as it does. Softmax outputs become log-probabilities, which are logits too."""

    def __init__(self, session: Any, shape: list[int], classes: int) -> None:
        super().__init__()
        self.session, (first, *_) = session, session.get_inputs()
        self.input, self.dims, self.kind = first.name, first.shape, first.type
        self.batch = self.dims[0] if isinstance(self.dims[0], int) else None
        self.last = _channels_last(self.dims)
        noise = torch.rand(self.batch or 4, *shape, generator=torch.Generator().manual_seed(0))
        outputs = self._run(noise)
        own = [i for i, y in enumerate(outputs) if y.ndim == 2 and y.shape[1] == classes and y.dtype.kind == "f"]
        if len(own) != 1:
            shapes = ", ".join(f"{y.dtype} {list(np.shape(y))}" for y in outputs)
            must = f"must give one output of floats for {classes} classes (name all of them in teacher.classes)"
            raise BadInput(f"{must}, and gives {shapes}")
        (self.output,), y = own, outputs[own[0]].astype(np.float64)
        self.probabilities = bool((y >= 0).all() and np.abs(y.sum(1) - 1).max() < CLOSE)
        self.between = bool((y >= 0).all() and (y <= 1).all()) and not self.probabilities

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W]."""
        n, parts = len(x), x.split(self.batch or max(len(x), 1))
        whole = [F.pad(part, (0, 0) * 3 + (0, (self.batch or len(part)) - len(part))) for part in parts]
        y = torch.cat([torch.from_numpy(self._run(part)[self.output].astype(np.float32)) for part in whole])[:n]
        return (y.clamp_min(TINY).log() if self.probabilities else y).to(x.device)

    def _run(self, x: Tensor) -> list[Any]:
        x = x.permute(0, 2, 3, 1) if self.last else x.flatten(1) if len(self.dims) == 2 else x
        kinds = {"tensor(float16)": "float16", "tensor(uint8)": "uint8", "tensor(double)": "float64"}
        images = np.ascontiguousarray(x.cpu().numpy()).astype(kinds.get(self.kind, "float32"))
        return list(self.session.run(None, {self.input: images}))


def _of_onnx(content: bytes, origin: Origin, facts: Facts) -> Imported:
    """The net in the content of an ONNX file. Raises BadInput when it cannot be run, or not on such images."""
    runtime = code.library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    # The file is told by its content, so nothing is looked for beside it, or in the folder of the caller.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    file = origin.onnx or ""
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        first, *more = session.get_inputs()
    except Exception as error:  # the runtime has a dozen kinds of its own
        why = "is damaged, cut short, or not an ONNX file"
        if "external" in str(error).lower():
            why = "has its weights in another file: save it whole, onnx.save(onnx.load(FILE), FILE)"
        raise BadInput(f"{file}: {why}") from None
    if more:
        raise BadInput(f"{file}: takes {1 + len(more)} inputs, not images alone")
    dims, said, names = [d if isinstance(d, int) else 0 for d in first.shape], list[str](), origin.classes
    own, names = _facts_of(_sized(origin, dims), None, facts), names or facts.classes
    try:
        net = OnnxNet(session, own.shape, len(names))
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{file}: takes {first.shape}, and cannot be given images {own.shape}: {why}") from None
    batch = f", {net.batch} at a time" if net.batch else ""
    outputs = "probabilities, whose logarithm is taken" if net.probabilities else "logits"
    images = f"rows of {own.shape[0]} columns" if facts.table else f"images {own.shape}"
    said.append(f"It takes {images}{batch}; its outputs are {outputs}.")
    if net.between:
        said.append("All its outputs lie between 0 and 1, and do not sum to 1: are they logits?")
    if not own.mean and not _reads_bytes(origin):
        within = "" if facts.table else "in [0, 1], "
        said.append(f"Its inputs are {within}not normalised: set its input to change that.")
    return Imported(Seen(net, own, _reads_bytes(origin), _picked(names, facts, said)), said)


def _sized(origin: Origin, dims: list[int]) -> Origin:
    """An origin with the channels and the size of the images that its ONNX file takes, [N, C, H, W] or [N, H, W, C], 0
    where it takes any. Raises BadKeys where the experiment says otherwise."""
    if len(dims) != 4:
        return origin
    channels, height, width = (dims[3], *dims[1:3]) if _channels_last(dims) else dims[1:]
    given = origin.input or Input()
    fixed = {"channels": channels} | ({"size": height} if height == width else {})
    for key, value in ((k, v) for k, v in fixed.items() if v):
        if getattr(given, key) not in (None, value):
            raise BadKeys((f"input.{key}", f"must be {value}, as the file says, or be left out"))
    own = given.model_copy(update={key: value for key, value in fixed.items() if value})
    return origin.model_copy(update={"input": own})


def _channels_last(dims: list[Any]) -> bool:
    """Whether inputs are [N, H, W, C], not [N, C, H, W]."""
    return len(dims) == 4 and dims[3] in (1, 3) and dims[1] not in (1, 3)
