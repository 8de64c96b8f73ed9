import math
from pathlib import Path

import pytest
import torch
from conftest import OWN_NETS, facts

from kdcli import BadInput
from kdcli.config import Model
from kdcli.machine.device import seeded
from kdcli.nets import models

# Beside a net of somebody's own, nets that cannot be used.
NETS = (
    OWN_NETS
    + """

def flat(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(17, classes))


def flat_norm(classes, channels):
    return nn.Sequential(nn.BatchNorm1d(channels), nn.Flatten(), nn.Linear(162, classes))


def one_too_many(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(162, classes + 1))


def soft(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 54, classes), nn.Softmax(1))


def pixels(classes, channels):
    return nn.Conv2d(channels, classes, 1)


def two(classes, channels):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    return Two()


def pair(classes, channels):
    class Pair(nn.Module):
        def forward(self, x, mask):
            return x

    return Pair()


def own_fault(classes, channels):
    class Own(nn.Module):
        def forward(self, x):
            raise KeyError("head")

    return Own()


def no_net(classes, channels):
    return 3


def fails(classes, channels, width):
    return nn.Linear(width, classes)
"""
)
FAULT = NETS.partition("raise KeyError")[0].count("\n") + 1  # the line


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def test_mlp_is_the_papers_net() -> None:
    net = models.MLP(784, [800, 800], 10)
    assert [(layer.in_features, layer.out_features) for layer in net.linears()] == [(784, 800), (800, 800), (800, 10)]
    assert sum(p.numel() for p in net.parameters()) == 784 * 800 + 800 + 800 * 800 + 800 + 800 * 10 + 10
    x = torch.rand(3, 784)
    a, b, c = net.linears()
    assert torch.allclose(net(x), c(torch.relu(b(torch.relu(a(x))))))


@pytest.mark.parametrize(("shape", "classes"), [([1, 8, 8], 10), ([3, 6, 9], 3), ([4, 1, 5], 100)])
@pytest.mark.parametrize("hidden", [[], [7], [5, 6]])
def test_an_mlp_is_built_for_images_of_any_shape(shape: list[int], classes: int, hidden: list[int]) -> None:
    model = Model(hidden=hidden, dropout=0.5, input_dropout=0.2)
    net = models.build(model, facts(shape, classes))
    models.fits(net, model, facts(shape, classes))
    x = torch.rand(4, *shape)
    assert net.eval()(x).shape == (4, classes)
    assert torch.equal(net(x), net(x.flatten(1)))


def test_initialisation_follows_its_seed_and_he() -> None:
    nets = []
    for seed in (1, 1, 2):
        with seeded(seed, "init"):
            nets.append(models.MLP(784, [800], 10))
    one, same, other = ([layer.weight.detach() for layer in net.linears()] for net in nets)
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    assert float(one[0].std()) == pytest.approx(math.sqrt(2 / 784), rel=0.01)
    assert float(one[1].std()) == pytest.approx(math.sqrt(1 / 800), rel=0.05)
    assert not any(layer.bias.any() for layer in nets[0].linears())


@pytest.mark.parametrize("p", [1 / 256, 0.1, 0.2, 0.5, 0.9, 255 / 256])
def test_byte_mask_drops_with_probability_round_256p_over_256(p: float) -> None:
    """Every byte of a word alike: an int64 drawn without its sign bit would bias each eighth one."""
    k = round(256 * p)
    with seeded(0, "mask"):
        mask = models.byte_mask(torch.Size([400_000, 8]), p)
    assert mask.unique().tolist() == pytest.approx([0, 256 / (256 - k)])
    dropped = (mask == 0).double().mean(0)
    sigma = math.sqrt(k / 256 * (1 - k / 256) / 400_000)
    assert float((dropped - k / 256).abs().max()) < 5 * sigma


@pytest.mark.parametrize("shape", [(0, 3), (1,), (5, 3), (3, 2, 7)])
def test_byte_mask_has_any_shape(shape: tuple[int, ...]) -> None:
    mask = models.byte_mask(torch.Size(shape), 0.5)
    assert (mask.shape, mask.dtype) == (shape, torch.float32)


