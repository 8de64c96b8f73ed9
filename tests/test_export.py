"""Exported nets against torch and another runtime, the model card, and the wrong things typed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import OWN_DATA, OWN_NETS, Shell, kd_here
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from kdcli import BadInput, Failed, code, config, losses
from kdcli.data import sources
from kdcli.data.dataset import open_dataset
from kdcli.runs.directory import Places, Run, open_run
from kdcli.runs.spec import Spec
from kdcli.teachers.teacher import dataset_of, nets
from kdcli.training.train import train
from kdcli.use import export

CPU = torch.device("cpu")
DIGITS = open_dataset(config.Data(name="digits"))
MORE = (
    OWN_DATA
    + """

from torch import nn


def channels(count):
    found = load()
    return found | {x: np.ascontiguousarray(found[x][:, :count]) for x in ("x_train", "x_test")}


def grey():
    return channels(1)


def pairs():
    return channels(2)


class Talking(nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x.flatten(1))


def talking(classes, channels):
    return Talking(channels * 54, classes)


class Branching(nn.Linear):
    def forward(self, x):
        out = super().forward(x.flatten(1))
        return out if out.sum() > 0 else -out


def branching(classes, channels):
    return Branching(channels * 54, classes)
"""
)


class Own:
    """A folder with somebody's own images and nets, and runs of them, trained for an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.places = folder, Places(folder / "runs")
        for name, text in (("own_data", OWN_DATA), ("own_nets", OWN_NETS), ("more", MORE)):
            (folder / f"{name}.py").write_text(text)

    def run(self, images: str = "own_data.py:load", net: str | None = "own_nets.py:make", **more: Any) -> Run:
        """A finished run; without a `net` of a perceptron."""
        source = config.Data(function=f"{self.folder}/{images}")
        what: dict[str, Any] = {"command": "baseline", "seed": 0, "dataset": open_dataset(source).facts} | more
        if what["command"] != "ensemble":
            name = f"{self.folder}/{net}"
            model = config.Model(name=name) if net else config.Model(hidden=[5])
            fitted = config.Train(epochs=2, batch_size=10, optimizer="adam", lr=1e-2)
            what |= {"model": model, "train": fitted, "code": code.digest(name) if net else None}
        run = Run(self.places.runs_dir, Spec(experiment="own", data=source, **what))
        if not run.finished():
            train(run.spec, self.places, lambda *_: None, lambda _: None)
        return run


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    return Own(tmp_path_factory.mktemp("own"))


def find(shell: Shell, row: str) -> Run:
    """The run of a row of the table."""
    documents = json.loads((shell.folder / "run.json").read_text())["points"][0]["runs"]
    return open_run(shell.folder / "runs", next(d["run"] for d in documents if d["row"] == row))


def wanted(run: Run, inputs: Tensor) -> Tensor:
    """Probabilities by the definition of the ensemble average."""
    return losses.average(torch.stack([net(inputs) for net in nets(run, CPU)]), 1.0, run.spec.average).exp()


