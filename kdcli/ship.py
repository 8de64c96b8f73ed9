"""Using what was trained: `kd export` writes a net for others to run and proves it, `kd predict` asks one."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import BadInput, Failed, core, metrics
from kdcli.config import CLASSES, DATASETS, Data
from kdcli.data import Split
from kdcli.recipes import cost, loaded, nets
from kdcli.runs import Document, Run, open_run, write_aside

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-5  # between probabilities, which differ by the order in which sums are taken
CPU = torch.device("cpu")
Softened = Callable[[Tensor, float], Tensor]  # (inputs [N, D], T) -> probabilities [N, C]


class Probabilities(nn.Module):
    """A net, or the members of an ensemble, with the softmax at its end: inputs [N, D] -> probabilities [N, C]."""

    def __init__(self, members: Sequence[core.MLP], how: str) -> None:
        super().__init__()
        self.members, self.how = nn.ModuleList(members), how

    def forward(self, inputs: Tensor) -> Tensor:
        logits = torch.stack([member(inputs) for member in self.members])
        if self.how == "arithmetic":
            return logits.softmax(-1).mean(0)
        return logits.mean(0).softmax(-1)


def export(run: Run, form: str, file: Path | None, data_dir: Path | None) -> Document:
    """Write a finished run's net as `file` and its model card beside it, after the written net has classified all test
    images as torch does. Raises BadInput for a run or place that cannot be; Failed where the two disagree."""
    if not run.completed:
        raise BadInput(f"{run.name}: is {run.status}: cannot be exported; {run.how_to_finish}")
    file = file or Path(f"{run.name.replace('/', '-')}{FORMATS[form]}")
    if file.suffix != FORMATS[form] or not file.parent.is_dir():
        raise BadInput(
            f"--out {file}: must be a file in a folder that exists, with a name that ends in {FORMATS[form]}"
        )
    card = file.with_name(f"{file.name}.md")
    for taken in (file, card):
        if os.path.lexists(taken):
            raise BadInput(f"{taken}: is there already: remove it, or choose another --out")
    test = loaded(Data(**run.spec.settings["data"]), data_dir, CPU).test
    model = Probabilities(nets(run, CPU), run.spec.settings.get("average", "arithmetic")).eval()
    content = {"onnx": _onnx, "torch": _torch, "safetensors": _safetensors}[form](model, run)
    aside = file.with_name(f"unproved-{file.name}")
    try:
        write_aside(aside, content)
    except OSError as error:
        raise BadInput(f"--out {file}: cannot be written: {error.strerror}") from None
    try:
        wanted, found = _asked(model, test), _asked(_opened(aside, form, model), test)
    finally:
        aside.unlink()
    difference = float((wanted - found).abs().max())
    counted, theirs = metrics.count_errors(wanted, test.labels), metrics.count_errors(found, test.labels)
    if difference > TOLERANCE or theirs["errors"] != counted["errors"]:
        raise Failed(f"{file}: differs from torch by {difference:.2g}, {theirs['errors']} errors: not written")
    write_aside(file, content)
    document = {"command": "export", "run": run.name, "format": form, "file": str(file), "bytes": len(content)}
    document |= {"max_difference": difference, "errors": theirs["errors"], "torch_errors": counted["errors"]}
    document |= {"total": len(test), "card": str(card), "net": _shape(model)}
    write_aside(card, _card(run, document, metrics.score(wanted.log(), test.labels)).encode())
    return document


@torch.inference_mode()
def _asked(net: Callable[[Tensor], Tensor], test: Split) -> Tensor:
    """Probabilities [N, C] on all test images."""
    return torch.cat([net(test.inputs(index)) for index in torch.arange(len(test)).split(1000)])


def _onnx(model: Probabilities, run: Run) -> bytes:
    """The net as an ONNX graph, written out layer by layer."""
    onnx = _onnx_library("onnx")
    nodes, weights, outputs = [], [], []
    for i, member in enumerate(model.members):
        assert isinstance(member, core.MLP)
        x, layers = "inputs", member.linears()
        for j, layer in enumerate(layers):
            names = f"member{i}.layer{j}.weight", f"member{i}.layer{j}.bias"
            tensors = (layer.weight, layer.bias)
            weights += [
                onnx.numpy_helper.from_array(t.detach().numpy(), n) for n, t in zip(names, tensors, strict=True)
            ]
            last = layer is layers[-1]
            out = f"member{i}.logits" if last else f"member{i}.layer{j}.sum"
            nodes.append(onnx.helper.make_node("Gemm", [x, *names], [out], transB=1))
            if not last:
                nodes.append(onnx.helper.make_node("Relu", [out], [x := f"member{i}.layer{j}"]))
        if model.how == "arithmetic":
            nodes.append(onnx.helper.make_node("Softmax", [out], [out := f"member{i}.probabilities"], axis=-1))
        outputs.append(out)
    if model.how == "arithmetic":
        nodes.append(onnx.helper.make_node("Mean", outputs, ["probabilities"]))
    else:
        nodes.append(onnx.helper.make_node("Mean", outputs, ["logits"]))
        nodes.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1))
    pixels, real = DATASETS[run.spec.settings["data"]["name"]].side ** 2, onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info("inputs", real, ["batch", pixels])]
    results = [onnx.helper.make_tensor_value_info("probabilities", real, ["batch", CLASSES])]
    graph = onnx.helper.make_graph(nodes, run.name, inputs, results, weights)
    # Opset and format of 2021: every runtime reads them.
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)
    onnx.helper.set_model_props(made, {"run": run.name, "data": json.dumps(run.spec.settings["data"])})
    onnx.checker.check_model(made)
    content: bytes = made.SerializeToString()
    return content


def _onnx_library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"{name} is not installed: pip install 'kdcli[onnx]'") from None


def _torch(model: Probabilities, run: Run) -> bytes:
    """The net as torch.export writes it."""
    import io

    buffer, side = io.BytesIO(), DATASETS[run.spec.settings["data"]["name"]].side
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (torch.zeros(2, side**2),), dynamic_shapes=({0: batch},)), buffer)
    return buffer.getvalue()


def _safetensors(model: Probabilities, run: Run) -> bytes:
    """The weights alone, and in the header what they are."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    settings = json.dumps(run.spec.settings)
    return save(tensors, {"run": run.name, "net": _shape(model), "average": model.how, "settings": settings})


