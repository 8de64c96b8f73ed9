"""Exported nets against torch and another runtime, predictions of real image files, and the wrong things typed."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Shell, kd_here
from PIL import Image
from safetensors.torch import load_file

from kdcli import core, data, ship
from kdcli.config import Data
from kdcli.recipes import nets
from kdcli.runs import Run, open_run

DIGITS = data.load(Data(name="digits"))


def find(shell: Shell, row: str) -> Run:
    """The run of a row of the table."""
    documents = json.loads((shell.folder / "run.json").read_text())["runs"]
    return open_run(shell.folder / "runs", next(d["run"] for d in documents if d["row"] == row))


def wanted(run: Run) -> torch.Tensor:
    """Probabilities on the test images, by the definition of the ensemble average."""
    cpu = torch.device("cpu")
    return core.average(torch.stack([net(DIGITS.test.inputs()) for net in nets(run, cpu)]), 1.0, "arithmetic").exp()


@pytest.mark.parametrize("row", ["student", "teacher", "ensemble"])
def test_an_onnx_file_says_what_torch_says(row: str, trained: Shell, tmp_path: Path) -> None:
    run, file = find(trained, row), tmp_path / "net.onnx"
    done = kd_here(trained.folder, "export", run.name, "--out", str(file), "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    session = onnxruntime.InferenceSession(str(file))
    for batch in (1, 500):  # dynamic
        inputs = DIGITS.test.inputs()[:batch].numpy()
        (found,) = session.run(None, {"inputs": inputs})
        assert np.allclose(found, wanted(run)[:batch].numpy(), atol=1e-6)
    assert document["errors"] == document["torch_errors"] == run.result["test"]["errors"]
    assert document["max_difference"] < 1e-5
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["net.onnx", "net.onnx.md"]
    card = (tmp_path / "net.onnx.md").read_text()
    assert f"| errors | {document['errors']} of 500 test images |" in card
    assert ("| soft targets | T = 4, lambda1 = 0.9, lambda2 = 0.1 |" in card) == (row == "student")


def test_a_geometric_ensemble_is_exported_as_one(trained: Shell, tmp_path: Path) -> None:
    from kdcli.ship import Probabilities, _onnx, _onnx_net

    run, file = find(trained, "ensemble"), tmp_path / "net.onnx"
    members = nets(run, torch.device("cpu"))
    file.write_bytes(_onnx(Probabilities(members, "geometric"), run))
    inputs = DIGITS.test.inputs()
    geometric = core.average(torch.stack([net(inputs) for net in members]), 1.0, "geometric").exp()
    assert torch.allclose(_onnx_net(file)[0](inputs).double(), geometric, atol=1e-6)
    assert not torch.allclose(geometric, wanted(run), atol=1e-4)


def test_the_other_formats(trained: Shell, tmp_path: Path) -> None:
    run = find(trained, "student")
    for form, suffix in (("torch", "pt2"), ("safetensors", "safetensors")):
        done = kd_here(trained.folder, "export", run.name, "--format", form, "--out", str(tmp_path / f"net.{suffix}"))
        assert done.code == 0, done.err
    program = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 3):
        assert torch.allclose(program(DIGITS.test.inputs()[:batch]).double(), wanted(run)[:batch], atol=1e-6)
    weights, own = load_file(tmp_path / "net.safetensors"), run.load("weights")
    assert all(torch.equal(weights[f"members.0.{name}"], tensor) for name, tensor in own.items())


def test_image_files_of_any_size_are_classified(trained: Shell, tmp_path: Path) -> None:
    """Test images enlarged, saved dark on light, and read back give what the test images give."""
    run, expected = find(trained, "student"), wanted(find(trained, "student"))
    for i in range(5):
        pixels = 255 - (DIGITS.test.images[i] * (255 / 16)).round().numpy().astype(np.uint8)
        Image.fromarray(pixels).resize((80, 80), Image.Resampling.NEAREST).convert("RGB").save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(5)]
    assert kd_here(trained.folder, "export", run.name, "--out", str(tmp_path / "net.onnx")).code == 0
    for net in (run.name, str(tmp_path / "net.onnx")):
        done = kd_here(trained.folder, "predict", net, *files, "--invert", "--json")
        assert done.code == 0, done.err
        found = torch.tensor([image["views"][0]["p"] for image in json.loads(done.out)["images"]])
        assert torch.allclose(found.double(), expected[:5], atol=5e-3)


def test_depth_transparency_and_shape_do_not_change_what_is_read(tmp_path: Path) -> None:
    """One digit as a 16-bit file, on a transparent ground, and on a wider sheet of paper."""
    ink = np.kron(DIGITS.test.images[3].numpy(), np.ones((10, 10), np.uint8)) * 15
    wanted = ship._read_image(saved(tmp_path / "plain.png", Image.fromarray(ink)), 8, False)
    deep = Image.fromarray(ink.astype(np.uint16) * 257)
    clear = Image.merge("LA", (Image.new("L", (80, 80), 0), Image.fromarray(ink)))
    narrow = Image.fromarray(np.pad(ink[:, 10:70], ((0, 0), (0, 0))))
    assert torch.allclose(ship._read_image(saved(tmp_path / "deep.png", deep), 8, False), wanted, atol=1e-2)
    assert torch.allclose(ship._read_image(saved(tmp_path / "clear.png", clear), 8, True), wanted, atol=1e-2)
    middle = ship._read_image(saved(tmp_path / "narrow.png", narrow), 8, False).view(8, 8)
    assert torch.allclose(middle[:, 1:7], wanted.view(8, 8)[:, 1:7], atol=1e-2)
    assert not middle[:, [0, 7]].any()


def test_a_photograph_is_read_as_the_camera_was_held(tmp_path: Path) -> None:
    ink = Image.fromarray(np.kron(DIGITS.test.images[3].numpy(), np.ones((10, 10), np.uint8)) * 15)
    turned, exif = ink.rotate(90), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "photo.png", exif=exif)
    upright = ship._read_image(saved(tmp_path / "upright.png", ink), 8, False)
    assert torch.equal(ship._read_image(tmp_path / "photo.png", 8, False), upright)


def test_dark_ink_on_a_light_ground_is_noticed(trained: Shell, tmp_path: Path) -> None:
    pixels = 255 - np.kron(DIGITS.test.images[3].numpy(), np.ones((10, 10), np.uint8)) * 15
    file = str(saved(tmp_path / "scan.png", Image.fromarray(pixels.astype(np.uint8))))
    net = find(trained, "student").name
    assert "try it with --invert" in kd_here(trained.folder, "predict", net, file).err
    assert kd_here(trained.folder, "predict", net, file, "--invert").err == ""


def saved(file: Path, image: Image.Image) -> Path:
    image.save(file)
    return file


def test_a_test_image_is_shown_with_the_teachers_view_at_each_temperature(trained: Shell) -> None:
    run = find(trained, "student")
    done = kd_here(trained.folder, "predict", run.name, "--test-image", "7", "--T", "1,4,20", "--json")
    (image,) = json.loads(done.out)["images"]
    assert image["label"] == int(DIGITS.test.labels[7])
    assert [(view["net"], view["T"]) for view in image["views"]] == [
        ("student", 1),
        ("teacher", 1),
        ("teacher", 4),
        ("teacher", 20),
    ]
    (teacher,) = nets(find(trained, "teacher"), torch.device("cpu"))
    soft = (teacher(DIGITS.test.inputs()[7]).double() / 4).softmax(0)
    assert image["views"][2]["p"] == pytest.approx(soft.tolist())
    text = kd_here(trained.folder, "predict", run.name, "--test-image", "7", "--T", "4").out
    assert "teacher, T = 4" in text
    assert f"the label is {image['label']} (*)" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("predict RUN", "kd predict: name image files, or --test-image N"),
        ("predict RUN --test-image 500", "--test-image 500: there are images 0 to 499"),
        ("predict RUN --test-image 1 --T 0", "--T 0: must be numbers from 0.001 to 10000"),
        ("predict RUN --test-image 1 --T hot", "--T hot: must be numbers from 0.001 to 10000"),
        ("predict RUN absent.png", "absent.png: No such file or directory"),
        ("predict RUN tiny.yaml", "tiny.yaml: is not an image that can be read"),
        ("predict net.safetensors x.png", "net.safetensors: kd predict reads runs and .onnx files"),
        ("predict absent.onnx x.png", "absent.onnx: there is no such file"),
        ("predict run.onnx x.png", "run.onnx: is not a net that kd exported"),
        ("predict tiny/distill/0-0 x.png", "tiny/distill/0-0: there is no such run"),
        ("export tiny/distill/0-0", "tiny/distill/0-0: there is no such run"),
        (
            "export RUN --format tflite",
            "'--format': 'tflite' is not one of 'onnx', 'torch', 'safetensors' (see kd export --help)",
        ),
        ("export RUN --out /proc/net.onnx", "--out /proc/net.onnx: cannot be written"),
        ("export RUN --out nowhere/net.onnx", "--out nowhere/net.onnx: must be a file in a folder that exists"),
        (
            "export RUN --out net.md",
            "--out net.md: must be a file in a folder that exists, with a name that ends in .onnx",
        ),
        ("export RUN --out run.onnx", "run.onnx: is there already: remove it, or choose another --out"),
        ("predict run.onnx x.png --T 4", "--T: an exported file has T = 1 built in: name the run instead"),
        ("predict RUN --test-image 3 --invert", "--invert: is for image files, and none is named"),
        ("predict RUN blank.png", "blank.png: is blank"),
        ("predict RUN deep.tiff", "deep.tiff: has pixels of mode F: save it with 8 or 16 bits a pixel"),
    ],
)
def test_the_wrong_thing_typed(words: str, line: str, trained: Shell, tmp_path: Path) -> None:
    (tmp_path / "run.onnx").write_bytes(b"not a net")
    Image.new("L", (40, 40), 200).save(tmp_path / "blank.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "deep.tiff")
    for name in ("run.onnx", "blank.png", "deep.tiff"):
        words = words.replace(name, str(tmp_path / name))
    done = kd_here(trained.folder, *words.replace("RUN", find(trained, "student").name).split())
    assert (done.code, done.out) == (2, "")
    assert line in done.err
    assert len(done.err.splitlines()) == 1
