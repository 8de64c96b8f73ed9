"""Predictions of real image files and of test images, and the wrong things typed."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Shell, kd_here
from PIL import Image
from test_export import DIGITS, Own, find, wanted

from kdcli import BadInput, config
from kdcli.config import Data
from kdcli.data.dataset import open_dataset
from kdcli.evidence.findings import pixels
from kdcli.teachers.teacher import dataset_of, nets
from kdcli.use import export
from kdcli.use.predict import Predictions, predict, read_image

DIGIT = np.kron(DIGITS.test.store[3, 0].numpy(), np.ones((10, 10), np.uint8)) * 15  # light on dark, 80 x 80
RESAMPLING = Image.Resampling.NEAREST


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    return Own(tmp_path_factory.mktemp("own"))


def asked(own: Own, name: str, *files: Path, test_images: tuple[int, ...] = (), invert: bool = False) -> Predictions:
    return predict(own.places, name, files, test_images, [1.0], invert, pytest.fail)


def saved(file: Path, image: Image.Image) -> Path:
    image.save(file)
    return file


def test_image_files_of_any_size_are_classified(trained: Shell, tmp_path: Path) -> None:
    """Test images enlarged, saved dark on light, and read back give what the test images give."""
    run = find(trained, "student")
    for i in range(5):
        pixels = 255 - (DIGITS.test.store[i, 0] * (255 / 16)).round().numpy().astype(np.uint8)
        saved(tmp_path / f"{i}.png", Image.fromarray(pixels).resize((80, 80), RESAMPLING).convert("RGB"))
    files = [str(tmp_path / f"{i}.png") for i in range(5)]
    assert kd_here(trained.folder, "export", run.name, "--out", str(tmp_path / "net.onnx")).code == 0
    for net in (run.name, str(tmp_path / "net.onnx")):
        done = kd_here(trained.folder, "predict", net, *files, "--invert", "--json")
        assert done.code == 0, done.err
        found = torch.tensor([image["views"][0]["p"] for image in done.json["images"]])
        assert torch.allclose(
            found.double(), wanted(run, DIGITS.test.inputs(torch.arange(len(DIGITS.test)))[:5]), atol=5e-3
        )


def test_colour_images_are_cropped_to_the_shape_of_the_nets(own: Own, tmp_path: Path) -> None:
    """A test image alone, and in the middle of a wider and of a higher sheet, is read as the test image."""
    run, test = own.run(), dataset_of(own.run(), None).test
    plain, inputs = Image.fromarray(test.store[4].permute(1, 2, 0).numpy()), test.inputs(torch.tensor([4]))
    wide, high = Image.new("RGB", (29, 6), "white"), Image.new("RGBA", (9, 16))
    wide.paste(plain, (10, 0))
    high.paste(plain, (0, 5))
    named = {"plain": plain, "wide": wide, "high": high}
    files = [saved(tmp_path / f"{name}.png", image) for name, image in named.items()]
    assert all(torch.allclose(read_image(file, [3, 6, 9], False), inputs) for file in files)
    orange = read_image(saved(tmp_path / "x.png", Image.new("RGB", (90, 70), (255, 102, 0))), [3, 6, 9], False)
    assert torch.allclose(orange, torch.tensor([1, 0.4, 0]).view(1, 3, 1, 1).expand(1, 3, 6, 9))
    export.export(run, "onnx", tmp_path / "net.onnx", None)
    by_run, by_file = asked(own, run.name, *files, test_images=(4,)), asked(own, str(tmp_path / "net.onnx"), *files)
    assert by_run.classes == by_file.classes == ["cat", "dog", "owl"]
    assert (by_run.run, by_file.run) == (run.name, str(tmp_path / "net.onnx"))
    assert [image.label for image in by_run.images] == [None] * 3 + [by_run.classes[int(test.labels[4])]]
    assert not any(image.mostly_ink for image in by_run.images)
    for one, other in zip(by_run.images, by_file.images, strict=False):
        assert one.views[0].p == pytest.approx(other.views[0].p, abs=1e-6)
    for image in by_run.images:
        assert image.views[0].p == pytest.approx(wanted(run, inputs)[0].tolist())


def test_depth_transparency_and_shape_do_not_change_what_is_read(tmp_path: Path) -> None:
    """One digit as a 16-bit file, on a transparent ground, and on a narrower sheet of paper."""
    plain = read_image(saved(tmp_path / "plain.png", Image.fromarray(DIGIT)), [1, 8, 8], False)
    assert torch.allclose(plain, DIGITS.test.inputs(torch.tensor([3])) * (16 * 15 / 255), atol=1e-2)
    deep = saved(tmp_path / "deep.png", Image.fromarray(DIGIT.astype(np.uint16) * 257))
    clear = saved(tmp_path / "clear.png", Image.merge("LA", (Image.new("L", (80, 80), 0), Image.fromarray(DIGIT))))
    narrow = saved(tmp_path / "narrow.png", Image.fromarray(DIGIT[:, 10:70]))
    assert torch.allclose(read_image(deep, [1, 8, 8], False), plain, atol=1e-2)
    assert torch.allclose(read_image(clear, [1, 8, 8], True), plain, atol=1e-2)
    middle = read_image(narrow, [1, 8, 8], False)
    assert torch.allclose(middle[..., 1:7], plain[..., 1:7], atol=1e-2)
    assert not middle[..., [0, 7]].any()


def test_a_grey_image_is_centred_on_ground_of_the_nets_shape(tmp_path: Path) -> None:
    file = saved(tmp_path / "plain.png", Image.fromarray(DIGIT))
    plain, wide, high = (read_image(file, [1, *size], False)[0, 0] for size in ((8, 8), (8, 12), (10, 8)))
    assert torch.equal(wide[:, 2:10], plain)
    assert torch.equal(high[1:9], plain)
    assert not wide[:, [0, 1, 10, 11]].any()
    strip = saved(tmp_path / "strip.png", Image.fromarray(np.full((1, 30_000), 255, np.uint8)))
    with pytest.raises(BadInput, match="is blank"):
        read_image(strip, [1, 8, 8], False)


def test_a_photograph_is_read_as_the_camera_was_held(tmp_path: Path) -> None:
    ink, exif = Image.fromarray(DIGIT), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    ink.rotate(90).save(tmp_path / "photo.png", exif=exif)
    upright = read_image(saved(tmp_path / "upright.png", ink), [1, 8, 8], False)
    assert torch.equal(read_image(tmp_path / "photo.png", [1, 8, 8], False), upright)


def test_dark_ink_on_a_light_ground_is_noticed(trained: Shell, tmp_path: Path) -> None:
    file, net = str(saved(tmp_path / "scan.png", Image.fromarray(255 - DIGIT))), find(trained, "student").name
    assert "try it with --invert" in kd_here(trained.folder, "predict", net, file).err
    assert kd_here(trained.folder, "predict", net, file, "--invert").err == ""


def test_a_light_photograph_is_no_scan(tmp_path: Path) -> None:
    """Nor is it shown as its negative."""
    for part, c, k in itertools.product(("train", "test"), "ab", range(4)):
        (tmp_path / "p" / part / c).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(9 * k + ord(c) + len(part)).integers(150, 255, (8, 8), np.uint8)
        Image.fromarray(noise).save(tmp_path / "p" / part / c / f"{k}.png")
    net = "{model: {hidden: [4]}, train: {epochs: 1, batch_size: 4, lr: 0.1}}"
    (tmp_path / "p.yaml").write_text(
        f"name: p\ndata: {{folder: p}}\nteacher: {net}\nstudent: {net}\ndistill: {{T: 2, lambda1: 0.9}}\n"
    )
    run = kd_here(tmp_path, "train-teacher", "p.yaml", "--json").json["run"]
    done = kd_here(tmp_path, "predict", run, "p/train/a/0.png")
    assert (done.code, done.err) == (0, "")
    split = open_dataset(Data(folder=str(tmp_path / "p"))).train
    assert (pixels(split, 0, True)[:, :, 0] == np.asarray(Image.open(tmp_path / "p/train/a/0.png"))).all()
    assert (pixels(split, 0, False) == 255 - pixels(split, 0, True)).all()


def test_an_image_unlike_the_training_images_is_told_so(trained: Shell, tmp_path: Path) -> None:
    """Against correlations by numpy; noise, inverted ink and two digits side by side are farther than every test image,
    a training image itself is the nearest there is."""
    files = {
        "noise": np.random.default_rng(0).integers(0, 256, (80, 80), np.uint8),
        "inverted": 255 - DIGIT,
        "pair": np.hstack([DIGIT, np.rot90(DIGIT)]),
        "digit": DIGIT,
        "trained": np.kron(DIGITS.train.store[3, 0].numpy(), np.ones((10, 10), np.uint8)) * 15,
    }
    paths = [str(saved(tmp_path / f"{name}.png", Image.fromarray(image))) for name, image in files.items()]
    run, onnx = find(trained, "student").name, str(tmp_path / "net.onnx")
    assert kd_here(trained.folder, "export", run, "--out", onnx).code == 0
    done = kd_here(trained.folder, "predict", run, *paths, "--json")
    shares = {name: image["nearer"] for name, image in zip(files, done.json["images"], strict=True)}
    assert [shares[name] for name in ("noise", "inverted", "pair")] == [1.0, 1.0, 1.0]
    assert shares["trained"] == 0.0
    train = DIGITS.train.store.flatten(1).double().numpy()  # fewer than are sampled of more: all
    near = np.corrcoef(np.vstack([DIGITS.test.store[3].flatten(), train]))[0, 1:].max()
    of_test = np.corrcoef(np.vstack([DIGITS.test.store.flatten(1).double().numpy(), train]))[:500, 500:].max(1)
    assert shares["digit"] == pytest.approx((of_test > near).mean(), abs=0.004)  # in double precision
    said = kd_here(trained.folder, "predict", onnx, paths[0], paths[3]).out
    for words in (
        ", but it is unlike the training images: no test image is as far from them",
        f" ({100 * shares['digit']:.0f} % of the test images lie closer to the training set)",
    ):
        assert "".join(words.split()) in "".join(said.split())  # a long path may be broken
    elsewhere = kd_here(tmp_path, "predict", onnx, paths[0])
    assert elsewhere.code == 0
    assert "cannot say how unlike the training images these are: the run that it was exported" in elsewhere.err


def test_a_test_image_is_shown_with_the_teachers_view_at_each_temperature(trained: Shell) -> None:
    run = find(trained, "student")
    done = kd_here(trained.folder, "predict", run.name, "--test-image", "7", "--T", "1,4,20", "--json")
    (image,) = done.json["images"]
    assert image["label"] == str(int(DIGITS.test.labels[7]))
    said = [(view["net"], view["T"]) for view in image["views"]]
    assert said == [("student", 1), ("teacher", 1), ("teacher", 4), ("teacher", 20)]
    (teacher,) = nets(find(trained, "teacher"), export.CPU)
    soft = (teacher(DIGITS.test.inputs(torch.tensor([7])))[0].double() / 4).softmax(0)
    assert image["views"][2]["p"] == pytest.approx(soft.tolist())
    text = kd_here(trained.folder, "predict", run.name, "--test-image", "7", "--T", "4").out
    assert "teacher, T = 4" in text
    assert f"the label is {image['label']} (*)" in text


def test_a_student_whose_teacher_is_gone_is_asked_alone(tmp_path: Path) -> None:
    own = Own(tmp_path)
    members = [own.run(command="train-teacher", seed=seed) for seed in (0, 1)]
    ensemble = own.run(command="ensemble", parents=[member.name for member in members])
    distill = config.Distill(T=4, lambda1=0.5, lambda2=0.5)
    student = own.run(net=None, command="distill", parents=[ensemble.name], distill=distill)

    def views(expected: int) -> list[tuple[str, float]]:
        notes: list[str] = []
        (image,) = predict(own.places, student.name, [], [2], [1.0, 4.0], False, notes.append).images
        assert len(notes) == expected
        assert all("without its teacher's predictions" in line and ensemble.name in line for line in notes)
        return [(view.net, view.T) for view in image.views]

    assert views(0) == [("student", 1), ("teacher", 1), ("teacher", 4)]
    for gone in (members[1], ensemble):
        shutil.rmtree(gone.path)
        assert views(1) == [("net", 1), ("net", 4)]


def test_what_a_net_prints_is_not_in_the_document(own: Own) -> None:
    name = own.run(net="more.py:talking").name
    done = kd_here(own.folder, "predict", name, "--test-image", "0", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] == name


def test_invert_is_for_grey_images(own: Own, tmp_path: Path) -> None:
    run, file = own.run(), saved(tmp_path / "x.png", Image.new("RGB", (9, 6), "white"))
    export.export(run, "onnx", tmp_path / "net.onnx", None)
    for name in (run.name, str(tmp_path / "net.onnx")):
        with pytest.raises(
            BadInput, match=f"--invert: is for nets of grey images, and those of {name} have 3 channels"
        ):
            asked(own, name, file, invert=True)
        assert not asked(own, name, file).images[0].mostly_ink
    grey = saved(tmp_path / "grey.png", Image.fromarray(255 - DIGIT))
    assert asked(own, own.run("more.py:grey").name, grey).images[0].mostly_ink
    assert not asked(own, own.run("more.py:grey").name, grey, invert=True).images[0].mostly_ink


def test_nets_of_other_channels_are_asked_of_test_images_alone(own: Own, tmp_path: Path) -> None:
    name, file = own.run("more.py:pairs").name, saved(tmp_path / "x.png", Image.new("RGB", (9, 6), "white"))
    assert len(asked(own, name, test_images=(0,)).images[0].views[0].p) == 3
    with pytest.raises(BadInput, match="image files are read with 1 or 3 channels, and this net takes 2"):
        asked(own, name, file)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("RUN", "kd predict: name image files, or --test-image N"),
        ("RUN --test-image 500", "--test-image 500: there are images 0 to 499"),
        ("RUN --test-image 1 --T 0", "--T 0: must be numbers from 0.001 to 10000"),
        ("RUN --test-image 1 --T hot", "--T hot: must be numbers from 0.001 to 10000"),
        ("RUN absent.png", "absent.png: No such file or directory"),
        ("RUN tiny.yaml", "tiny.yaml: is damaged or not an image"),
        (
            "net.safetensors x.png",
            "net.safetensors: is not a net that kd exported as onnx: export it so, or name the run",
        ),
        ("absent.onnx x.png", "absent.onnx: there is no such file"),
        ("other.onnx x.png", "other.onnx: is not a net that kd exported"),
        ("tiny.yaml x.png", "tiny.yaml: is a file, not a run; `kd runs` lists what there is"),
        ("tiny/distill/0-0 x.png", "tiny/distill/0-0: there is no such run"),
        ("other.onnx x.png --T 4", "--T: an exported file has T = 1 built in: name the run instead"),
        ("RUN --test-image 3 --invert", "--invert: is for image files, and none is named"),
        ("RUN blank.png", "blank.png: is blank"),
        ("RUN deep.tiff", "deep.tiff: has pixels of mode F: save it with 8 or 16 bits per pixel"),
    ],
)
def test_the_wrong_thing_typed(words: str, line: str, trained: Shell, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"not a net")
    Image.new("L", (40, 40), 200).save(tmp_path / "blank.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "deep.tiff")
    (tmp_path / "net.safetensors").write_bytes(b"weights alone")
    words = words.replace("RUN", find(trained, "student").name)
    for name in ("net.safetensors", "other.onnx", "blank.png", "deep.tiff"):
        words = words.replace(name, str(tmp_path / name))
    done = kd_here(trained.folder, "predict", *words.split())
    assert (done.code, done.out) == (2, "")
    assert line in done.err
    assert len(done.err.splitlines()) == 1


def test_an_onnx_file_without_classes_is_not_one_of_ours(own: Own, tmp_path: Path) -> None:
    import onnx

    export.export(own.run(), "onnx", tmp_path / "net.onnx", None)
    model = onnx.load(tmp_path / "net.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(BadInput, match=r"bare\.onnx: is not a net that kd exported"):
        asked(own, str(tmp_path / "bare.onnx"), tmp_path / "x.png")


def test_what_cannot_be_read_as_an_image_gets_a_sentence_of_its_own(tmp_path: Path) -> None:
    blank = saved(tmp_path / "blank.png", Image.new("L", (9, 9), 90))
    clear = saved(tmp_path / "clear.png", Image.new("RGBA", (9, 9), (200, 10, 10, 0)))
    huge = saved(tmp_path / "huge.png", Image.new("1", (10_000, 9_000)))
    wrong = {blank: "is blank: name an image", clear: "is entirely transparent: save it", huge: "is too large: make it"}
    wrong[tmp_path] = "is a folder: name the image files in it"
    for file, message in wrong.items():
        with pytest.raises(BadInput, match=message):
            read_image(file, [1, 8, 8], False)
    for file in (clear, huge, tmp_path):
        with pytest.raises(BadInput, match=wrong[file]):
            read_image(file, [3, 8, 8], False)