def _shape(model: Probabilities) -> str:
    """The widths of a net's layers, or of those of an ensemble's members: `784-800-800-10`."""
    shapes = []
    for member in model.members:
        assert isinstance(member, core.MLP)
        layers = member.linears()
        shapes.append("-".join(map(str, [layers[0].in_features, *(layer.out_features for layer in layers)])))
    return ", ".join(shapes)


def _opened(file: Path, form: str, model: Probabilities) -> Callable[[Tensor], Tensor]:
    """The net in an exported file, as another program would run it."""
    if form == "onnx":
        return _onnx_net(file)[0]
    if form == "torch":
        program: Callable[[Tensor], Tensor] = torch.export.load(file).module()
        return program
    from safetensors.torch import load

    members = []
    for member in model.members:
        assert isinstance(member, core.MLP)
        inputs, *hidden = (layer.in_features for layer in member.linears())
        members.append(core.MLP(inputs, hidden, CLASSES))
    fresh = Probabilities(members, model.how).eval()
    fresh.load_state_dict(load(file.read_bytes()))
    return fresh


def _onnx_net(file: Path) -> tuple[Callable[[Tensor], Tensor], int]:
    """An exported net, and the pixels of its images. Raises BadInput when the file is none."""
    if not file.is_file():
        raise BadInput(f"{file}: there is no such file")
    runtime = _onnx_library("onnxruntime")
    try:
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (pixels,) = (i.shape[1] for i in session.get_inputs() if i.name == "inputs")
        (_,) = (o for o in session.get_outputs() if o.name == "probabilities")
        if not isinstance(pixels, int):
            raise ValueError
    except Exception:  # the runtime has a dozen kinds of its own
        raise BadInput(f"{file}: is not a net that kd exported") from None

    def net(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["probabilities"], {"inputs": inputs.numpy()})[0])

    return net, pixels


def _card(run: Run, exported: Document, scores: Document) -> str:
    """The model card: what the net is, from what it was made, and what it can."""
    settings, result = run.spec.settings, run.result
    side, price = DATASETS[settings["data"]["name"]].side, cost(nets(run, CPU))
    rows = {
        "file": f"{Path(exported['file']).name}, {exported['format']}, {exported['bytes']:,} bytes",
        "net": f"{exported['net']}, ReLU between the layers",
        "input": f"`inputs`, float32 [batch, {side**2}]: {side} x {side} pixels row by row, 0 the ground, 1 the ink",
        "output": f"`probabilities`, float32 [batch, {CLASSES}], of the digits 0 to 9: the softmax is built in",
        "data": f"{settings['data']['name']}, {result['samples']:,} training images" if "samples" in result else "",
        "made by": f"kd {run.spec.command}, seed {run.spec.seed}",
        "made from": ", ".join(run.spec.parents) or "hard labels alone",
    }
    if exported["format"] == "safetensors":
        rows["output"] = "weights alone, by member and layer: apply the layers, then the softmax"
    if "average" in settings:
        rows["data"], rows["average"] = settings["data"]["name"], f"{settings['average']}, of the members' outputs"
    if "distill" in settings:
        rows["soft targets"] = "T = {T:g}, lambda1 = {lambda1:g}, lambda2 = {lambda2:g}".format(**settings["distill"])
    if settings.get("omitted"):
        rows["never seen"] = f"{', '.join(map(str, settings['omitted']))}; the biases are as trained, not corrected"
    rows |= {
        "errors": f"{exported['errors']} of {exported['total']:,} {result['evaluated_on']}",
        "proof": "torch counts {torch_errors}; probabilities differ by up to {max_difference:.1e}".format(**exported),
        "calibration": "NLL {nll:.4f}, Brier {brier:.4f}, ECE {ece:.4f}".format(**scores),
        "cost": f"{price['parameters']:,} parameters, {price['multiply_adds']:,} multiply-adds an image",
        "training": f"{result['seconds']:.0f} s on {result['device']}",
        "one seed": "other seeds of the same recipe differ by some errors: `kd compare` tells by how many",
    }
    lines = [f"# {run.name}", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines) + "\n"


