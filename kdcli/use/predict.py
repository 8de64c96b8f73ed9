"""`kd predict` asks a finished run, or an exported ONNX file, about images."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kdcli import BadInput, Note, code, losses
from kdcli.config import Section
from kdcli.data.dataset import Split
from kdcli.data.images import open_image, to_bytes
from kdcli.plan import there
from kdcli.runs.directory import Places, Run
from kdcli.teachers.teacher import Teacher, dataset_of, live
from kdcli.use.export import CPU, SUFFIXES, onnx_net

SAMPLE = 2_000  # training images that an image is compared with
Asked = list[tuple[str, float, Teacher]]  # what, at which temperature, through what


class View(Section):
    """What the `student`, its `teacher`, or a lone `net` says at a temperature: the probability of each class."""

    net: str
    T: float
    p: list[float]


class Prediction(Section):
    """What is said of an image."""

    image: str
    label: str | None = None  # of a test image
    views: list[View]
    mostly_ink: bool = False  # a grey image file more light than dark
    nearer: float | None = None  # the share of test images that are nearer to the training images than an image file


class Predictions(Section):
    """The document of `kd predict`."""

    command: str = "predict"
    run: str
    classes: list[str]
    images: list[Prediction]


@code.quiet()
def predict(
    places: Places,
    name: str,
    files: Sequence[Path],
    test_images: Sequence[int],
    temperatures: Sequence[float],
    invert: bool,
    note: Note,
) -> Predictions:
    """What a run, or an exported ONNX file, says of image files and of test images by number; beside it what its
    teacher says, at each temperature. Raises BadInput for what is no image, no run, or out of range."""
    run = None
    if Path(name).suffix.lower() in SUFFIXES.values():
        if list(temperatures) != [1]:
            raise BadInput("--T: an exported file has T = 1 built in: name the run instead")
        net, made_of, classes, shape, middle = onnx_net(Path(name))
        asked: Asked = [("net", 1.0, Teacher(lambda _, x: net(x)[None].log()))]
    else:
        run = places.open(name)
        if files and run.spec.dataset.table:
            raise BadInput(f"{run.name}: classifies the rows of a table, not image files: use --test-image N")
        made_of, middle = run.name, run.spec.data.folder is not None
        classes, shape, asked = run.spec.dataset.classes, run.spec.dataset.shape, _of_run(run, temperatures, note)
    grey, images = shape[0] == 1, list[Prediction]()
    if invert and not grey:
        raise BadInput(f"--invert: is for nets of grey images, and those of {name} have {shape[0]} channels")
    read = [(file, read_image(file, shape, invert, middle)) for file in files]
    nearer = _nearer(places, made_of, note) if files else None
    for file, inputs in read:
        light = grey and not middle and float(inputs.mean()) > 0.5
        share = nearer(inputs) if nearer else None
        images.append(Prediction(image=str(file), views=_views(asked, inputs), mostly_ink=light, nearer=share))
    if test_images and not run:
        raise BadInput("--test-image: an exported file does not record its dataset: name the run instead")
    images += _of_test(run, asked, test_images, places.data_dir) if test_images and run else []
    return Predictions(run=run.name if run else name, classes=classes, images=images)


def _of_test(run: Run, asked: Asked, numbers: Sequence[int], data_dir: Path | None) -> Iterator[Prediction]:
    """What is said of test images. Raises BadInput for one that is not there."""
    dataset = dataset_of(run, data_dir)
    test, names, classes = dataset.test, dataset.files["test"], dataset.facts.classes
    for i in numbers:
        if not 0 <= i < len(test):
            raise BadInput(f"--test-image {i}: there are images 0 to {len(test) - 1}")
        views, label = _views(asked, test.inputs(torch.tensor([i]))), classes[int(test.labels[i])]
        yield Prediction(image=f"test image {i}{f' ({names[i]})' if names else ''}", label=label, views=views)


def _of_run(run: Run, temperatures: Sequence[float], note: Note) -> Asked:
    """What to ask of a finished run: itself and, of a student, its teacher, if that can be asked."""
    run.result("used for prediction")
    own, parent = live(run, CPU), run.spec.parents[0] if run.spec.distill else ""
    if parent:
        try:
            if not (teacher := there(run.root, parent)):
                raise BadInput(f"{parent}, or a member of it, is gone")
            asked = live(teacher, CPU)
            return [("student", 1.0, own), *(("teacher", T, asked) for T in dict.fromkeys(temperatures))]
        except BadInput as error:
            note(f"{run.name}: without its teacher's predictions: {error}")
    return [("net", T, own) for T in dict.fromkeys([1.0, *temperatures])]


def _nearer(places: Places, name: str, note: Note) -> Callable[[Tensor], float] | None:
    """What gives the share of a run's test images that are nearer to its training images than an image [1, C, H, W]:
    near is what correlates most with one of them, pixel for pixel, of a sample of both. None where they are gone."""
    try:
        if not (run := there(places.runs_dir, name)):
            raise BadInput("the run that it was exported from is not in the runs folder")
        dataset = dataset_of(run, places.data_dir)
    except BadInput as error:
        note(f"cannot say how unlike the training images these are: {error}")
        return None

    def sampled(split: Split, most: int) -> Tensor:
        chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:most]
        return torch.cat([_standardized(split.inputs(some)) for some in chosen.split(100)])

    trained = sampled(dataset.train, SAMPLE)
    others = (sampled(dataset.test, SAMPLE // 4) @ trained.T).amax(1)
    return lambda inputs: float((others > (_standardized(inputs) @ trained.T).amax()).float().mean())


def _standardized(inputs: Tensor) -> Tensor:
    """Images [N, C, H, W], of 64 x 64 pixels at most, as rows of mean 0 and length 1: the product of two is their
    correlation."""
    height, width = inputs.shape[2:]
    rows = F.adaptive_avg_pool2d(inputs, (min(height, 64), min(width, 64))).flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True))


def _views(asked: Asked, inputs: Tensor) -> list[View]:
    """What is said of an image [1, C, H, W]."""
    log_p = [
        losses.average(net.logits(torch.tensor([0]), inputs), T, net.average, net.weights)[0] for _, T, net in asked
    ]
    return [View(net=name, T=T, p=p.exp().tolist()) for (name, T, _), p in zip(asked, log_p, strict=True)]


def read_image(file: Path, shape: Sequence[int], invert: bool, middle: bool = False) -> Tensor:
    """An image file of any size as inputs [1, C, H, W] for a `shape` of 1 or 3 channels; what is transparent is ground.
    Of colour images, and where `middle` says so, as much of the middle as has the shape is seen, as in training on a
    folder; grey ones are else wholly seen, light on dark, centred on the ground. Raises BadInput."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise BadInput(f"{file}: image files are read with 1 or 3 channels, and this net takes {channels}")
    if file.is_dir():
        raise BadInput(f"{file}: is a folder: name the image files in it")
    image = open_image(file, min(height, width) if channels == 3 or middle else 0)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        raise BadInput(f"{file}: is entirely transparent: save it without its alpha channel, or on a background")
    if channels == 3 or middle:
        array = to_bytes(image, (width, height), channels)
    else:
        image = image.convert("LA")
        image.thumbnail((2_000, 2_000), Image.Resampling.BOX)
        # a sheet with the shape of the net's images, of a strip not as huge as it is long
        w, h = image.size
        size = max(w, round(h * width / height)), max(h, round(w * height / width))
        sheet = Image.new("L", size, 255 if invert else 0)
        sheet.paste(image.getchannel("L"), ((size[0] - w) // 2, (size[1] - h) // 2), image.getchannel("A"))
        array = to_bytes(sheet.resize((width, height), Image.Resampling.BOX), None, 1)
    inputs = torch.from_numpy(array.astype(np.float32) / 255)[None]
    if channels == 1 and float(inputs.max() - inputs.min()) < 1 / 16:
        raise BadInput(f"{file}: is blank: name an image with something on it")
    return 1 - inputs if invert else inputs
