"""Teachers that were trained elsewhere: files of weights, ONNX, libraries; and what tells that one was misread."""

import argparse
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, Done, facts, kd_here
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcli import BadInput
from kdcli.config import Data, Experiment, Input, Model, Origin
from kdcli.data.dataset import open_dataset
from kdcli.nets import models
from kdcli.nets.models import MLP
from kdcli.score import count_errors
from kdcli.teachers import imports, misread
from kdcli.teachers.weights import Weights, fit_weights, last_layer, read_weights

DIGITS = open_dataset(Data(name="digits"))
# A teacher from elsewhere, in place of the one that tiny.yaml trains.
ELSEWHERE = TINY.replace("ensemble: {members: 2}\n", "").replace(
    "teacher:\n  model: {hidden: [64], dropout: 0.5}\n"
    "  train: {epochs: 6, batch_size: 50, optimizer: adam, lr: 3e-3, jitter: 1, max_norm: 3}\n",
    "teacher: {SOURCE}\n",
)
MEAN, STD = 0.3, 0.4  # of the inputs of the net below


class Fixture(NamedTuple):
    folder: Path
    net: MLP
    errors: int  # on the digits' test images


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """A net of the digits that kd did not train: 64-32-10, on inputs with a mean of its own, by torch's plain tools."""
    torch.manual_seed(0)
    net, x, y = MLP(64, [32], 10), DIGITS.train.inputs(torch.arange(1297)), DIGITS.train.labels
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net((x - MEAN) / STD), y).backward()
        optimizer.step()
    net.eval()
    test = DIGITS.test
    errors = count_errors(net((test.inputs(torch.arange(500)) - MEAN) / STD), test.labels).errors
    assert errors < 40
    return Fixture(tmp_path_factory.mktemp("elsewhere"), net, errors)


def read(folder: Path, source: str, *words: str, command: str = "train-teacher", text: str = ELSEWHERE) -> Done:
    """What `kd` says of the digits with this `teacher` section."""
    (folder / "elsewhere.yaml").write_text(text.replace("{SOURCE}", source))
    return kd_here(folder, command, "elsewhere.yaml", *words)


def own(weights: str, more: str = "") -> str:
    return f"{{model: {{hidden: [32]}}, weights: {weights}, input: {{mean: [{MEAN}], std: [{STD}]}}{more}}}"


WRAPPERS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "plain": (lambda s: s, ""),
    "state_dict": (lambda s: {"epoch": 3, "state_dict": s}, "were found under state_dict"),
    "module": (lambda s: {"model": {f"module.{k}": t for k, t in s.items()}}, "are read without module."),
    "compiled": (lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()}, "read without module._orig_mod."),
    "averaged": (
        lambda s: {
            "state_dict": {k: 0 * t for k, t in s.items()},
            "state_dict_ema": s,
            "args": argparse.Namespace(lr=1),
        },
        "were found under state_dict_ema (not state_dict)",
    ),
    "swa": (lambda s: {"n_averaged": torch.tensor(9)} | {f"module.{k}": t for k, t in s.items()}, "without module."),
    "half": (lambda s: {k: t.half() for k, t in s.items()}, "weights are float16"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_usual_wrappers_are_seen_through_and_said(elsewhere: Fixture, tmp_path: Path, wrapper: str) -> None:
    wrap, said = WRAPPERS[wrapper]
    torch.save(wrap(elsewhere.net.state_dict()), tmp_path / "net.pth")
    done = read(tmp_path, own("net.pth"), "--json")
    assert done.code == 0, done.err
    assert abs(done.json["test"]["errors"] - elsewhere.errors) <= (wrapper == "half")
    assert said in done.err
    assert done.json["reading"]["warnings"] == []


def test_a_teacher_from_elsewhere_teaches_and_ships(elsewhere: Fixture, tmp_path: Path) -> None:
    save_file(elsewhere.net.state_dict(), tmp_path / "net.safetensors")
    done = read(tmp_path, own("net.safetensors"), "--seeds", "0-1", "--json", command="run")
    assert done.code == 0, done.err
    rows = {row["row"]: row for row in done.json["points"][0]["table"]}
    assert rows["teacher"]["errors"] == [elsewhere.errors]  # it has no seed
    assert [len(rows[name]["errors"]) for name in ("baseline", "student", "omit 3")] == [2, 2, 2]
    assert len([run for run in done.json["points"][0]["runs"] if run["kind"] == "teacher"]) == 1
    assert "one teacher for all seeds" in kd_here(tmp_path, "report", "elsewhere.yaml", "--seeds", "0-1").out
    assert kd_here(tmp_path, "evaluate", "elsewhere.yaml").code == 0
    (name,) = [run["run"] for run in done.json["points"][0]["runs"] if run["kind"] == "teacher"]
    shipped = kd_here(tmp_path, "export", name, "--json")
    assert (shipped.code, shipped.json["errors"]) == (0, elsewhere.errors)
    assert "student" not in kd_here(tmp_path, "predict", name, "--test-image", "3").out


def test_what_kd_exported_is_a_teacher_with_its_classes_and_normalisation(elsewhere: Fixture, tmp_path: Path) -> None:
    """A net of kd's, shipped as safetensors, is read again with nothing but its shape and its file."""
    text = ELSEWHERE.replace("digits, heldout: 200", "digits, heldout: 200, mean: [0.3], std: [0.4]")
    made = read(tmp_path, "{model: {hidden: [8]}, train: {epochs: 3, lr: 0.1}}", "--json", text=text)
    assert kd_here(tmp_path, "export", made.json["run"], "--format", "safetensors", "--out", "a.safetensors").code == 0
    again = read(tmp_path, "{model: {hidden: [8]}, weights: a.safetensors}", "--json")
    assert again.json["test"] == made.json["test"]
    assert "Its own mean and std are in the file." in again.err
    shown = kd_here(tmp_path, "evaluate", "elsewhere.yaml", "--run", again.json["run"], "--json")
    assert shown.json["runs"][0]["test"] == made.json["test"]
    says = [kd_here(tmp_path, "predict", one.json["run"], "--test-image", "5").out for one in (made, again)]
    assert says[0] == says[1]


def test_the_order_of_the_classes_in_a_file_is_kept_with_the_run(elsewhere: Fixture, tmp_path: Path) -> None:
    """As `kd export` writes it: outputs in another order than the data's, by name."""
    order = [3, 1, 2, 0, 4, 5, 6, 7, 8, 9]
    state = dict(elsewhere.net.state_dict())
    for key in ("layers.1.weight", "layers.1.bias"):
        state[key] = state[key][order].contiguous()
    save_file(state, tmp_path / "net.safetensors", {"classes": json.dumps([str(c) for c in order])})
    done = read(tmp_path, own("net.safetensors"), "--json")
    assert done.json["test"]["errors"] == elsewhere.errors
    assert "The order of its classes is the one in the file" in done.err
    said = kd_here(tmp_path, "predict", done.json["run"], *[f"--test-image={i}" for i in range(20)], "--json")
    tops = [max(range(10), key=image["views"][0]["p"].__getitem__) for image in said.json["images"]]
    assert tops == elsewhere.net((DIGITS.test.inputs(torch.arange(20)) - MEAN) / STD).argmax(1).tolist()


def test_a_fine_tuned_teacher_starts_from_its_weights(elsewhere: Fixture, tmp_path: Path) -> None:
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    tuned = read(tmp_path, own("net.pt", ", train: {epochs: 1, lr: 1e-30, momentum: 0}"), "--json")
    assert tuned.json["test"]["errors"] == elsewhere.errors  # nothing learned, nothing lost
    fresh = read(tmp_path, own("net.pt", ", head: new, freeze: backbone, train: {epochs: 20, lr: 0.1}"), "--json")
    assert fresh.code == 0, fresh.err
    assert "Its head, layers.1, is newly initialised for the 10 classes" in fresh.err
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "runs" / fresh.json["run"] / "weights.safetensors")
    ends = {key.rpartition("layers.")[2]: tensor for key, tensor in kept.items() if "layers." in key}
    assert torch.equal(ends["0.weight"], elsewhere.net.state_dict()["layers.0.weight"])
    assert not torch.equal(ends["1.weight"], elsewhere.net.state_dict()["layers.1.weight"])
    assert fresh.json["test"]["errors"] < 100


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_backbone_keeps_what_its_batchnorm_knows(affine: bool, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\ndef make(classes, channels):\n"
        f"    norm = nn.BatchNorm2d(4, affine={affine})\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4, 3), norm, nn.Flatten(), nn.Linear(144, classes))\n"
    )
    norm = nn.BatchNorm2d(4, affine=affine)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 10))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    source = "{model: {name: 'nets.py:make'}, weights: net.pt, freeze: backbone, train: {epochs: 2, lr: 0.1}}"
    done = read(tmp_path, source, "--json")
    assert done.code == 0, done.err
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "runs" / done.json["run"] / "weights.safetensors")
    (mean,) = [tensor for key, tensor in kept.items() if key.endswith("running_mean")]
    assert torch.equal(mean, torch.zeros(4))


