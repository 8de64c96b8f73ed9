"""`kd export` writes a finished run's net for others to run, and proves it on all test images first."""

import contextlib
import copy
import importlib
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kdcli import BadInput, Failed, code, score
from kdcli.config import Average, Section
from kdcli.results import cost, log_probabilities
from kdcli.runs import Run, settings, write_aside
from kdcli.teacher import dataset_of, members, nets

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

    def __init__(self, members: Sequence[nn.Module], how: Average, weights: Sequence[float]) -> None:
        super().__init__()
        self.members, self.how = nn.ModuleList(members), how
        shares = torch.tensor(weights or [1.0] * len(members)).view(-1, 1, 1)
        self.shares = nn.Buffer(shares / shares.sum(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Probabilities [B, classes] of images [B, C, H, W]."""
        logits = torch.stack([member(inputs) for member in self.members])
        if self.how == "arithmetic":
            return (logits.softmax(-1) * self.shares).sum(0)
        return (logits * self.shares).sum(0).softmax(-1)


@code.quiet()
def export(run: Run, form: Form, file: Path | None, data_dir: Path | None) -> Exported:
    """Write a finished run's net as `file` and its model card beside it, after what is written has classified all test
    images as torch does. Raises BadInput for a run or place that cannot be; Failed where the two disagree."""
    run.result("exported")
    suffix = SUFFIXES[form]
    file = file or Path(run.name.replace("/", "-") + suffix)
    card = file.with_name(f"{file.name}.md")
    if file.suffix != suffix or not file.parent.is_dir():
        raise BadInput(f"--out {file}: must be a file in a folder that exists, with a name that ends in {suffix}")
    if taken := [path for path in (file, card) if os.path.lexists(path)]:
        raise BadInput(f"{taken[0]}: is there already: remove it, or choose another --out")
    test, model = (
        dataset_of(run, data_dir).test,
        Probabilities(nets(run, CPU), run.spec.average, run.spec.weights).eval(),
    )
    content, opened = _written(run, model, form)
    batches = torch.arange(len(test)).split(100)
    wanted, found = (torch.cat([ask(test.inputs(i)) for i in batches]) for ask in (model, opened))
    difference = float((wanted - found).abs().max())
    torch_errors, errors = (score.count_errors(p, test.labels).errors for p in (wanted, found))
    if not difference <= TOLERANCE or errors != torch_errors:  # NaN is no agreement
        raise Failed(f"{file}: differs from torch by {difference:.2g}, {errors} errors: not written")
    proof = dict[str, Any](max_difference=difference, errors=errors, torch_errors=torch_errors, total=len(test))
    net = ", ".join(_described(member) for member in members(run))
    exported = Exported(run=run.name, format=form, file=str(file), bytes=len(content), card=str(card), net=net, **proof)
    quality = score.quality(log_probabilities(run, len(test)), test.labels)
    text = Path(__file__).with_name("card.md").read_text()
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    text = template.render(run=run, exported=exported, quality=quality, cost=cost(run), members=members(run))
    try:
        write_aside(file, content)
        write_aside(card, text.encode())
    except OSError as error:
        raise BadInput(f"--out {file}: cannot be written: {error.strerror}") from None
    return exported


def _described(run: Run) -> str:
    """The function that makes the net of a run, or the widths of a perceptron's layers: `784-800-800-10`."""
    facts, model, price = run.spec.dataset, run.spec.model, cost(run)
    if not model or not price:
        raise BadInput(f"{run.name}: is no net of torch's: its file is {run.spec.origin and run.spec.origin.file}")
    if model.name:
        return f"{Path(model.name).name} ({price.parameters:,} parameters)"
    return "-".join(map(str, [torch.Size(facts.shape).numel(), *(model.hidden or []), len(facts.classes)]))


def _written(run: Run, model: Probabilities, form: Form) -> tuple[bytes, Net]:
    """The net as a file, with what it is in the file's metadata, and the net in that file, opened again. Raises
    BadInput when torch cannot write such a net."""
    facts = run.spec.dataset
    about = {
        "run": run.name,
        "middle": str(run.spec.data.folder is not None),
        "settings": json.dumps(settings(run.spec)),
    }
    about |= {"classes": json.dumps(facts.classes), "shape": json.dumps(facts.shape)}
    if form == "safetensors":
        content = save({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, about)
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(load(content))
        return content, fresh
    said, quiet = io.StringIO(), warnings.catch_warnings(action="ignore")
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), quiet:
            return _traced(model, facts.shape, form, about)
    except BadInput:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        instead = "--format safetensors writes its weights alone"
        raise BadInput(f"{run.name}: its net cannot be exported as {form}: {reason}; {instead}") from error


def _traced(model: Probabilities, shape: Sequence[int], form: Form, about: dict[str, str]) -> tuple[bytes, Net]:
    program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    if form == "torch":
        torch.export.save(program, buffer := io.BytesIO(), extra_files=about)
        content = buffer.getvalue()
        return content, torch.export.load(io.BytesIO(content)).module()
    _library("onnxscript")
    made: Any = torch.onnx.export(program, input_names=["inputs"], output_names=["probabilities"])
    made.model.metadata_props.update(about)
    content = made.model_proto.SerializeToString()
    return content, onnx_net(content)[0]


def onnx_net(file: Path | bytes) -> tuple[Net, list[str], list[int], bool]:
    """The net in a file that `kd export` wrote, or in its content; the names of its classes; the shape [C, H, W] of its
    images, and whether they are the middles of photographs. Raises BadInput when it is none."""
    if isinstance(file, Path) and not file.is_file():
        raise BadInput(f"{file}: there is no such file")
    runtime = _library("onnxruntime")
    try:
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        classes, shape = json.loads(about["classes"]), json.loads(about["shape"])
    except Exception:  # the runtime has a dozen kinds of its own
        raise BadInput(f"{file!s}: is not a net that kd exported as onnx: export it so, or name the run") from None
    middle = about.get("middle") == "True"
    return lambda x: torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0]), classes, shape, middle


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"{name} is not installed: pip install 'kdcli[onnx]'") from None