# Asking a net.


def predict(
    root: Path,
    name: str,
    files: Sequence[Path],
    test_images: Sequence[int],
    temperatures: Sequence[float],
    invert: bool,
    data_dir: Path | None,
) -> Document:
    """What a run, or an exported ONNX file, says of image files and of test images; beside it what its teacher says, at
    each temperature. Raises BadInput for what is no image, no run, or out of range."""
    if name.lower().endswith(".onnx"):
        if list(temperatures) != [1]:
            raise BadInput("--T: an exported file has T = 1 built in: name the run instead")
        run, (student, pixels) = None, _onnx_net(Path(name))
    else:
        own, teacher, run = _source(root, name)
        student, ask = lambda x: own(x, 1.0), teacher or own
        pixels = DATASETS[run.spec.settings["data"]["name"]].side ** 2
    side, taught = round(pixels**0.5), run is not None and teacher is not None
    shown: list[tuple[str, int | None, Tensor]] = []
    shown += [(str(file), None, _read_image(file, side, invert)) for file in files]
    if test_images:
        if run is None:
            raise BadInput("--test-image: an exported file knows no dataset: name the run instead")
        test = loaded(Data(**run.spec.settings["data"]), data_dir, CPU).test
        for i in test_images:
            if not 0 <= i < len(test):
                raise BadInput(f"--test-image {i}: there are images 0 to {len(test) - 1}")
            shown.append((f"test image {i}", int(test.labels[i]), test.inputs(torch.tensor([i]))))
    images = []
    others = dict.fromkeys(T for T in temperatures if taught or T != 1)
    for label, digit, inputs in shown:
        views = [{"net": "student" if taught else "net", "T": 1.0, "p": student(inputs)[0].tolist()}]
        for T in others:
            views.append({"net": "teacher" if taught else "net", "T": T, "p": ask(inputs, T)[0].tolist()})
        light = digit is None and float(inputs.mean()) > 0.5
        images.append({"image": label, "label": digit, "views": views, "mostly_ink": light})
    return {"command": "predict", "run": run.name if run else name, "images": images}


def _source(root: Path, name: str) -> tuple[Softened, Softened | None, Run]:
    """A finished run as it answers, its teacher if it has one, and itself."""
    if Path(name).suffix in (".safetensors", ".pt2"):
        raise BadInput(f"{name}: kd predict reads runs and .onnx files: name the run, or export it as onnx")
    run, teacher = open_run(root, name), None
    if not run.completed:
        raise BadInput(f"{run.name}: is {run.status}: cannot predict; {run.how_to_finish}")
    if run.spec.parents and run.spec.command != "ensemble" and (root / run.spec.parents[0]).is_dir():
        teacher = _softened(open_run(root, run.spec.parents[0]))
    return _softened(run), teacher, run


def _softened(run: Run) -> Softened:
    members, how = nets(run, CPU), run.spec.settings.get("average", "arithmetic")
    return lambda x, T: core.average(torch.stack([net(x) for net in members]), T, how).exp()


def _read_image(file: Path, side: int, invert: bool) -> Tensor:
    """An image file of any size as inputs [1, side * side], grey, 1 the ink; one that is not square is centred on the
    ground, and what is transparent is ground. Raises BadInput."""
    from PIL import Image, ImageOps

    ground = 255 if invert else 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                ImageOps.exif_transpose(image, in_place=True)  # as the camera was held
                if image.mode.startswith("I;16"):
                    pixels = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGBA")
                elif image.mode in ("I", "F"):
                    raise BadInput(f"{file}: has pixels of mode {image.mode}: save it with 8 or 16 bits a pixel")
                else:
                    pixels = image.convert("RGBA")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{file}: is too large: {Image.MAX_IMAGE_PIXELS:,} pixels at most") from None
    except (OSError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is not an image that can be read"
        raise BadInput(f"{file}: {reason}") from None
    square = Image.new("RGBA", (max(pixels.size),) * 2, (ground,) * 3 + (255,))
    square.alpha_composite(pixels, ((square.width - pixels.width) // 2, (square.width - pixels.height) // 2))
    grey = square.convert("L").resize((side, side), Image.Resampling.BOX)
    values = torch.from_numpy(np.asarray(grey, np.float32) / 255).flatten()[None]
    if float(values.max() - values.min()) < 1 / 16:
        raise BadInput(f"{file}: is blank")
    return 1 - values if invert else values