# ONNX.


def onnx_file(
    path: Path, net: MLP, batch: int | str, softmax: bool, flat: bool, mean: float = 0, std: float = 1
) -> None:
    """The net as an ONNX file, built node by node, of one batch size or of any."""
    shape: list[int | str] = [batch, 64] if flat else [batch, 1, 8, 8]
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("Flatten", ["normal"], ["h0"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("mean", mean), ("std", std))
    ]
    layers = net.linears()
    for i, layer in enumerate(layers):
        for name, value in (("w", layer.weight), ("b", layer.bias)):
            constants.append(numpy_helper.from_array(value.detach().numpy(), f"{name}{i}"))
        nodes.append(helper.make_node("Gemm", [f"h{i}", f"w{i}", f"b{i}"], [f"z{i}"], transB=1))
        last = i == len(layers) - 1
        nodes += [] if last else [helper.make_node("Relu", [f"z{i}"], [f"h{i + 1}"])]
    end = f"z{len(layers) - 1}"
    nodes += [helper.make_node("Softmax", [end], ["p"], axis=1)] if softmax else []
    output = helper.make_tensor_value_info("p" if softmax else end, TensorProto.FLOAT, [batch, 10])
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [output], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(("batch", "softmax", "flat"), [(1, True, False), ("n", False, False), (7, True, True)])
def test_an_onnx_teacher(elsewhere: Fixture, tmp_path: Path, batch: int | str, softmax: bool, flat: bool) -> None:
    onnx_file(tmp_path / "net.onnx", elsewhere.net, batch, softmax, flat)
    done = read(tmp_path, f"{{onnx: net.onnx, input: {{mean: [{MEAN}], std: [{STD}]}}}}", "--json")
    assert done.code == 0, done.err
    assert done.json["test"]["errors"] == elsewhere.errors
    assert ("probabilities, whose logarithm is taken" in done.err) == softmax
    assert (f", {batch} at a time" in done.err) == isinstance(batch, int)
    (tmp_path / "net.onnx").unlink()  # the run has a copy
    (tmp_path / "net.onnx").write_bytes(b"")
    assert kd_here(tmp_path, "predict", done.json["run"], "--test-image", "0").code == 0


def test_logits_of_onnx_are_those_of_the_net(elsewhere: Fixture, tmp_path: Path) -> None:
    onnx_file(tmp_path / "net.onnx", elsewhere.net, 3, softmax=True, flat=False)
    net = imports.imported(Origin(onnx=str(tmp_path / "net.onnx")), None, DIGITS.facts).net
    x = DIGITS.test.inputs(torch.arange(8))
    expected = elsewhere.net(x).log_softmax(1)
    assert torch.allclose(net(x), expected, atol=1e-4)


