"""Teachers that nobody here made, on real images: ResNets of CIFAR-10 on photographs, a LeNet on MNIST."""

import tarfile
from pathlib import Path

import pytest
from conftest import Done, Shell, kd_here

NETS = """\
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, outside // inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.more = (outside - inside) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, n, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (inside, outside) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            blocks = [Block(inside, outside), *(Block(outside, outside) for _ in range(n - 1))]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet20(classes, channels):
    return ResNet(3, classes)
"""
TEXT = """\
name: photos
seed: [0]
threads: 1
data: {folder: photos}
teacher: TEACHER
student:
  model: {name: resnet8}
  train: {epochs: 1, batch_size: 50, lr: 0.1, flip: true, jitter: 4}
distill: {T: 4, lambda1: 0.9, views: 2}
"""
IMAGENET = "input: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def photos(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with 40 training and 60 test photographs a class of CIFAR-10."""
    shell = Shell(tmp_path_factory.mktemp("photos"))
    with tarfile.open(mnist_dir / "cifar10-jpeg.tar.gz") as archive:
        for member in archive:
            _, part, *rest = (*Path(member.name).parts, "", "")
            if member.isfile() and int(Path(member.name).stem or 0) < {"train": 40, "test": 60}.get(part, 0):
                file = shell.folder / "photos" / part / "/".join(rest[:2])
                file.parent.mkdir(parents=True, exist_ok=True)
                extracted = archive.extractfile(member)
                assert extracted
                file.write_bytes(extracted.read())
    (shell.folder / "nets.py").write_text(NETS)
    (shell.folder / "resnet20.th").symlink_to(mnist_dir / "teachers" / "resnet20.th")
    return shell


def imported(shell: Shell, teacher: str, command: str = "train-teacher") -> Done:
    (shell.folder / "photos.yaml").write_text(TEXT.replace("TEACHER", teacher))
    done = kd_here(shell.folder, command, "photos.yaml", "--json")
    assert done.code == 0, done.err
    return done


def test_a_checkpoint_of_the_field_by_a_name_and_by_a_function(photos: Shell) -> None:
    known = imported(photos, f"{{model: {{name: resnet20}}, weights: resnet20.th, {IMAGENET}}}")
    theirs = imported(photos, f"{{model: {{name: 'nets.py:resnet20'}}, weights: resnet20.th, {IMAGENET}}}")
    assert known.json["test"] == theirs.json["test"]
    assert 60 < known.json["test"]["errors"] < 150  # of 600: 8 % on lossless images, twice as many on JPEG
    assert known.json["reading"]["said"] == [
        "Its weights were found under state_dict.",
        "Its keys are read without module.",
    ]
    assert known.json["reading"]["warnings"] == []
    taught = imported(photos, f"{{model: {{name: resnet20}}, weights: resnet20.th, {IMAGENET}}}", "distill")
    assert "is asked about 2 views of each of 400 images" in taught.err


def test_the_right_normalisation_and_the_order_of_the_classes_are_found(photos: Shell) -> None:
    wrong = imported(photos, "{model: {name: resnet20}, weights: resnet20.th, input: {mean: [0], std: [1]}}")
    assert wrong.json["reading"]["input"] == {"range": 1, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    order = [*CLASSES[1:4], CLASSES[0], *CLASSES[4:]]
    given = f"classes: [{', '.join(order)}]"
    moved = imported(photos, f"{{model: {{name: resnet20}}, weights: resnet20.th, {IMAGENET}, {given}}}")
    assert moved.json["reading"]["classes"] == CLASSES
    assert "what it calls automobile is airplane" in moved.json["reading"]["warnings"][0]


def test_a_lenet_teaches_on_mnist(mnist_dir: Path, kd: Shell) -> None:
    """Batch of one, a softmax at its end, mean 0.1307 and std 0.3081; errors of all 10,000 test images by onnxruntime
    alone, in a loop of our own."""
    import numpy as np
    import onnxruntime
    from torchvision.datasets import MNIST

    file = mnist_dir / "teachers" / "lenet.onnx"
    session, test = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]),
        MNIST(mnist_dir, train=False),
    )
    x = ((test.data.numpy().astype(np.float32) / 255 - 0.1307) / 0.3081)[:, None, None]
    says = [int(session.run(None, {"input.1": one})[0].argmax()) for one in x]
    errors = int((np.array(says) != test.targets.numpy()).sum())
    text = (
        "name: lenet\nthreads: 1\ndata: {name: mnist}\nteacher: {onnx: FILE, input: {mean: [0.1307], std: [0.3081]}}\n"
    )
    text += "student: {model: {hidden: [8]}, train: {epochs: 1, lr: 0.1}}\ndistill: {T: 4, lambda1: 0.9}\n"
    (kd.folder / "lenet.yaml").write_text(text.replace("FILE", str(file)))
    done = kd("train-teacher", "lenet.yaml", "--json", KD_DATA=str(mnist_dir))
    assert done.code == 0, done.err
    assert done.json["test"]["errors"] == errors < 250
    assert "1 at a time; its outputs are probabilities" in done.err
