"""`kd predict` asks a finished run, or an exported ONNX file, about images."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kdcli import BadInput, code, losses
from kdcli.config import Section
from kdcli.export import CPU, onnx_net, test_split
from kdcli.plan import orphaned
from kdcli.runs import Places, Run
from kdcli.teacher import nets

Softened = Callable[[Tensor, float], Tensor]  # (images [B, C, H, W] in [0, 1], T) -> probabilities [B, classes]


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


class Asked(NamedTuple):
    """A net, the names of its classes, the shape [C, H, W] of its images; its run and its teacher, if it has them."""

    net: Softened
    classes: list[str]
    shape: list[int]
    run: Run | None = None
    teacher: Softened | None = None

    def views(self, inputs: Tensor, temperatures: Sequence[float]) -> list[View]:
        """What is said of an image [1, C, H, W] at T = 1, and at each temperature by the teacher, if there is one."""
        own, other = ("student", "teacher") if self.teacher else ("net", "net")
        hot = [T for T in dict.fromkeys(temperatures) if self.teacher or T != 1]
        asked = [(own, 1.0, self.net), *((other, T, self.teacher or self.net) for T in hot)]
        return [View(net=name, T=T, p=net(inputs, T)[0].tolist()) for name, T, net in asked]


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
    asked = _exported(name, temperatures) if name.lower().endswith(".onnx") else _run(places, name, note)
    channels, images = asked.shape[0], []
    if invert and channels != 1:
        raise BadInput(f"--invert: is for nets of grey images, and those of {name} have {channels} channels")
    for file in files:
        inputs = read_image(file, asked.shape, invert)
        light, views = channels == 1 and float(inputs.mean()) > 0.5, asked.views(inputs, temperatures)
        images.append(Prediction(image=str(file), views=views, mostly_ink=light))
    if test_images and not asked.run:
        raise BadInput("--test-image: an exported file knows no dataset: name the run instead")
    if test_images and asked.run:
        test = test_split(asked.run, places.data_dir)
        for i in test_images:
            if not 0 <= i < len(test):
                raise BadInput(f"--test-image {i}: there are images 0 to {len(test) - 1}")
            views, label = asked.views(test.inputs(torch.tensor([i])), temperatures), asked.classes[int(test.labels[i])]
            images.append(Prediction(image=f"test image {i}", label=label, views=views))
    return Predictions(run=asked.run.name if asked.run else name, classes=asked.classes, images=images)


def _exported(file: str, temperatures: Sequence[float]) -> Asked:
    if list(temperatures) != [1]:
        raise BadInput("--T: an exported file has T = 1 built in: name the run instead")
    net, classes, shape = onnx_net(Path(file))
    return Asked(lambda x, _: net(x), classes, shape)


def _run(places: Places, name: str, note: Callable[[str], None]) -> Asked:
    """A finished run and its teacher; it is noted when that is gone."""
    if Path(name).suffix in (".safetensors", ".pt2"):
        raise BadInput(f"{name}: kd predict reads runs and .onnx files: name the run, or export it as onnx")
    run, teacher = places.open(name), None
    run.result("asked")
    parent = run.spec.parents[0] if run.spec.parents and run.spec.command != "ensemble" else ""
    if parent and (places.runs_dir / parent).is_dir() and not orphaned(places.open(parent)):
        teacher = _softened(places.open(parent))
    elif parent:
        note(f"{run.name}: without the view of its teacher: {parent}, or a member of it, is gone")
    return Asked(_softened(run), run.spec.dataset.classes, run.spec.dataset.shape, run, teacher)


def _softened(run: Run) -> Softened:
    members, how = nets(run, CPU), run.spec.average
    return lambda x, T: losses.average(torch.stack([net(x) for net in members]), T, how).exp()


def read_image(file: Path, shape: Sequence[int], invert: bool) -> Tensor:
    """An image file of any size as inputs [1, C, H, W] for a `shape` of 1 or 3 channels; what is transparent is ground.
    Grey ones are wholly seen, light on dark, centred on the ground; of colour images as much of the middle as has the
    shape. Raises BadInput."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise BadInput(f"{file}: image files are read with 1 or 3 channels, and this net takes {channels}")
    pixels, size = _pixels(file), (0, 0)
    if channels == 1:  # a sheet with the shape of the net's images, of a strip not as huge as it is long
        pixels.thumbnail((2_000, 2_000), Image.Resampling.BOX)
        size = round(pixels.height * width / height), round(pixels.width * height / width)
    size = max(size[0], pixels.width), max(size[1], pixels.height)
    sheet = Image.new("RGBA", size, (255 if invert else 0,) * 3 + (255,))
    sheet.alpha_composite(pixels, ((sheet.width - pixels.width) // 2, (sheet.height - pixels.height) // 2))
    if channels == 3:
        seen = ImageOps.fit(sheet.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(seen, np.float32) / 255).permute(2, 0, 1)[None].contiguous()
    grey = sheet.convert("L").resize((width, height), Image.Resampling.BOX)
    values = torch.from_numpy(np.asarray(grey, np.float32) / 255)[None, None]
    if float(values.max() - values.min()) < 1 / 16:
        raise BadInput(f"{file}: is blank")
    return 1 - values if invert else values


def _pixels(file: Path) -> Image.Image:
    """An image file as RGBA, held as the camera was."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith("I;16"):
                    return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGBA")
                if image.mode in ("I", "F"):
                    raise BadInput(f"{file}: has pixels of mode {image.mode}: save it with 8 or 16 bits a pixel")
                return image.convert("RGBA")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{file}: is too large: {Image.MAX_IMAGE_PIXELS:,} pixels at most") from None
    except (OSError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is not an image that can be read"
        raise BadInput(f"{file}: {reason}") from None