def test_an_onnx_teacher_teaches_live_and_in_an_ensemble(elsewhere: Fixture, tmp_path: Path) -> None:
    onnx_file(tmp_path / "net.onnx", elsewhere.net, "n", False, False, MEAN, STD)
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    members = (
        f"[{{onnx: net.onnx, weight: 3}}, {own('net.pt')}, {{model: {{hidden: [8]}}, train: {{epochs: 1, lr: 0.1}}}}]"
    )
    text = ELSEWHERE.replace("student:\n", f"ensemble: {{members: {members}}}\nstudent:\n")
    done = read(tmp_path, "{onnx: net.onnx}", "--set", "student.train.jitter=1", "--json", command="run", text=text)
    assert done.code == 0, done.err
    runs = {run["row"]: run for run in done.json["points"][0]["runs"]}
    assert [m["errors"] for m in runs["ensemble"]["members"]][:2] == [elsewhere.errors] * 2
    assert runs["student"]["test"]["errors"] < 250
    assert runs["student of ensemble"]["test"]["errors"] < 250


# Was it misread?


def test_a_permutation_of_the_classes_is_named(elsewhere: Fixture, tmp_path: Path) -> None:
    order = [1, 2, 0, 3, 4, 5, 6, 7, 9, 8]  # output p of the permuted net is class order[p]
    state = dict(elsewhere.net.state_dict())
    for key in ("layers.1.weight", "layers.1.bias"):
        state[key] = state[key][order]
    torch.save(state, tmp_path / "net.pt")
    done = read(tmp_path, own("net.pt"), "--json")
    assert done.json["reading"]["classes"] == [str(c) for c in order]
    said = (
        "what it calls 0 is 1; what it calls 1 is 2; what it calls 2 is 0; what it calls 8 is 9; what it calls 9 is 8"
    )
    (warning,) = done.json["reading"]["warnings"]
    assert set(said.split("; ")) <= set(warning.partition(": ")[2].partition(". Set")[0].split("; "))
    assert "Set its classes: [1, 2, 0, 3, 4, 5, 6, 7, 9, 8]." in warning
    mended = read(tmp_path, own("net.pt", ", classes: [1, 2, 0, 3, 4, 5, 6, 7, 9, 8]"), "--json")
    assert mended.json["test"]["errors"] == elsewhere.errors
    assert mended.json["reading"]["warnings"] == []


def test_a_wrong_normalisation_is_named_before_any_student_starts(elsewhere: Fixture, tmp_path: Path) -> None:
    state = dict(elsewhere.net.state_dict())
    with torch.no_grad():  # the same net for inputs with MNIST's mean and std
        state["layers.0.bias"] = state["layers.0.bias"] + state["layers.0.weight"].sum(1) * (0.1307 - MEAN) / STD
        state["layers.0.weight"] = state["layers.0.weight"] * 0.3081 / STD
    torch.save(state, tmp_path / "net.pt")
    source = "{model: {hidden: [32]}, weights: net.pt, input: {mean: [3.0], std: [0.2]}}"
    done = read(tmp_path, source, "--json")
    assert "(MNIST's)" in " ".join(done.json["reading"]["warnings"])
    assert done.json["reading"]["input"]["mean"] == [0.1307]
    taught = read(tmp_path, source, "-v", command="distill")
    assert taught.err.index("(MNIST's)") < taught.err.index("epoch 1/6")


def test_the_normalisation_is_named_with_what_else_the_net_is_given(elsewhere: Fixture, tmp_path: Path) -> None:
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    done = read(
        tmp_path, "{model: {hidden: [32]}, weights: net.pt, input: {size: 8, mean: [9.0], std: [0.2]}}", "--json"
    )
    mended = done.json["reading"]["warnings"][-1].partition("set its input to ")[2].removesuffix(".")
    assert mended.startswith("{size: 8, mean: [")
    again = read(tmp_path, f"{{model: {{hidden: [32]}}, weights: net.pt, input: {mended}}}", "--json")
    assert done.json["reading"]["input"]["size"] == 8
    assert again.json["reading"]["warnings"] == []


def test_a_teacher_is_held_against_its_published_errors(elsewhere: Fixture, tmp_path: Path) -> None:
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    text = ELSEWHERE + f"expect: {{teacher: {elsewhere.errors - 1}}}\n"
    done = read(tmp_path, own("net.pt"), "--json", text=text)
    said = f"It makes {elsewhere.errors} errors on 500 test images, where at most {elsewhere.errors - 1} are expected"
    assert said in done.json["reading"]["warnings"][0]
    assert said in read(tmp_path, own("net.pt"), text=text, command="distill").err
    text = ELSEWHERE + f"expect: {{teacher: {elsewhere.errors}}}\n"
    assert "expected" not in read(tmp_path, own("net.pt"), text=text).out


