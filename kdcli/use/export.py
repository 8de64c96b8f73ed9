"""`kd export` writes a finished run's net for others to run, or its logits for others to learn from, and proves what
it writes on all test images first."""

import contextlib
import copy
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kdcli import BadInput, Failed, code, failure, losses, score
from kdcli.code import library
from kdcli.config import Average, Section
from kdcli.data.dataset import Dataset
from kdcli.evidence.results import cost, log_probabilities
from kdcli.runs.directory import Run, write_aside
from kdcli.runs.spec import settings
from kdcli.teachers.imports import answers_for
from kdcli.teachers.teacher import dataset_of, logits_of, members, nets

Form = Literal["onnx", "torch", "safetensors", "logits"]
SUFFIXES: dict[Form, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors", "logits": ".npz"}
TOLERANCE = 1e-5  # between probabilities, which differ by the order in which sums are taken
CALIBRATION = 500  # training images
QUANTISED = ["Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool"]  # not the softmax
CPU = torch.device("cpu")
Net = Callable[[Tensor], Tensor]  # images [B, C, H, W] in [0, 1] -> probabilities [B, classes]


class Int8(Section):
    """What a quantised file is beside that of float32: bytes, and milliseconds of one image, on one thread."""

    calibrated_on: int  # training images
    ms: float
    float32_ms: float
    float32_bytes: int


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
    holds: str | None = None  # of logits: what of which images
    int8: Int8 | None = None


class Proof(NamedTuple):
    """What a file holds, and the probabilities [images, classes] that it gives, beside those of torch: of a net as it
    is now, of logits as the run kept them."""

    content: bytes
    wanted: Tensor  # of the test images first
    found: Tensor
    holds: str | None = None
    int8: Int8 | None = None


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
def export(
    run: Run,
    form: Form,
    file: Path | None,
    data_dir: Path | None,
    top_k: int | None = None,
    half: bool = False,
    int8: bool = False,
) -> Exported:
    """Write a finished run's net, or its logits, as `file` and its model card beside it, after what is written has
    classified all test images as torch does. Of logits, the `top_k` likeliest classes of each image alone, and in
    float16 if `half`; of ONNX, quantised if `int8`. Raises BadInput for a run or place that cannot be; Failed where the
    two disagree."""
    _refuse(run, form, top_k, half, int8)
    file, card = _places(run, form, file, int8)
    dataset = dataset_of(run, data_dir)
    labels = dataset.test.labels
    proof = _of_answers(run, dataset, top_k, half) if form == "logits" else _of_net(run, dataset, form, int8)
    difference = float((proof.wanted - proof.found).abs().max())
    torch_errors, errors = (score.count_errors(p[: len(labels)], labels).errors for p in (proof.wanted, proof.found))
    rounds = top_k or half or int8  # then the difference is told and not refused
    if not rounds and (not difference <= TOLERANCE or errors != torch_errors):  # NaN is no agreement
        raise Failed(f"{file}: differs from torch by {difference:.2g}, {errors} errors: not written")
    about = dict[str, Any](max_difference=difference, errors=errors, torch_errors=torch_errors, total=len(labels))
    about |= {"bytes": len(proof.content), "net": ", ".join(_described(member) for member in members(run))}
    exported = Exported(
        run=run.name, format=form, file=str(file), card=str(card), holds=proof.holds, int8=proof.int8, **about
    )
    quality = score.quality(log_probabilities(run, len(labels)), labels)
    text = Path(__file__).with_name("card.md").read_text()
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    text = template.render(run=run, exported=exported, quality=quality, cost=cost(run), members=members(run))
    try:
        write_aside(file, proof.content)
        write_aside(card, text.encode())
    except OSError as error:
        raise BadInput(f"--out {file}: cannot be written: {error.strerror}") from None
    return exported


def _refuse(run: Run, form: Form, top_k: int | None, half: bool, int8: bool) -> None:
    """Raise BadInput for a run that cannot be exported, or not so."""
    run.result("exported")
    for flag, given, of in (("--top-k", top_k, "logits"), ("--half", half, "logits"), ("--int8", int8, "onnx")):
        if given and form != of:
            raise BadInput(f"{flag}: belongs to --format {of}: remove it")
    if (top_k or 0) >= len(run.spec.dataset.classes):
        raise BadInput(f"--top-k {top_k}: must be fewer than the {len(run.spec.dataset.classes)} classes")
    for origin in (member.spec.origin for member in members(run)):
        if origin and (origin.logits or (origin.onnx and form != "logits")):
            raise BadInput(f"{run.name}: is not a torch net, but the content of {origin.file}: share that file")


def _places(run: Run, form: Form, file: Path | None, int8: bool) -> tuple[Path, Path]:
    """Where the file and its card go. Raises BadInput."""
    suffix = SUFFIXES[form]
    file = file or Path(f"{run.name.replace('/', '-')}{'-int8' * int8}{suffix}")
    card = file.with_name(f"{file.name}.md")
    if file.suffix != suffix or not file.parent.is_dir():
        raise BadInput(f"--out {file}: must be a file in a folder that exists, with a name that ends in {suffix}")
    if taken := [path for path in (file, card) if os.path.lexists(path)]:
        raise BadInput(f"{taken[0]}: is there already: remove it, or choose another --out")
    return file, card


def _of_net(run: Run, dataset: Dataset, form: Form, int8: bool) -> Proof:
    model, test = Probabilities(nets(run, CPU), run.spec.average, run.spec.weights).eval(), dataset.test
    content, opened = _written(run, model, form)
    beside = None
    if int8:
        content, beside = _quantised(run, content, dataset)
        opened = _asking(_session(content))
    batches = torch.arange(len(test)).split(100)
    wanted, found = (torch.cat([ask(test.inputs(i)) for i in batches]) for ask in (model, opened))
    return Proof(content, wanted, found, int8=beside)


def _quantised(run: Run, content: bytes, dataset: Dataset) -> tuple[bytes, Int8]:
    """An ONNX file with weights and activations of 8 bits, by onnxruntime's static quantisation, which reads the range
    of each activation off training images, and what it is beside the file given. Raises BadInput where it cannot be."""
    train, quantization = dataset.train, library("onnxruntime.quantization")
    chosen = torch.linspace(0, len(train) - 1, min(len(train), CALIBRATION)).long()

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        batches = iter(chosen.split(50))

        def get_next(self) -> dict[str, Any] | None:
            index = next(self.batches, None)
            return None if index is None else {"inputs": train.inputs(index).numpy()}

    logging.disable(logging.WARNING)  # it advises a preparation that changes nothing here
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, kinds = Path(folder, "int8.onnx"), quantization.QuantType
            how = {"op_types_to_quantize": QUANTISED, "activation_type": kinds.QUInt8, "weight_type": kinds.QInt8}
            quantization.quantize_static(
                library("onnx").load_from_string(content), file, Images(), per_channel=True, **how
            )
            written = file.read_bytes()
    except Exception as error:  # whatever onnxruntime raises of a net that it does not know
        raise BadInput(f"{run.name}: its net cannot be quantised: {failure(error)}: leave out --int8") from error
    finally:
        logging.disable(logging.NOTSET)
    image, both = dataset.test.inputs(torch.tensor([0])), (written, content)
    ms, float32_ms = (score.latency(_asking(_session(one, threads=1)), image).p50 for one in both)
    return written, Int8(calibrated_on=len(chosen), ms=ms, float32_ms=float32_ms, float32_bytes=len(content))


def _of_answers(run: Run, dataset: Dataset, top_k: int | None, half: bool) -> Proof:
    """A file of what a run says of the test and training images: the logits of a lone net; of an ensemble, and where
    the file rounds, log-probabilities, whose errors are least where the probability is."""
    parts, classes = {"test": dataset.test, "train": dataset.train}, dataset.facts.classes
    logits = {part: logits_of(run, part, split) for part, split in parts.items()}
    log_p = {part: losses.average(members, 1.0, run.spec.average, run.spec.weights) for part, members in logits.items()}
    # Logits none of which is below 0 could be read as probabilities.
    whole = not (top_k or half) and all(len(members) == 1 and members.min() < -1 for members in logits.values())
    arrays = {"classes": np.array(classes)}
    for part in parts:
        rows = logits[part][0] if whole else log_p[part].clamp(min=-65_504)  # the least of float16
        if top_k:
            rows, numbers = rows.topk(top_k)
            arrays[f"{part}_classes"] = numbers.numpy().astype(np.min_scalar_type(len(classes)))
        arrays[part] = rows.to(torch.float16 if half else torch.float32).numpy()
    if dataset.on_heldout:  # one row per training image, as they are read
        places = dataset.apart(torch.arange(len(dataset.train.store)))
        order = torch.cat([places["train"], places["test"]]).argsort().numpy()
        for key in [key for key in arrays if key.startswith("train")]:
            arrays[key] = np.concatenate([arrays[key], arrays.pop(key.replace("train", "test"))])[order]
    np.savez(content := io.BytesIO(), **arrays)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "logits.npz")).write_bytes(content.getvalue())
        read = answers_for(dataset, file).logits
    wanted, found = (torch.cat([rows[part] for part in parts]).double().softmax(1) for rows in (log_p, read))
    kind, of = "logits" if whole else "log-probabilities at T = 1", f"the {top_k} likeliest of " if top_k else ""
    holds = f"{kind} of {of}{len(classes)} classes, {arrays['train'].dtype}, for {len(dataset.train):,} training and "
    return Proof(content.getvalue(), wanted, found, f"{holds}{len(dataset.test):,} test images")


