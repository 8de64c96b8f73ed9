"""`kd init` looks at a folder of images and writes the experiment file that fits it."""

import json
import os
import re
import unicodedata
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jinja2
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from kdcli import BadInput
from kdcli.config import Experiment, Model
from kdcli.data.dataset import Dataset, Split, tenth
from kdcli.data.images import Folder, Header, headers, list_folder
from kdcli.data.sources import stratified
from kdcli.nets.models import build, fits, multiply_adds
from kdcli.plan import distinct, part, plan
from kdcli.report.show import duration
from kdcli.runs.directory import Places
from kdcli.runs.spec import Facts
from kdcli.training.engine import share
from kdcli.training.estimate import seconds
from kdcli.yamlfile import Loader

SEEN = 300_000  # images in a training: a first answer within hours on two cores
SIZES = (32, 64)  # pixels; the second, four times the time, on a GPU where the images are much larger


class Look(NamedTuple):
    """What a folder of images holds, and the images that an experiment makes of them."""

    folder: Folder
    headers: list[Header]
    train: Tensor  # labels
    test: Tensor
    size: int | None  # None where the images are small squares, all alike
    notes: list[str]

    @property
    def median(self) -> float:
        """Of the shorter sides, in pixels."""
        return median(min(one.width, one.height) for one in self.headers)

    @property
    def facts(self) -> Facts:
        channels = 1 if all(one.grey for one in self.headers) else 3
        side, half = self.size or self.headers[0].width, [0.5] * channels
        shape = [channels, side, side]
        return Facts(fingerprint="", classes=self.folder.classes, shape=shape, white=255, mean=half, std=half)

    def dataset(self) -> Dataset:
        """A dataset with these labels whose images are all the same noise, to plan and to time."""
        facts, noise = self.facts, torch.randint(256, (1, *self.facts.shape), dtype=torch.uint8)
        train, test = (Split(noise, y, 255, torch.zeros(len(y), dtype=torch.int64)) for y in (self.train, self.test))
        return Dataset(train, test, tenth(len(train), len(facts.classes)), facts)


def experiment_file(path: Path, teacher: str, student: str, places: Places) -> str:
    """A commented experiment file for a folder of images: its nets, sizes, epochs and time. Raises BadInput."""
    nets = {"teacher": _model("teacher", teacher), "student": _model("student", student)}
    look, name = _look(path, places.device != "cpu"), unicodedata.normalize("NFKD", Path(os.path.abspath(path)).name)
    name = re.sub(r"[^A-Za-z0-9]+", "-", "".join(c for c in name if not unicodedata.combining(c)))
    text = Path(__file__).with_name("init.yaml").read_text()
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    epochs, batch = min(max(round(SEEN / len(look.train)), 5), 60), 128 if len(look.train) >= 2_000 else 32
    dumps, name = partial(json.dumps, ensure_ascii=False), name.strip("-")[:100].rstrip("-") or "photos"
    read = yaml.compose(name, Loader)  # 2024 and null are no names
    name = name if read and read.tag.endswith(":str") else dumps(name)
    classes, omitted = look.folder.classes, dumps(look.folder.classes[0])
    try:  # to hold out the images on which the bias of omitted classes is chosen
        stratified(look.train.numpy(), tenth(len(look.train), len(classes)), classes)
    except BadInput:
        omitted = ""
    render = partial(
        template.render,
        look=look,
        name=name,
        path=dumps(os.path.abspath(path)),
        omitted=omitted,
        **{role: dumps(model.name) for role, model in nets.items()},
        costs=[_cost(model, look.facts) for model in nets.values()],
        each=torch.bincount(look.train).tolist(),
        sizes=sorted({(one.width, one.height) for one in look.headers}, key=lambda wh: wh[0] * wh[1]),
        epochs=epochs,
        batch=batch,
        jitter=min(4, look.facts.shape[1] // 8),
    )
    experiment, dataset = Experiment.model_validate(yaml.load(render(time=""), Loader)), look.dataset()
    specs = [job.spec for job in distinct(part(plan([experiment], dataset), "run"))]
    places, at_once = share(specs, places, None, None)
    spent = sum(seconds(specs, specs, dataset, places).values()) / at_once
    several = f", {at_once} trainings at once" if at_once > 1 else ""
    return str(render(time=f"about {duration(spent)} on this machine ({places.device}{several})"))


def _look(path: Path, fast: bool) -> Look:
    """Read the headers of all images of a folder, and choose a size for a machine that is fast or not. Raises
    BadInput."""
    folder = list_folder(path)
    found = headers([file for file, _ in (*folder.train, *folder.test)])
    train, test = (torch.tensor([c for _, c in part], dtype=torch.int64) for part in (folder.train, folder.test))
    notes = list(folder.notes)
    if not len(test):
        at = torch.from_numpy(stratified(train.numpy(), round(0.2 * len(train)), folder.classes))
        notes.append("A fixed 20% of every class becomes the test images: data.test sets another share.")
        test, train = train[at], train[~torch.isin(torch.arange(len(train)), at)]
    look = Look(folder, found, train, test, None, notes)
    alike = len({(one.width, one.height) for one in found}) == 1 and found[0].width == found[0].height <= SIZES[1]
    return look if alike else look._replace(size=min(SIZES[fast and look.median > 1.5 * SIZES[0]], round(look.median)))


def _model(role: str, name: str) -> Model:
    """A net by its name, of somebody's file with its whole path: where the text will lie is not known."""
    try:
        return Model(name=name)
    except ValidationError as error:
        raise BadInput(f"--{role} {name}: {error.errors()[0]['msg']}") from None


def _cost(model: Model, facts: Facts) -> str:
    """The parameters and the multiply-adds an image of a net. Raises BadInput where it does not fit the images."""
    fits(net := build(model, facts), model, facts)
    parameters = sum(p.numel() for p in net.parameters())
    return f"{parameters / 1e6:.2g} M parameters, {multiply_adds(net, facts.shape) / 1e6:.3g} M multiply-adds per image"