def test_a_teacher_that_guesses_is_told(tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.save(MLP(64, [32], 10).state_dict(), tmp_path / "net.pt")
    warnings = read(tmp_path, own("net.pt"), "--json").json["reading"]["warnings"]
    assert warnings == [] or "no better than guessing" in " ".join(warnings)
    state = MLP(64, [32], 10).state_dict() | {"layers.1.weight": torch.zeros(10, 32)}
    torch.save(state, tmp_path / "net.pt")
    assert "no better than guessing" in read(tmp_path, own("net.pt")).out


def test_a_permutation_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    says = torch.tensor([1, 1, 2, 2, 0, 1])  # class 0 is output 1, class 1 is output 2, class 2 is output 0: one error
    logits = nn.functional.one_hot(says, 3).float()
    assert misread.permutation(logits, labels) == [1, 2, 0]
    assert misread.permutation(nn.functional.one_hot(labels, 3).float(), labels) is None


# What is refused.


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code was run')",))


def saved(content: Any) -> bytes:
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def state(**changes: Any) -> dict[str, Tensor]:
    return MLP(64, [32], 10).state_dict() | changes


def refused() -> dict[str, tuple[str, bytes, str]]:
    """By name: the file, its content, and what is said of it."""
    torch.manual_seed(0)
    good = saved(state())
    nan = state(**{"layers.0.bias": torch.full((32,), math.nan)})
    other = MLP(64, [31], 10).state_dict()
    renamed = {k.replace("layers", "blocks"): t for k, t in state().items()}
    hundred = MLP(64, [32], 100).state_dict()
    return {
        "truncated": ("net.pt", good[: len(good) // 2], "is damaged, cut short, or not a file of weights"),
        "empty": ("net.pt", b"", "is damaged, cut short, or not a file of weights"),
        "text": ("net.pth", b"hello, this is no file of weights", "is damaged"),
        "an empty safetensors": ("net.safetensors", b"", "is damaged, cut short, or not a file of weights"),
        "a safetensors that is none": ("net.safetensors", good, "is damaged, cut short, or not a file of weights"),
        "code": ("net.pt", saved({"state_dict": state(), "x": Evil()}), "holds more than tensors"),
        "a pickle": ("net.pt", pickle.dumps({"a": Evil()}), "holds more than tensors"),
        "a whole module": ("net.pt", saved(MLP(64, [32], 10)), "holds more than tensors"),
        "no weights": ("net.pt", saved({"epoch": 3}), "holds no weights: its keys are epoch"),
        "a list": ("net.pt", saved([torch.zeros(3)]), "holds no weights"),
        "nan": ("net.pt", saved(nan), "holds values that are not finite, in layers.0.bias"),
        "another width": ("net.pt", saved(other), "of another shape: layers.0.weight is [31, 64], not [32, 64]"),
        "other keys": ("net.pt", saved(renamed), "4 missing: layers.0.weight, layers.0.bias"),
        "a key alone": ("net.pt", saved({"fc.weight": torch.zeros(2)}), "1 unexpected: fc.weight"),
        "a key less": (
            "net.pt",
            saved({k: t for k, t in state().items() if k != "layers.1.bias"}),
            "1 missing: layers.1.bias",
        ),
        "a key more": ("net.pt", saved(state(extra=torch.zeros(2))), "1 unexpected: extra"),
        "other classes": ("net.pt", saved(hundred), "layers.1.weight is [100, 32], not [10, 32]"),
    }


@pytest.mark.parametrize("case", refused())
def test_wrong_weights_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, said = refused()[case]
    (tmp_path / name).write_bytes(content)
    done = read(tmp_path, own(name))
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert said in done.err
    assert f"{tmp_path / name}" in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert "elsewhere.yaml:4: teacher.weights: " in done.err
    assert not (tmp_path / "runs").exists()


KEYS = {
    "two sources": ("{model: {hidden: [32]}, weights: net.pt, onnx: net.onnx}", "needs either model or onnx or logits"),
    "weights without a net": ("{onnx: net.onnx, weights: net.pt}", "teacher.weights: belongs to a model"),
    "no file": ("{model: {hidden: [32]}, weights: gone.pt}", "teacher.weights: there is no file "),
    "a head for nothing": (
        "{model: {hidden: [32]}, weights: net.pt, head: new}",
        "teacher.train: is missing: a fresh head",
    ),
    "no training": (
        "{model: {hidden: [32]}}",
        "teacher.train: is missing: say how the net is trained, or name its weights",
    ),
    "an input of its own": (
        "{model: {hidden: [32]}, train: {epochs: 1, lr: 1}, input: {size: 8}}",
        "teacher.input: belongs to a net that was trained elsewhere",
    ),
    "onnx that is trained": (
        "{onnx: net.onnx, train: {epochs: 1, lr: 0.1}}",
        "teacher.train: belongs to a model and its weights",
    ),
    "pretrained by nobody": (
        "{model: {name: resnet8, pretrained: true}}",
        "teacher.model.pretrained: belongs to torchvision",
    ),
    "classes that lack one": (
        "{model: {hidden: [32]}, weights: net.pt, classes: [0, 1]}",
        "teacher.classes: lacks 2, 3, 4, 5, 6",
    ),
    "a class twice": ("{model: {hidden: [32]}, weights: net.pt, classes: [0, 0]}", "teacher.classes: names 0 twice"),
    "a mean without std": (
        "{model: {hidden: [32]}, weights: net.pt, input: {mean: [1]}}",
        "teacher.input.std: is missing: mean needs it",
    ),
    "three means for one channel": (
        "{model: {hidden: [32]}, weights: net.pt, input: {mean: [1, 1, 1], std: [1, 1, 1]}}",
        "teacher.input.mean: must have 1 number, not 3",
    ),
    "an unknown key": ("{model: {hidden: [32]}, weights: net.pt, normalise: true}", "teacher.normalise: unknown key"),
    "onnx that is none": ("{onnx: net.pt}", "is damaged, cut short, or not an ONNX file"),
    "onnx of another input": ("{onnx: other.onnx}", "takes [1, 12], and cannot be given images [1, 8, 8]"),
    "onnx of other classes": ("{onnx: five.onnx}", "must give one output of floats for 10 classes"),
}


@pytest.mark.parametrize("case", KEYS)
def test_wrong_keys_are_refused_in_one_line(elsewhere: Fixture, tmp_path: Path, case: str) -> None:
    source, said = KEYS[case]
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    onnx_file(tmp_path / "net.onnx", elsewhere.net, "n", False, False)
    for name, shape, classes in (("other.onnx", [1, 12], 10), ("five.onnx", [1, 1, 8, 8], 5)):
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        weights = numpy_helper.from_array(np.ones((math.prod(shape), classes), np.float32), "w")
        nodes = [helper.make_node("Flatten", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, classes])
        graph = helper.make_graph(nodes, "net", [value], [out], [weights])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (tmp_path / name).write_bytes(made.SerializeToString())
    done = read(tmp_path, source)
    assert done.code == 2
    assert said in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err


# Inputs of its own.


class Echo(nn.Module):
    """Logits that are the first pixels of what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize(
    ("shape", "bytes_", "pick", "expected"),
    [
        ([1, 2, 2], False, [0, 1, 2], [0.0, 0.25, 0.5]),
        ([1, 2, 2], True, [0, 1, 2], [0.0, 63.75, 127.5]),
        ([1, 2, 2], False, [2, 0], [0.5, 0.0]),
        ([3, 2, 2], False, [0, 1, 2], [0.0, 0.25, 0.5]),
        ([1, 1, 1], False, [0], [0.375]),
    ],
)
def test_a_net_sees_images_as_it_knows_them(
    shape: list[int], bytes_: bool, pick: list[int], expected: list[float]
) -> None:
    x = torch.tensor([[[[0.0, 0.25], [0.5, 0.75]]]])
    assert torch.allclose(imports.Seen(Echo(), facts(shape, 3), bytes_, pick)(x), torch.tensor([expected]))


def test_colours_become_the_grey_of_pillow() -> None:
    from PIL import Image

    rgb = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = torch.from_numpy(np.array(Image.fromarray(rgb.permute(1, 2, 0).numpy()).convert("L")))

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    seen = imports.Seen(Same(), facts([1, 5, 7], 35), True, list(range(35)))(rgb[None].float() / 255)
    assert (seen - grey.flatten().float()).abs().max() <= 1


def test_weights_replace_all_and_only_what_fits() -> None:
    net, other = MLP(4, [3], 2), MLP(4, [3], 2)
    fit_weights(net, Weights(other.state_dict(), {}, []), Path("f"))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    head = net.state_dict()["layers.1.weight"].clone()
    hundred = MLP(4, [3], 100)
    fit_weights(net, Weights(hundred.state_dict(), {}, []), Path("f"), fresh="layers.1")
    assert torch.equal(net.state_dict()["layers.1.weight"], head)
    assert torch.equal(net.state_dict()["layers.0.weight"], hundred.state_dict()["layers.0.weight"])


def test_the_last_layer_is_the_head() -> None:
    import timm
    from torchvision import models

    assert last_layer(models.resnet18()) == "fc"
    assert last_layer(models.mobilenet_v3_small()) == "classifier.3"
    assert last_layer(models.squeezenet1_0()) == "classifier.1"
    assert last_layer(timm.create_model("test_resnet")) == "fc"
    with pytest.raises(BadInput, match="no linear or convolutional layer"):
        last_layer(nn.ReLU())


# Libraries.


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the libraries, and no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path


HEAD = ", head: new, input: {size: 32}, train: {epochs: 1, lr: 0.01}}"


def test_torchvision_offline_and_from_a_file_laid_where_the_hub_puts_it(hubs: Path) -> None:
    source = "{model: {name: 'torchvision:squeezenet1_1', pretrained: true}"
    assert "has 1,000 classes, but not 0, one of the data" in read(hubs, source + "}").err
    done = read(hubs, source + HEAD)
    assert done.code == 2
    place = hubs / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    assert f"put it at {place}" in done.err
    assert "squeezenet1_1-b8a52dc0.pth elsewhere" in done.err
    from torchvision import models

    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(models.squeezenet1_1().state_dict(), place)
    planned = read(hubs, source + HEAD, "--dry-run")
    assert (planned.code, " on this machine, 1 at once" in planned.out) == (0, True), planned.err
    assert read(hubs, source + HEAD).code == 0


def test_timm_offline_and_from_a_file_laid_where_the_hub_puts_it(hubs: Path) -> None:
    source = "{model: {name: 'timm:test_resnet', pretrained: true}"
    done = read(hubs, source + HEAD)
    assert done.code == 2
    place = hubs / "hf" / "models--timm--test_resnet.r160_in1k" / "snapshots" / "main" / "model.safetensors"
    assert f"put it at {place}" in done.err, done.err
    import timm

    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model("test_resnet").state_dict(), place)
    done = read(hubs, source + HEAD, "--json")
    assert done.code == 0, done.err
    assert "Its weights are timm's timm/test_resnet.r160_in1k." in done.err


def test_a_library_says_how_its_net_sees() -> None:
    origin, content = imports.resolved(Origin(), Model(name="torchvision:resnet18", pretrained=True))
    assert origin.input == Input(size=224, channels=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert content == "ResNet18_Weights.IMAGENET1K_V1"
    tagged = Model(name="timm:resnet18.a1_in1k", pretrained=True)
    assert imports.resolved(Origin(), tagged)[1] == "timm/resnet18.a1_in1k"
    assert models.build(
        Model(name="timm:test_resnet.r160_in1k"), DIGITS.facts.model_copy(update={"shape": [3, 32, 32]})
    )
    with pytest.raises(BadInput, match=r"timm:resnet18\.foo: "):
        imports.resolved(Origin(), Model(name="timm:resnet18.foo", pretrained=True))
    origin, _ = imports.resolved(Origin(input=Input(size=64)), Model(name="timm:resnet18", pretrained=True))
    assert origin.input == Input(size=64, channels=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50"])
def test_a_net_of_a_library_that_does_not_classify_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=f"^torchvision:{name}: does not classify images$"):
        imports.resolved(Origin(), Model(name=f"torchvision:{name}", pretrained=True))


def test_the_classes_of_a_library_are_picked_by_name() -> None:
    data = facts([3, 32, 32], 2).model_copy(update={"classes": ["tabby", "zebra"]})
    model = Model(name="torchvision:squeezenet1_1", pretrained=True)
    origin, _ = imports.resolved(Origin(input=Input(size=32)), model)
    net = imports.imported(origin, model, data, load=False).net
    from torchvision import models

    names = models.SqueezeNet1_1_Weights.DEFAULT.meta["categories"]
    assert isinstance(net, imports.Seen)
    assert [names[i] for i in net.pick.tolist()] == ["tabby", "zebra"]


def test_another_content_is_another_run(elsewhere: Fixture, tmp_path: Path) -> None:
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    first = read(tmp_path, own("net.pt"), "--json").json["run"]
    (tmp_path / "moved").mkdir()
    (tmp_path / "net.pt").rename(tmp_path / "moved" / "net.pt")
    assert read(tmp_path, own("moved/net.pt"), "--json").json["run"] == first
    torch.save({"state_dict": elsewhere.net.state_dict()}, tmp_path / "moved" / "net.pt")
    assert read(tmp_path, own("moved/net.pt"), "--json").json["run"] != first


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(BadInput, match="is damaged"):
        read_weights(tmp_path / "a.pt")


def test_the_section_is_in_the_schema() -> None:
    assert "onnx" in str(Experiment.model_json_schema())


# A file of logits.


def test_a_file_of_logits_teaches_as_its_net_does(trained: Any, tmp_path: Path) -> None:
    """The student of what a teacher's run exported learns what the student of the run itself learned."""
    (name,) = [
        d["run"]
        for d in json.loads((trained.folder / "run.json").read_text())["points"][0]["runs"]
        if d["row"] == "teacher"
    ]
    where = ["--runs-dir", str(trained.folder / "runs"), "--format", "logits", "--out", str(tmp_path / "a.npz")]
    assert kd_here(trained.folder, "export", name, *where).code == 0
    done = read(tmp_path, "{logits: a.npz}", "--json", command="run")
    assert done.code == 0, done.err
    mine = {d["row"]: d for d in done.json["points"][0]["runs"]}
    theirs = {d["row"]: d for d in json.loads((trained.folder / "run.json").read_text())["points"][0]["runs"]}
    for row in ("teacher", "baseline", "student"):
        assert mine[row]["test"] == theirs[row]["test"]
    assert mine["student"]["last_epoch"]["t2_kl"] == theirs["student"]["last_epoch"]["t2_kl"]
    assert "multiply_adds_kept" not in mine["student"]["teacher"]
    assert kd_here(tmp_path, "evaluate", "elsewhere.yaml").code == 0
    name, said = mine["teacher"]["run"], "is not a torch net, but the content of"
    calls = {"is a file of logits": ["predict", name, "--test-image", "0"], said: ["export", name]}
    for said, command in calls.items():
        refused = kd_here(tmp_path, *command)
        assert refused.code == 2, refused.err
        assert said in refused.err


def test_a_file_of_logits_without_test_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 4 * np.eye(10, dtype=np.float32)[DIGITS.train.labels])
    assert "It has no answers for the 500 test images." in read(tmp_path, "{logits: a.npy}").err
    done = read(tmp_path, "{logits: a.npy}", "--json", command="run")
    assert done.code == 0, done.err
    assert [row["row"] for row in done.json["points"][0]["table"]][:2] == ["baseline", "student"]
    assert kd_here(tmp_path, "evaluate", "elsewhere.yaml").code == 0
    again = read(tmp_path, "{logits: a.npy}", "--json")
    assert again.json["reading"]["transfer"]["errors"] == 0
    walk = ("--set", "grid={distill.T: [1, 4]}", "--set", "omit_classes=[]", "--seeds", "5,6")
    grid = read(tmp_path, "{logits: a.npy}", *walk, command="run")
    assert "at 1 of 2 points" in grid.out or "of 2 points" in grid.out, grid.err
    compared = kd_here(tmp_path, "compare", "tiny/baseline", "tiny/distill", "tiny/train-teacher").err
    assert re.search(r"^left out: tiny/train-teacher/\S+: has no answers for the test images$", compared, re.MULTILINE)
    rows = kd_here(tmp_path, "evaluate", "elsewhere.yaml", "--seeds", "5,6").out
    assert "student teacher.seed" not in rows  # one teacher for all seeds, and so one row


@pytest.mark.parametrize("words", [[], ["--top-k", "3", "--half"]])
def test_what_was_exported_of_held_out_images_is_read_with_them(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: 2"))
    held = ["--set", "data.evaluate_on=heldout"]
    own = kd_here(tmp_path, "train-teacher", "tiny.yaml", *held, "--json").json
    done = kd_here(tmp_path, "export", own["run"], "--format", "logits", "--out", "a.npz", "--json", *words)
    assert done.code == 0, done.err
    assert done.json["errors"] == own["test"]["errors"]
    with np.load(tmp_path / "a.npz") as file:
        assert {key for key in file if key.startswith("test")} == set()
    again = read(tmp_path, "{logits: a.npz}", "--json", *held)
    assert again.code == 0, again.err
    assert again.json["test"] == own["test"]
    assert read(tmp_path, "{logits: a.npz}").code == 0  # of all training images


def test_of_a_file_of_logits_errors_that_nobody_counted_are_not_as_expected(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 4 * np.eye(10, dtype=np.float32)[DIGITS.train.labels])
    text = ELSEWHERE + "expect: {teacher: 100, student: 500}\n"
    done = read(tmp_path, "{logits: a.npy}", "--check", command="run", text=text)
    assert done.code == 3
    assert [line for line in done.err.splitlines() if "expect." in line] == [
        "expect.teacher: its errors are not counted"
    ]


def test_a_file_of_logits_holds_the_held_out_images_too(tmp_path: Path) -> None:
    """Of all 1,297 training images; those whose errors are counted are looked up among them."""
    logits = 4 * np.eye(10, dtype=np.float32)[DIGITS.train.labels]
    heldout = open_dataset(Data(name="digits", heldout=200)).heldout.numpy()
    logits[heldout[:7]] *= -1
    np.savez(tmp_path / "a.npz", train=logits, test=np.zeros((500, 10), np.float32))
    done = read(tmp_path, "{logits: a.npz}", "--json", "--set", "data.evaluate_on=heldout")
    assert done.code == 0, done.err
    assert done.json["test"]["errors"] == 7
    assert done.json["test"]["total"] == len(heldout)
    assert done.json["reading"]["transfer"] == {"errors": 0} | done.json["reading"]["transfer"]
    assert done.json["reading"]["transfer"]["total"] == 1297 - len(heldout)
    assert "Ignored: its test." in done.err


def test_a_file_of_logits_knows_no_other_view(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1297, 10), np.float32))
    done = read(tmp_path, "{logits: a.npy}", "--set", "student.train.jitter=1", command="distill")
    assert done.code == 2
    assert "student.train: shows views of the images, and a file of logits has answers for none" in done.err


def test_a_run_of_a_file_of_logits_knows_no_other_view_either(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 4 * np.eye(10, dtype=np.float32)[DIGITS.train.labels])
    read(tmp_path, "{logits: a.npy}")
    (name,) = (f"tiny/train-teacher/{run.name}" for run in (tmp_path / "runs/tiny/train-teacher").iterdir())
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ["distill", "tiny.yaml", "--dry-run", "--teacher", name]
    assert kd_here(tmp_path, *words).code == 0
    done = kd_here(tmp_path, *words, "--set", "student.train.jitter=1")
    assert (done.code, done.out) == (2, "")
    assert f"--teacher {name}: a file of logits, which has no answers for views of the images" in done.err
    own = TINY.replace("optimizer: adam, lr: 1e-2", "optimizer: adam, lr: 1e-2, jitter: 1")
    own = own.replace("- omit: [3]", "- omit: [3]\n    train: {epochs: 1, lr: 0.1}")
    (tmp_path / "tiny.yaml").write_text(own)  # whose student alone sees views
    assert kd_here(tmp_path, "omit-classes", *words[1:]).code == 0


def test_a_file_of_logits_that_no_student_asks_may_have_answers_for_no_view(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 4 * np.eye(10, dtype=np.float32)[DIGITS.train.labels])
    member = "{model: {hidden: [8]}, train: {epochs: 1, lr: 0.1}}"
    text = (
        ELSEWHERE.replace("distill: {", "distill: {teacher: ensemble, ")
        + f"ensemble: {{members: [{member}, {member}]}}"
    )
    words = ["--set", "student.train.jitter=1", "--dry-run"]
    assert read(tmp_path, "{logits: a.npy}", *words, command="run", text=text).code == 0


def test_a_misread_run_that_is_named_is_told_too(elsewhere: Fixture, tmp_path: Path) -> None:
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    assert read(tmp_path, own("net.pt").replace(f"mean: [{MEAN}]", "mean: [9]")).code == 0
    (name,) = (f"tiny/train-teacher/{run.name}" for run in (tmp_path / "runs/tiny/train-teacher").iterdir())
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = kd_here(tmp_path, "distill", "tiny.yaml", "--teacher", name, "--epochs", "1", "--jobs", "1")
    assert done.code == 0, done.err
    assert f"{name}: It " in done.err


def test_what_only_training_needs_is_not_asked_of_a_net_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def forward(self, x):\n"
        "        logits = super().forward(x)\n        return (logits, logits) if self.training else logits\n\n\n"
        "def make(classes, channels):\n"
        "    return Net(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), tmp_path / "net.pt")
    source = "{model: {name: 'nets.py:make'}, weights: net.pt"
    assert read(tmp_path, source + "}", "--dry-run").code == 0
    assert read(tmp_path, source + ", train: {epochs: 1, lr: 0.1}}", "--dry-run").code == 2


def test_the_models_of_members_are_read_as_the_teacher_is(elsewhere: Fixture, tmp_path: Path) -> None:
    torch.save(elsewhere.net.state_dict(), tmp_path / "net.pt")
    source = own("net.pt", ", train: {epochs: 1, lr: 0.1}")
    text = ELSEWHERE + "ensemble: {members: 2, models: [{hidden: [32]}, {hidden: [16]}]}\n"
    done = read(tmp_path, source, "--dry-run", command="ensemble", text=text)
    assert done.code == 2
    assert "ensemble.models.1: read as teacher says: " in done.err


WRONG: dict[str, tuple[list[str], str]] = {  # rows of answers, and what is said of them
    "a NaN": (["nan,2,3,4,5,6,7,8,9,1"] * 1297, "train, row 0, column 0: is not a finite number"),
    "a word": (["1,2,cat,4,5,6,7,8,9,1"] * 1297, "train, row 0, column 2: is not a finite number"),
    "a column too many": (["1,2,3,4,5,6,7,8,9,1,2"] * 1297, "row 0 has 11 fields, and the header 10"),
    "no probabilities": ([".9,0,0,0,0,0,0,0,0,0"] * 1297, "train: its values are like probabilities, but"),
    "a row too few": (["1,2,3,4,5,6,7,8,9,1"] * 1296, "train has 1,296 rows for 1,297 training images"),
    "nothing": ([], "train has 0 rows for 1,297 training images"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_dry_run_says_of_a_wrong_file_of_logits_what_the_run_says(tmp_path: Path, wrong: str) -> None:
    rows, line = WRONG[wrong]
    (tmp_path / "a.csv").write_text("\n".join(["0,1,2,3,4,5,6,7,8,9", *rows]))
    told = [read(tmp_path, "{logits: a.csv}", *dry) for dry in ((), ("--dry-run",))]
    assert [(done.code, done.out) for done in told] == [(2, "")] * 2
    assert told[0].err == told[1].err
    assert f"teacher.logits: {tmp_path / 'a.csv'}: {line}" in told[0].err
    assert len(told[0].err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_forest_teaches_a_perceptron_on_a_table(tmp_path: Path) -> None:
    """scikit-learn's breast cancer table: a forest's probabilities, as a file of a column a class."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import train_test_split

    table = load_breast_cancer()
    x, x_test, y, y_test = train_test_split(table.data, table.target, test_size=169, random_state=0)
    names = [str(name) for name in table.target_names]
    np.savez(tmp_path / "table.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test, classes=np.array(names))
    forest = RandomForestClassifier(100, random_state=0).fit(x, y)
    with (tmp_path / "forest.csv").open("w") as file:
        file.write(f"split,index,{names[1]},{names[0]}\n")  # in another order than the data's
        for part, images in (("train", x), ("test", x_test)):
            for i, p in enumerate(forest.predict_proba(images)):
                file.write(f"{part},{i},{p[1]:.4f},{p[0]:.4f}\n")
    (tmp_path / "forest.yaml").write_text(
        "name: forest\nseed: [0, 1]\ndata: {arrays: table.npz}\nteacher: {logits: forest.csv}\n"
        "student:\n  model: {hidden: [8]}\n  train: {epochs: 30, batch_size: 32, optimizer: adam, lr: 0.01}\n"
        "distill: {T: 2, lambda1: 0.9}\n"
    )
    done = kd_here(tmp_path, "run", "forest.yaml", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    assert "probabilities, whose logarithm is taken" in done.err
    rows = {row["row"]: row["errors"] for row in done.json["points"][0]["table"]}
    assert rows["teacher"] == [int((forest.predict(x_test) != y_test).sum())]
    assert max(rows["student"]) <= 20
    (tmp_path / "x.png").write_bytes(b"")
    student = next(run["run"] for run in done.json["points"][0]["runs"] if run["row"] == "student")
    refused = kd_here(tmp_path, "predict", student, "x.png")
    assert (refused.code, "classifies the rows of a table, not image files" in refused.err) == (2, True)


# What a new user tripped over.


def test_a_wrong_file_of_logits_is_named_without_test_images(tmp_path: Path) -> None:
    labels = 9 - DIGITS.train.labels  # its columns are in the opposite order
    np.save(tmp_path / "a.npy", 4 * np.eye(10, dtype=np.float32)[labels] - 1)
    said = "what it calls 9 is 0"
    told = read(tmp_path, "{logits: a.npy}").out
    assert said in told
    assert "4, 3, 2, 1, 0] or, where the file names its columns, correct them." in told  # that key is refused then
    done = read(tmp_path, "{logits: a.npy}", "-v", command="distill")
    assert done.err.index(said) < done.err.index("epoch 1/6")
    run = json.loads(kd_here(tmp_path, "runs", "--match", "teacher", "--json").out)["runs"][0]
    assert "errors" not in run
    alone = ["evaluate", "elsewhere.yaml", "--run", run["run"]]
    for words in (alone, ["report", run["run"]], ["compare", run["run"], "tiny/baseline"], ["export", run["run"]]):
        refused = kd_here(tmp_path, *words)
        assert refused.code == 2, refused.err
        assert len(refused.err.strip().splitlines()) == 1
    student = kd_here(tmp_path, "predict", "tiny/distill/0-", "--test-image", "1")
    assert student.code == 0, student.err
    assert "without its teacher's predictions: tiny/train-teacher/" in student.err


@pytest.mark.parametrize("channels", [1, 3])
def test_another_normalisation_is_looked_for_with_the_channels_of_the_net(tmp_path: Path, channels: int) -> None:
    """A net of one channel on colours, a net of three on grey images: neither is a reason to fail."""
    rng, shape = np.random.default_rng(0), (60, 4, 4) if channels == 3 else (60, 3, 4, 4)
    x, y = rng.integers(0, 256, shape).astype(np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    torch.save(MLP(16 * channels, [], 3).state_dict(), tmp_path / "net.pt")
    text = ELSEWHERE.replace("{name: digits, heldout: 200}", "{arrays: a.npz}").partition("omit_classes")[0]
    mean = "[0.485, 0.456, 0.406]" if channels == 3 else "[0.1307]"
    std = "[0.229, 0.224, 0.225]" if channels == 3 else "[0.3081]"
    source = f"{{model: {{hidden: []}}, weights: net.pt, input: {{channels: {channels}, mean: {mean}, std: {std}}}}}"
    done = read(tmp_path, source, text=text)
    assert done.code == 0, done.err


def test_a_file_says_what_its_net_sees(elsewhere: Fixture, tmp_path: Path) -> None:
    onnx_file(tmp_path / "net.onnx", elsewhere.net, "n", False, False)
    for key, value, own in (("size", 12, 8), ("channels", 3, 1)):
        done = read(tmp_path, f"{{onnx: net.onnx, input: {{{key}: {value}}}}}")
        assert done.code == 2
        assert f"teacher.input.{key}: must be {own}, as the file says" in done.err
    done = read(tmp_path, "{onnx: net.onnx, input: {mean: [1, 1, 1], std: [1, 1, 1]}}")
    assert "teacher.input.mean: must have 1 number, not 3" in done.err
    exported = read(tmp_path, "{onnx: net.onnx}", "--json").json["run"]
    refused = kd_here(tmp_path, "export", exported)
    assert refused.code == 2
    assert "is not a torch net, but the content of" in refused.err
    assert kd_here(tmp_path, "export", exported, "--format", "logits", "--out", "l.npz").code == 0


def test_the_tutorials_checkpoint_and_a_program(elsewhere: Fixture, tmp_path: Path) -> None:
    whole = {"epoch": 1, "model_state_dict": elsewhere.net.state_dict(), "loss": torch.tensor(0.4)}
    torch.save(whole, tmp_path / "net.pt")
    assert read(tmp_path, own("net.pt"), "--json").json["test"]["errors"] == elsewhere.errors
    program = torch.export.export(elsewhere.net, (torch.zeros(2, 1, 8, 8),))
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "program.pt2").rename(tmp_path / "net.pt")
    assert "is a torch program, not weights" in read(tmp_path, own("net.pt")).err
    torch.save({"a": Evil()}, tmp_path / "net.pt")
    assert "(failed.)" not in read(tmp_path, own("net.pt")).err