@pytest.mark.parametrize("row", ["student", "teacher", "ensemble"])
def test_an_onnx_file_says_what_torch_says(row: str, trained: Shell, tmp_path: Path) -> None:
    run, file = find(trained, row), tmp_path / "net.onnx"
    done = kd_here(trained.folder, "export", run.name, "--out", str(file), "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    document = done.json
    session, inputs = onnxruntime.InferenceSession(str(file)), DIGITS.test.inputs(torch.arange(len(DIGITS.test)))
    for batch in (1, 500):  # dynamic
        (found,) = session.run(None, {"inputs": inputs[:batch].numpy()})
        assert np.allclose(found, wanted(run, inputs[:batch]).numpy(), atol=1e-6)
    assert document["errors"] == document["torch_errors"] == run.result().test.errors
    assert document["max_difference"] < 1e-5
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["net.onnx", "net.onnx.md"]
    card = (tmp_path / "net.onnx.md").read_text()
    assert f"| errors | {document['errors']} of 500 test images |" in card
    assert "of the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9:" in card
    assert ("| soft targets | T = 4, lambda1 = 0.9, lambda2 = 0.1 |" in card) == (row == "student")
    assert ("| average | arithmetic, of the members' outputs |" in card) == (row == "ensemble")
    assert ("| net | 64-16-10, ReLU between the layers |" in card) == (row == "student")


def test_the_other_formats(trained: Shell, tmp_path: Path) -> None:
    run, inputs = find(trained, "student"), DIGITS.test.inputs(torch.arange(len(DIGITS.test)))
    for form, suffix in (("torch", "pt2"), ("safetensors", "safetensors")):
        done = kd_here(trained.folder, "export", run.name, "--format", form, "--out", str(tmp_path / f"net.{suffix}"))
        assert done.code == 0, done.err
    program = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 3):
        assert torch.allclose(program(inputs[:batch]).double(), wanted(run, inputs[:batch]), atol=1e-6)
    weights, own_weights = load_file(tmp_path / "net.safetensors"), run.load("weights")
    assert all(torch.equal(weights[f"members.0.{name}"], tensor) for name, tensor in own_weights.items())


