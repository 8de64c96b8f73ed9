"""`kd export` writes a finished run's net for others to run, and proves the file on all test images first."""

import contextlib
import copy
import importlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcli import BadInput, Failed, code, score
from kdcli.config import Average, Section
from kdcli.data import Split, open_dataset
from kdcli.results import cost, log_probabilities
from kdcli.runs import Run, settings, write_aside
from kdcli.teacher import members, nets

Form = Literal["onnx", "torch", "safetensors"]
SUFFIXES: dict[Form, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-5  # between probabilities, which differ by the order in which sums are taken
CPU = torch.device("cpu")
Net = Callable[[Tensor], Tensor]  # images [B, C, H, W] in [0, 1] -> probabilities [B, classes]


class Exported(Section):
    """The document of `kd export`."""

    command: str = "export"
    run: str
    format: Form
    file: str
    bytes: int
    max_difference: float  # between the probabilities of the file and of torch
    errors: int  # of the file
    torch_errors: int
    total: int
    card: str
    net: str


class Probabilities(nn.Module):
    """A net, or the members of an ensemble, with the softmax at its end."""

    def __init__(self, members: Sequence[nn.Module], how: Average) -> None:
        super().__init__()
        self.members, self.how = nn.ModuleList(members), how

    def forward(self, inputs: Tensor) -> Tensor:
        """Probabilities [B, classes] of images [B, C, H, W]."""
        logits = torch.stack([member(inputs) for member in self.members])
        return logits.softmax(-1).mean(0) if self.how == "arithmetic" else logits.mean(0).softmax(-1)


@code.quiet()
def export(run: Run, form: Form, file: Path | None, data_dir: Path | None) -> Exported:
    """Write a finished run's net as `file` and its model card beside it, after the written net has classified all test
    images as torch does. Raises BadInput for a run or place that cannot be; Failed where the two disagree."""
    run.result("exported")
    file, card = _free(file or Path(f"{run.name.replace('/', '-')}{SUFFIXES[form]}"), SUFFIXES[form])
    test, model = test_split(run, data_dir), Probabilities(nets(run, CPU), run.spec.average).eval()
    content, aside = _content(model, run, form), file.with_name(f"unproved-{file.name}")
    try:
        write_aside(aside, content)
    except OSError as error:
        raise BadInput(f"--out {file}: cannot be written: {error.strerror}") from None
    try:
        wanted, found = (_asked(net, test) for net in (model, _opened(aside, form, model)))
        difference = float((wanted - found).abs().max())
        torch_errors, errors = (score.count_errors(p, test.labels).errors for p in (wanted, found))
        if not difference <= TOLERANCE or errors != torch_errors:  # NaN is no agreement
            raise Failed(f"{file}: differs from torch by {difference:.2g}, {errors} errors: not written")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    exported = Exported(
        run=run.name,
        format=form,
        file=str(file),
        bytes=len(content),
        max_difference=difference,
        errors=errors,
        torch_errors=torch_errors,
        total=len(test),
        card=str(card),
        net=_described(run),
    )
    quality = score.quality(log_probabilities(run, len(test)), test.labels)
    write_aside(card, _card(run, exported, quality).encode())
    return exported


def _free(file: Path, suffix: str) -> tuple[Path, Path]:
    """The file to write and its card. Raises BadInput where they cannot be."""
    if file.suffix != suffix or not file.parent.is_dir():
        raise BadInput(f"--out {file}: must be a file in a folder that exists, with a name that ends in {suffix}")
    card = file.with_name(f"{file.name}.md")
    for taken in (file, card):
        if os.path.lexists(taken):
            raise BadInput(f"{taken}: is there already: remove it, or choose another --out")
    return file, card


def test_split(run: Run, data_dir: Path | None) -> Split:
    """The test images of a run. Raises BadInput when its dataset is not there, or no longer what it was."""
    dataset = open_dataset(run.spec.data, data_dir)
    if dataset.facts != run.spec.dataset:
        raise BadInput(f"{run.name}: its images are not those that it was trained on: they have changed since")
    return dataset.test


@torch.inference_mode()
def _asked(net: Net, test: Split) -> Tensor:
    """Probabilities [N, classes] of all test images."""
    return torch.cat([net(test.inputs(index)) for index in torch.arange(len(test)).split(100)])


def _content(model: Probabilities, run: Run, form: Form) -> bytes:
    """The net as a file, with what it is in the file's metadata. Raises BadInput when torch cannot write such a net."""
    facts, what = run.spec.dataset, settings(run.spec)
    about = {"run": run.name, "net": _described(run), "average": model.how, "settings": json.dumps(what)}
    about |= {"classes": json.dumps(facts.classes), "shape": json.dumps(facts.shape)}
    if form == "safetensors":
        from safetensors.torch import save

        return save({name: tensor.clone() for name, tensor in model.state_dict().items()}, about)
    if form == "onnx":
        _ = [_library(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    logging.disable(logging.CRITICAL)  # of what torch tells its developers, a failure's reason is enough
    try:
        said, quiet = io.StringIO(), warnings.catch_warnings(action="ignore")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), quiet:
            return _traced(model, facts.shape, form, about)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        instead = "--format safetensors writes its weights alone"
        raise BadInput(f"{run.name}: its net cannot be exported as {form}: {reason}; {instead}") from error
    finally:
        logging.disable(logging.NOTSET)


def _traced(model: Probabilities, shape: Sequence[int], form: Form, about: dict[str, str]) -> bytes:
    """The net as torch's own exporters write it, for batches of any size."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    if form == "torch":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=about)
        return buffer.getvalue()
    inputs, outputs = ["inputs"], ["probabilities"]
    made = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert made
    made.model.metadata_props.update(about)
    content: bytes = made.model_proto.SerializeToString()
    return content


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"{name} is not installed: pip install 'kdcli[onnx]'") from None


def _described(run: Run) -> str:
    """The widths of a perceptron's layers, `784-800-800-10`, or the function that makes a net; of each member."""
    facts, found = run.spec.dataset, []
    for member in members(run):
        model, _ = member.spec.trained
        widths = [math.prod(facts.shape), *(model.hidden or []), len(facts.classes)]
        function = f"{Path(model.name).name} ({cost(member).parameters:,} parameters)" if model.name else ""
        found.append(function or "-".join(map(str, widths)))
    return ", ".join(found)


def _opened(file: Path, form: Form, model: Probabilities) -> Net:
    """The net in an exported file, as another program would run it."""
    if form == "onnx":
        return onnx_net(file)[0]
    if form == "torch":
        program: Net = torch.export.load(file).module()
        return program
    from safetensors.torch import load

    fresh = copy.deepcopy(model)
    fresh.load_state_dict(load(file.read_bytes()))
    return fresh


def onnx_net(file: Path) -> tuple[Net, list[str], list[int]]:
    """The net in a file that `kd export` wrote, the names of its classes, the shape [C, H, W] of its images. Raises
    BadInput when it is none."""
    if not file.is_file():
        raise BadInput(f"{file}: there is no such file")
    runtime = _library("onnxruntime")
    try:
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        classes, shape = [str(c) for c in json.loads(about["classes"])], json.loads(about["shape"])
        sizes = {node.name: node.shape[1:] for node in (*session.get_inputs(), *session.get_outputs())}
        if sizes != {"inputs": shape, "probabilities": [len(classes)]}:
            raise ValueError
    except Exception:  # the runtime has a dozen kinds of its own
        raise BadInput(f"{file}: is not a net that kd exported") from None
    return lambda x: torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0]), classes, shape


