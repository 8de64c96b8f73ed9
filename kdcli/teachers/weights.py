"""Files of weights that were trained elsewhere: read without code, matched key by key with the net that is to have
them."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kdcli import BadInput
from kdcli.config import some

# What a checkpoint may call its weights, the first that is there counts: averaged ones are those that were scored.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model")
PLAIN = ("state_dict", "model_state_dict", "model", "net", "module", "weights")
PROGRAM = "is a torch program, not weights: save net.state_dict(), or export it as ONNX"
SHOWN = 5  # keys of each kind in a message


class Weights(NamedTuple):
    """The tensors of a file by key; the metadata of a .safetensors file; how it was read."""

    tensors: dict[str, Tensor]
    about: dict[str, str]
    said: list[str]


def read_weights(file: Path) -> Weights:
    """The weights in a .safetensors, .pt, .pth or .th file. Raises BadInput when it is damaged, holds none, or could
    only be read by running code."""
    about: dict[str, str] = {}
    try:
        if file.suffix.lower() == ".safetensors":
            with safe_open(file, "pt") as opened:
                about = opened.metadata() or {}
                content: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
        else:
            quiet = warnings.catch_warnings(action="ignore")  # of pickle protocols that torch has not seen
            with quiet, torch.serialization.safe_globals([argparse.Namespace]):  # timm's keep their options in one
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_program(file):
            raise BadInput(f"{file}: {PROGRAM}") from None
        with file.open("rb") as opened:
            pickled = opened.read(1) in (b"\x80", b"P")  # of a pickle, or of a zip file that holds one
        if not pickled or ("weights_only" not in str(error) and "Unsupported" not in str(error)):
            raise BadInput(f"{file}: is damaged, or not a file of weights") from None
        raise BadInput(f"{file}: {_of_code(str(error))}") from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        why = PROGRAM if _is_program(file) else "is damaged, cut short, or not a file of weights"
        if isinstance(error, PermissionError | FileNotFoundError):
            why = f"cannot be read: {error.strerror}"
        raise BadInput(f"{file}: {why}") from None
    tensors, said = _unwrapped(content, file)
    if bad := [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise BadInput(f"{file}: holds values that are not finite, in {some(bad, SHOWN)}")
    if narrow := {tensor.dtype for tensor in tensors.values() if tensor.dtype in (torch.float16, torch.bfloat16)}:
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        said.append(f"Its weights are {kinds}; the net computes in float32.")
    return Weights(tensors, about, said)


def _of_code(error: str) -> str:
    name = re.search(r"(?:GLOBAL|class|global:?) ([A-Za-z_][\w.]*\.\w+)", error)
    what = f"holds more than tensors{f' ({name[1]})' if name else ''}, which only running code could read"
    return f"{what}: save the state_dict alone, torch.save(net.state_dict(), …)"


def _is_program(file: Path) -> bool:
    """Whether a file is what TorchScript or torch.export writes: a net with its code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(
            name.endswith(("constants.pkl", "model.json", "exported_program.json")) for name in archive.namelist()
        )


def _unwrapped(content: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The dictionary of tensors inside a checkpoint, and where in it that was."""
    path: list[str] = []
    while isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in (*AVERAGED, *PLAIN)):
        there = [key for key in (*AVERAGED, *PLAIN) if isinstance(content.get(key), dict)]
        others = [key for key in there[1:] if key in PLAIN and there[0] in AVERAGED]
        path.append(f"{there[0]}{f' (not {others[0]})' if others else ''}")
        content = content[there[0]]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        keys = some([*map(str, content)], SHOWN) if isinstance(content, dict) else ""
        raise BadInput(f"{file}: holds no weights{f': its keys are {keys}' if keys else ''}")
    return tensors, [f"Its weights were found under {', '.join(path)}."] if path else []


def fit_weights(net: nn.Module, found: Weights, file: Path, fresh: str = "") -> list[str]:
    """Load weights into a net, but those of its `fresh` layer; returns how the keys were read. Raises BadInput that
    lists what is missing, unexpected or of another shape."""
    wanted = {key: tensor for key, tensor in net.state_dict().items() if not fresh or not key.startswith(f"{fresh}.")}
    tensors, said = stripped(found.tensors, wanted)
    kept = {key: t for key, t in tensors.items() if not fresh or not key.startswith(f"{fresh}.")}
    missing = [key for key in wanted if key not in kept and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in kept if key not in wanted and key != "n_averaged"]  # what AveragedModel counts
    shapes = {key: (list(kept[key].shape), list(wanted[key].shape)) for key in wanted if key in kept}
    misshapen = [f"{key} is {its}, not {own}" for key, (its, own) in shapes.items() if its != own]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        parts = [f"{len(keys)} {what}: {some(keys, SHOWN)}" for what, keys in problems.items() if keys]
        of_head = misshapen and not (missing or unexpected) and not fresh
        if of_head and all(key.startswith(f"{last_layer(net)}.") for key in misshapen):
            parts.append("name its classes, all of them, in teacher.classes, or replace its last layer with head: new")
        raise BadInput(f"{file}: does not fit this net: {'; '.join(parts)}")
    net.load_state_dict(net.state_dict() | {key: kept[key] for key in wanted if key in kept})
    return said


def stripped(tensors: dict[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by key without the names of wrappers, such as `module.`, that all keys begin with and the net's do not;
    and what was taken off."""
    taken, whole = "", tensors
    while not tensors.keys() & set(wanted):
        heads = {key.partition(".")[0] for key in tensors if key != "n_averaged"}
        if len(heads) != 1 or not all("." in key for key in tensors if key != "n_averaged"):
            return whole, []  # it is told with the keys as they are
        taken += f"{heads.pop()}."
        tensors = {key.partition(".")[2] or key: tensor for key, tensor in tensors.items()}
    return tensors, [f"Its keys are read without {taken}"] if taken else []


def classes_of(about: dict[str, str]) -> list[str]:
    """The names of the classes that `kd export` wrote beside the weights, in their order; else none."""
    try:
        return [str(name) for name in json.loads(about.get("classes", "[]"))]
    except (ValueError, TypeError):  # a number is no list
        return []


def last_layer(net: nn.Module) -> str:
    """The name of a net's last layer: timm says which it is; else the last one that was made. Raises BadInput."""
    layers = {name: part for name, part in net.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    says: Any = getattr(net, "get_classifier", None)
    named = [name for name, part in net.named_modules() if says and name and part is says()]
    if not named and not layers:
        raise BadInput("head, freeze: the net has no linear or convolutional layer that could be its head")
    return str(named[0] if named else list(layers)[-1])