@pytest.mark.parametrize("form", ["onnx", "torch", "safetensors"])
def test_a_convolutional_net_of_colours_is_exported(
    form: export.Form, own: Own, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    run, file = own.run(), tmp_path / f"net{export.SUFFIXES[form]}"
    exported = export.export(run, form, file, None)
    assert (exported.errors, exported.total) == (run.result().test.errors, 60)
    assert exported.bytes == file.stat().st_size
    assert str(own.folder).encode() not in file.read_bytes()
    out, err = capfd.readouterr()
    assert out == ""
    assert set(err.splitlines()) == {"a net is made"}  # which own_nets.py prints
    assert len(recwarn) == 0
    card = Path(exported.card).read_text()
    for row in (
        "| net | own_nets.py:make (339 parameters) |",
        "| input | `inputs`, float32 [batch, 3, 6, 9]: red, green and blue, 0 to 1 |",
        "the classes cat, dog, owl",
        "| data | own_data.py:load, 120 training images |",
        f"| cost | 339 parameters, {8 * 27 * 54 + 32 * 3:,} multiply-adds per image |",
    ):
        assert row in card


def test_an_onnx_file_knows_its_run_its_classes_and_its_shape(own: Own, tmp_path: Path) -> None:
    run, file = own.run(), tmp_path / "net.onnx"
    export.export(run, "onnx", file, None)
    session = onnxruntime.InferenceSession(str(file))
    about = session.get_modelmeta().custom_metadata_map
    assert about["run"] == run.name
    assert json.loads(about["classes"]) == ["cat", "dog", "owl"]
    assert json.loads(about["shape"]) == [3, 6, 9]
    assert [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()] == [("inputs", "tensor(float)", [3, 6, 9])]
    assert [(o.name, o.shape[1:]) for o in session.get_outputs()] == [("probabilities", [3])]
    inputs = torch.rand(7, 3, 6, 9)
    assert torch.allclose(export.onnx_net(file)[0](inputs).double(), wanted(run, inputs), atol=1e-6)


def test_a_geometric_ensemble_is_exported_as_one(own: Own, tmp_path: Path) -> None:
    parents = [own.run(command="train-teacher", seed=seed).name for seed in (0, 1)]
    geometric, arithmetic = (
        own.run(command="ensemble", parents=parents, average=how) for how in ("geometric", "arithmetic")
    )
    inputs = 20 * torch.rand(7, 3, 6, 9)
    for run in (geometric, arithmetic):
        export.export(run, "onnx", tmp_path / f"{run.spec.average}.onnx", None)
        net, *_ = export.onnx_net(tmp_path / f"{run.spec.average}.onnx")
        assert torch.allclose(net(inputs).double(), wanted(run, inputs), atol=1e-6)
    assert not torch.allclose(wanted(geometric, inputs), wanted(arithmetic, inputs), atol=1e-4)


def test_the_card_of_a_table_asks_for_its_columns_as_they_are(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(40, 9, (60, 3)), np.arange(60) % 2
    np.savez(tmp_path / "t.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    net = "{model: {hidden: [4]}, train: {epochs: 1, batch_size: 20, lr: 0.1}}"
    (tmp_path / "t.yaml").write_text(
        f"name: t\ndata: {{arrays: t.npz}}\nteacher: {net}\nstudent: {net}\ndistill: {{T: 2, lambda1: 0.9}}\n"
    )
    run = kd_here(tmp_path, "train-teacher", "t.yaml", "--json").json["run"]
    assert kd_here(tmp_path, "export", run, "--out", "net.onnx").code == 0
    card = (tmp_path / "net.onnx.md").read_text()
    assert "float32 [batch, 3, 1, 1]: the columns as they are in the table, which the net itself normalises |" in card


def test_the_card_names_the_first_of_many_classes(own: Own, tmp_path: Path) -> None:
    card = export.export(own.run("own_data.py:hundred", None), "onnx", tmp_path / "net.onnx", None).card
    text = Path(card).read_text()
    assert "[batch, 100], of the classes kind 0, kind 1, kind 2, … (100 in all): the softmax" in text
    assert "| net | 162-5-100, ReLU between the layers |" in text


@pytest.mark.parametrize(
    ("form", "images"), [("onnx", "grey"), ("onnx", "colours"), ("onnx", "pairs of channels"), ("torch", "colours")]
)
def test_the_lines_of_the_card_run_the_file(form: export.Form, images: str, own: Own, tmp_path: Path) -> None:
    """Typed as they stand, in another process, they say of an image what the run says."""
    run = own.run(f"more.py:{images.split()[0]}" if images != "colours" else "own_data.py:load")
    test = dataset_of(run, None).test
    card = Path(export.export(run, form, tmp_path / f"net{export.SUFFIXES[form]}", None).card).read_text()
    lines = card.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in lines.splitlines() if line]) <= 14
    for i in range(2):
        inputs = test.inputs(torch.tensor([i]))
        array = np.round(255 * inputs[0].numpy().transpose(1, 2, 0)).astype(np.uint8)
        if images == "pairs of channels":
            np.save(tmp_path / "INPUTS.npy", inputs.numpy())
        else:
            turned, exif = Image.fromarray(array.squeeze()).rotate(90 * i, expand=True), Image.Exif()
            exif[0x0112] = (1, 6)[i]  # the second as a phone stores it, to be shown turned back
            turned.save(tmp_path / "IMAGE.png", exif=exif)
        done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=True)
        p = wanted(run, inputs)[0]
        assert done.stdout == f"{run.spec.dataset.classes[int(p.argmax())]} {p.max():.4f}\n"