def test_dropout_acts_in_train_mode_alone_and_keeps_the_mean() -> None:
    with seeded(0, "dropout"), torch.no_grad():
        net = models.MLP(1, [4000], 1, dropout=0.5, input_dropout=0.0)
        x = torch.ones(1, 1)
        still = net.eval()(x).item()
        assert still == net(x).item()
        net.train()
        values = torch.stack([net(x.clone()) for _ in range(200)])
    assert float(values.std()) > 0
    assert float(values.mean()) == pytest.approx(still, abs=5 * float(values.std()) / math.sqrt(200))


def test_max_norm_bounds_the_weights_into_hidden_units_alone() -> None:
    net = models.MLP(50, [30, 20], 10)
    with torch.no_grad():
        for layer in net.linears():
            layer.weight *= 10
        net.linears()[0].weight[0] *= 1e-3
    small, output = net.linears()[0].weight[0].clone(), net.linears()[2].weight.clone()
    net.constrain(1.5)
    for layer in net.linears()[:2]:
        assert float(layer.weight.detach().norm(dim=1).max()) <= 1.5 + 1e-5
    assert torch.equal(net.linears()[0].weight[0], small)
    assert torch.equal(net.linears()[2].weight, output)


# Nets of somebody's own.


def test_somebodys_net_is_built_with_its_arguments(nets: Path) -> None:
    model = Model(name=f"{nets}:make", args={"width": 6})
    with seeded(0, "init"):
        net = models.build(model, facts([3, 6, 9], 100))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert before["0.weight"].shape == (6, 3, 3, 3)
    assert before["6.weight"].shape == (100, 24)
    models.fits(net, model, facts([3, 6, 9], 100))
    with seeded(0, "init"):
        again = models.build(model, facts([3, 6, 9], 100))
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("flat", "model: does not take images [3, 6, 9]: mat1 and mat2 shapes cannot be multiplied"),
        ("flat_norm", "model: does not take images [3, 6, 9]: expected 2D or 3D input (got 4D input)"),
        ("one_too_many", "model: must give [2, 5] logits for 2 images [3, 6, 9], not [2, 6]"),
        ("pixels", "model: must give [2, 5] logits for 2 images [3, 6, 9], not [2, 5, 6, 9]"),
        ("soft", "model: gives probabilities, and must give logits: remove the softmax at its end"),
        ("two", "model: must give [2, 5] logits for 2 images [3, 6, 9], not tuple"),
        ("pair", "missing 1 required positional argument: 'mask'"),
        ("own_fault", f"nets.py:{FAULT}: KeyError: 'head'"),
    ],
)
def test_a_net_that_does_not_fit_is_refused_with_the_shapes(function: str, message: str, nets: Path) -> None:
    model = Model(name=f"{nets}:{function}")
    net = models.build(model, facts([3, 6, 9], 5))
    with pytest.raises(BadInput) as error:
        models.fits(net, model, facts([3, 6, 9], 5))
    assert message in str(error.value)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_net", "must return a torch.nn.Module, not int"),
        ("absent", "nets.py: has no function absent"),
        ("fails", "fails() missing 1 required positional argument: 'width'"),
    ],
)
def test_what_makes_no_net_is_told(function: str, message: str, nets: Path) -> None:
    with pytest.raises(BadInput) as error:
        models.build(Model(name=f"{nets}:{function}"), facts([3, 6, 9], 5))
    assert message in str(error.value)


# Multiply-adds.


def test_multiply_adds_of_a_perceptron_are_its_weights() -> None:
    net = models.MLP(3 * 6 * 9, [20, 7], 100, dropout=0.5)
    assert models.multiply_adds(net, [3, 6, 9]) == 162 * 20 + 20 * 7 + 7 * 100


def test_multiply_adds_of_a_convolution_are_counted_at_every_place(nets: Path) -> None:
    net = models.build(Model(name=f"{nets}:make", args={"width": 4}), facts([3, 6, 9], 5))
    assert models.multiply_adds(net, [3, 6, 9]) == 3 * 4 * 3 * 3 * (6 * 9) + 4 * 4 * 5
    strided = torch.nn.Conv2d(3, 4, 3, stride=2)  # at 2 x 4 places
    assert models.multiply_adds(strided, [3, 6, 9]) == 3 * 4 * 3 * 3 * (2 * 4)