def _described(run: Run) -> str:
    """The function that makes the net of a run, or the widths of a perceptron's layers: `784-800-800-10`."""
    facts, model, price = run.spec.dataset, run.spec.model, cost(run)
    if not model or not price:
        return Path(run.spec.origin.file).name if run.spec.origin else ""
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
    library("onnxscript")
    made: Any = torch.onnx.export(program, input_names=["inputs"], output_names=["probabilities"])
    made.model.metadata_props.update(about)
    content = made.model_proto.SerializeToString()
    return content, _asking(_session(content))


class Opened(NamedTuple):
    """The net in a file that `kd export` wrote, and what the file says of it."""

    net: Net
    run: str
    classes: list[str]
    shape: list[int]  # [C, H, W] of its images
    middle: bool  # whether they are the middles of photographs


def onnx_net(file: Path) -> Opened:
    """The net in an ONNX file that `kd export` wrote. Raises BadInput when it is none."""
    if not file.is_file():
        raise BadInput(f"{file}: there is no such file")
    library("onnxruntime")  # whose absence is no fault of the file
    try:
        session = _session(file)
    except Exception:  # the runtime has a dozen kinds of its own
        raise BadInput(f"{file}: is not a net that kd exported as onnx: export it so, or name the run") from None
    about = session.get_modelmeta().custom_metadata_map
    try:
        classes, shape = json.loads(about["classes"]), json.loads(about["shape"])
    except (KeyError, ValueError):
        instead = f"make it a run with `teacher: {{onnx: {file}}}`, kd train-teacher, and name that"
        said = "is not a net that kd exported as onnx, so its classes and images are not known"
        raise BadInput(f"{file}: {said}: {instead}") from None
    return Opened(_asking(session), about.get("run", ""), classes, shape, about.get("middle") == "True")


def _session(file: Path | bytes, threads: int = 0) -> Any:
    """onnxruntime's session of a file; 0 threads: as many as there are cores."""
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _asking(session: Any) -> Net:
    return lambda x: torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0])