@pytest.mark.parametrize("net", ["own_nets.py:make", None])
def test_a_quantised_file_is_told_beside_that_of_float32(net: str | None, own: Own, tmp_path: Path) -> None:
    run, file = own.run(net=net), tmp_path / "net.onnx"
    done = kd_here(own.folder, "export", run.name, "--int8", "--out", str(file), "--json")
    assert done.code == 0, done.err
    assert set(done.err.splitlines()) <= {"a net is made"}  # which own_nets.py prints
    told, float32 = done.json["int8"], export.export(run, "onnx", tmp_path / "float32.onnx", None)
    assert told["calibrated_on"] == 120
    assert told["float32_bytes"] == float32.bytes
    assert min(told["ms"], told["float32_ms"]) > 0
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert "QuantizeLinear" in kinds
    assert kinds[-1] == onnx.load(float32.file).graph.node[-1].op_type  # nothing is rounded after the softmax
    inputs = dataset_of(run, None).test.inputs(torch.arange(60))
    found = torch.from_numpy(onnxruntime.InferenceSession(str(file)).run(None, {"inputs": inputs.numpy()})[0])
    difference = (found - wanted(run, inputs)).abs().max()
    assert done.json["max_difference"] == pytest.approx(float(difference), rel=1e-3)
    assert 1e-5 < difference < 0.1
    assert done.json["torch_errors"] == float32.errors
    assert (
        f"| compared with float32 | {done.json['errors']} errors, float32 {float32.errors};"
        in Path(f"{file}.md").read_text()
    )
    assert export.onnx_net(file).classes == ["cat", "dog", "owl"]
    with pytest.raises(BadInput, match="--int8: belongs to --format onnx: remove it"):
        export.export(run, "torch", None, None, int8=True)


def test_a_net_that_torch_cannot_trace_is_refused_in_one_line(
    own: Own, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = own.run(net="more.py:branching")
    with pytest.raises(
        BadInput, match=r"its net cannot be exported as onnx: Could not guard .*; --format safet"
    ) as raised:
        export.export(run, "onnx", tmp_path / "net.onnx", None)
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert export.export(run, "safetensors", tmp_path / "net.safetensors", None).total == 60


@pytest.mark.parametrize("bad", [0.9, float("nan")])
def test_a_file_that_differs_from_torch_is_not_written(
    bad: float, own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = export._written

    def spoilt(run: Run, model: export.Probabilities, form: export.Form) -> tuple[bytes, export.Net]:
        content, opened = written(run, model, form)
        return content, lambda x: opened(x) * bad

    monkeypatch.setattr(export, "_written", spoilt)
    with pytest.raises(Failed, match=r"differs from torch by .*: not written"):
        export.export(own.run(), "torch", tmp_path / "net.pt2", None)
    assert list(tmp_path.iterdir()) == []


def test_images_that_have_changed_prove_nothing(tmp_path: Path) -> None:
    own = Own(tmp_path)
    run = own.run(net=None)
    (tmp_path / "own_data.py").write_text(OWN_DATA.replace("195", "190"))
    sources._read.cache_clear()
    with pytest.raises(BadInput, match="its images are not those that it was planned with"):
        export.export(run, "onnx", tmp_path / "net.onnx", None)


def test_what_is_not_installed_is_named(own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BadInput, match=r"onnxscript is not installed: pip install 'kdcli\[onnx\]'"):
        export.export(own.run(), "onnx", tmp_path / "net.onnx", None)
    (tmp_path / "net.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInput, match=r"onnxruntime is not installed: pip install 'kdcli\[onnx\]'"):
        export.onnx_net(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("tiny/distill/0-0", "tiny/distill/0-0: there is no such run"),
        (
            "RUN --format tflite",
            "--format tflite: must be one of onnx, torch, safetensors, logits (see kd export --help)",
        ),
        ("RUN --out /proc/net.onnx", "--out /proc/net.onnx: cannot be written"),
        ("RUN --out nowhere/net.onnx", "--out nowhere/net.onnx: must be a file in a folder that exists"),
        ("RUN --out net.md", "--out net.md: must be a file in a folder that exists, with a name that ends in .onnx"),
        ("RUN --out FILE", "run.onnx: is there already: remove it, or choose another --out"),
    ],
)
def test_the_wrong_thing_typed(words: str, line: str, trained: Shell, tmp_path: Path) -> None:
    (tmp_path / "run.onnx").write_bytes(b"not a net")
    words = words.replace("RUN", find(trained, "student").name).replace("FILE", str(tmp_path / "run.onnx"))
    done = kd_here(trained.folder, "export", *words.split())
    assert (done.code, done.out) == (2, "")
    assert line in done.err
    assert len(done.err.splitlines()) == 1
