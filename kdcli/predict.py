"""`kd predict` asks a finished run, or an exported ONNX file, about images."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kdcli import BadInput, code, losses
from kdcli.config import Section
from kdcli.export import CPU, onnx_net, test_split
from kdcli.plan import there
from kdcli.runs import Places, Run
from kdcli.teacher import Teacher, live


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
    note: Callable[[str], None],
) -> Predictions:
    """What a run, or an exported ONNX file, says of image files and of test images by number; beside it what its
    teacher says, at each temperature. Raises BadInput for what is no image, no run, or out of range."""
    asked = _Asked(places, name, temperatures, note)
    grey, images = asked.shape[0] == 1, []
    if invert and not grey:
        raise BadInput(f"--invert: is for nets of grey images, and those of {name} have {asked.shape[0]} channels")
    for file in files:
        inputs = read_image(file, asked.shape, invert)
        light = grey and float(inputs.mean()) > 0.5
        images.append(Prediction(image=str(file), views=asked.views(inputs), mostly_ink=light))
    for i in test_images:
        if not asked.run:
            raise BadInput("--test-image: an exported file knows no dataset: name the run instead")
        test = test_split(asked.run, places.data_dir)
        if not 0 <= i < len(test):
            raise BadInput(f"--test-image {i}: there are images 0 to {len(test) - 1}")
        views, label = asked.views(test.inputs(torch.tensor([i]))), asked.classes[int(test.labels[i])]
        images.append(Prediction(image=f"test image {i}", label=label, views=views))
    return Predictions(run=asked.run.name if asked.run else name, classes=asked.classes, images=images)


class _Asked:
    """The net of a finished run, with the teacher that a student has, or the net in an exported file."""

    def __init__(self, places: Places, name: str, temperatures: Sequence[float], note: Callable[[str], None]) -> None:
        self.run: Run | None = None
        suffix = Path(name).suffix.lower()
        if suffix in (".safetensors", ".pt2"):
            raise BadInput(f"{name}: kd predict reads runs and .onnx files: name the run, or export it as onnx")
        if suffix == ".onnx":
            if list(temperatures) != [1]:
                raise BadInput("--T: an exported file has T = 1 built in: name the run instead")
            net, self.classes, self.shape = onnx_net(Path(name))
            self.nets = [("net", 1.0, Teacher(lambda _, x: net(x)[None].log()))]
            return
        self.run = run = places.open(name)
        run.result("asked")
        self.classes, self.shape, own = run.spec.dataset.classes, run.spec.dataset.shape, live(run, CPU)
        self.nets = [("net", T, own) for T in dict.fromkeys([1.0, *temperatures])]
        if run.spec.distill:
            parent = run.spec.parents[0]
            if teacher := there(places.runs_dir, parent):
                of_teacher = live(teacher, CPU)
                self.nets = [("student", 1.0, own), *(("teacher", T, of_teacher) for T in dict.fromkeys(temperatures))]
            else:
                note(f"{run.name}: without the view of its teacher: {parent}, or a member of it, is gone")

    def views(self, inputs: Tensor) -> list[View]:
        """What is said of an image [1, C, H, W]."""
        log_p = [losses.average(net.logits(torch.tensor([0]), inputs), T, net.average)[0] for _, T, net in self.nets]
        return [View(net=name, T=T, p=p.exp().tolist()) for (name, T, _), p in zip(self.nets, log_p, strict=True)]


def read_image(file: Path, shape: Sequence[int], invert: bool) -> Tensor:
    """An image file of any size as inputs [1, C, H, W] for a `shape` of 1 or 3 channels; what is transparent is ground.
    Grey ones are wholly seen, light on dark, centred on the ground; of colour images as much of the middle as has the
    shape. Raises BadInput."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise BadInput(f"{file}: image files are read with 1 or 3 channels, and this net takes {channels}")
    image, size = _opened(file), (0, 0)
    if channels == 1:  # a sheet with the shape of the net's images, of a strip not as huge as it is long
        image.thumbnail((2_000, 2_000), Image.Resampling.BOX)
        size = round(image.height * width / height), round(image.width * height / width)
    size = max(size[0], image.width), max(size[1], image.height)
    sheet = Image.new("L" if channels == 1 else "RGB", size, 255 if invert else 0)
    sheet.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2), image)
    to, how = (width, height), Image.Resampling
    seen = sheet.resize(to, how.BOX) if channels == 1 else ImageOps.fit(sheet, to, how.BILINEAR)
    values = torch.from_numpy(np.asarray(seen, np.float32) / 255)
    inputs = values.view(1, height, width, channels).permute(0, 3, 1, 2).contiguous()
    if channels == 1 and float(inputs.max() - inputs.min()) < 1 / 16:
        raise BadInput(f"{file}: is blank")
    return 1 - inputs if invert else inputs


def _opened(file: Path) -> Image.Image:
    """An image file as RGBA, held as the camera was."""
    too_large = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
    try:
        with too_large, Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGBA")
            if image.mode in ("I", "F"):
                raise BadInput(f"{file}: has pixels of mode {image.mode}: save it with 8 or 16 bits a pixel")
            return image.convert("RGBA")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{file}: is too large: {Image.MAX_IMAGE_PIXELS:,} pixels at most") from None
    except (OSError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "is not an image that can be read"
        raise BadInput(f"{file}: {reason}") from None