def _card(run: Run, exported: Exported, quality: score.Quality) -> str:
    """The model card: what the net is, from what it was made, and what it can."""
    spec, result, price, shape, d = run.spec, run.result(), cost(run), run.spec.dataset.shape, run.spec.distill
    perceptron = all(member.spec.trained[0].hidden is not None for member in members(run))
    pixels = {1: "grey, 0 black (the ground) to 1 white", 3: "red, green and blue, 0 to 1"}.get(shape[0], "0 to 1")
    data = spec.data.name or Path(spec.data.function or "").name
    classes = f"the classes {_some(spec.dataset.classes)}"
    output = f"`probabilities`, float32 [batch, {len(spec.dataset.classes)}], of {classes}: the softmax is built in"
    weights = f"weights alone, by member and layer: apply the layers, then the softmax, over {classes}"
    rows = {
        "file": f"{Path(exported.file).name}, {exported.format}, {exported.bytes:,} bytes",
        "net": exported.net + (", ReLU between the layers" if perceptron else ""),
        "input": f"`inputs`, float32 [batch, {', '.join(map(str, shape))}]: {pixels}",
        "output": weights if exported.format == "safetensors" else output,
        "data": data + (f", {result.samples:,} training images" if result.samples else ""),
        "made by": f"kd {spec.command}, seed {spec.seed}",
        "made from": ", ".join(spec.parents) or "hard labels alone",
        "average": f"{spec.average}, of the members' outputs" if spec.command == "ensemble" else "",
        "soft targets": f"T = {d.T:g}, lambda1 = {d.lambda1:g}, lambda2 = {d.lambda2:g}" if d else "",
        "never seen": f"{_some(spec.omitted)}; the biases are as trained, not corrected" if spec.omitted else "",
        "errors": f"{exported.errors} of {exported.total:,} {result.evaluated_on}",
        "proof": f"torch counts {exported.torch_errors}; probabilities differ by up to {exported.max_difference:.1e}",
        "calibration": f"NLL {quality.nll:.4f}, Brier {quality.brier:.4f}, ECE {quality.ece:.4f}",
        "cost": f"{price.parameters:,} parameters, {price.multiply_adds:,} multiply-adds an image",
        "training": f"{result.seconds:.0f} s on {result.device}",
        "one seed": "other seeds of the same recipe differ by some errors: `kd compare` tells by how many",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join([f"# {run.name}", "", "| | |", "| --- | --- |", *lines]) + "\n"


def _some(classes: Sequence[str]) -> str:
    """The names of classes; of many, the first few and their number."""
    shown = ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:3])}, … ({len(classes)} in all)"
    return shown.replace("|", r"\|")
