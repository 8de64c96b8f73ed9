import random

import numpy as np
import pytest
import torch
from torch import nn

from kdcli import BadInput
from kdcli.machine import device
from kdcli.machine.device import generator, seeded


def draws() -> list[float]:
    """Of each global generator that somebody's module may use."""
    dropped = nn.Dropout(0.5)(torch.ones(20)).tolist()
    return [*dropped, float(torch.rand(1)), np.random.rand(), random.random()]


def test_the_global_draws_repeat_for_a_seed_a_purpose_and_an_epoch() -> None:
    keys = [(0, "fit", 0), (1, "fit", 0), (0, "init", 0), (0, "fit", 1)]
    found = []
    for key in [*keys, *keys]:
        with seeded(*key):
            found.append(draws())
    assert found[:4] == found[4:]
    assert len({tuple(numbers) for numbers in found}) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_global_generators_are_put_back(fails: bool) -> None:
    with seeded(5, "outside"):
        wanted = draws()
    with seeded(5, "outside"):
        try:
            with seeded(0, "inside"):
                draws()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert draws() == wanted


def test_generators_differ_by_seed_purpose_and_epoch() -> None:
    keys = ((0, "order", 0), (1, "order", 0), (0, "jitter", 0), (0, "order", 1))
    assert len({tuple(torch.rand(2, generator=generator(*key)).tolist()) for key in keys}) == 4
    assert torch.equal(torch.rand(3, generator=generator(5, "x", 7)), torch.rand(3, generator=generator(5, "x", 7)))
    assert 0 <= device.stream(5, "x", 7) < 2**63  # what torch takes


def test_what_a_seed_draws_never_changes() -> None:
    """A run is continued by the next version of kd."""
    assert device.stream(0, "order", 3) == 2723741169552378311


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_device_selection(name: str) -> None:
    wanted = "cuda" if name == "auto" and torch.cuda.is_available() else "cpu"
    assert device.select_device(name).type == wanted


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "auto:0", "cuda:", "cuda:-1", "", "cuda:99"])
def test_unusable_devices_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match=f"^--device {name}: "):
        device.select_device(name)


def test_a_net_stays_what_it_is_where_it_is_placed() -> None:
    net = nn.Conv2d(2, 3, 3)
    weight = net.weight.clone()
    assert device.place(net, torch.device("cpu")) is net
    assert torch.equal(net.weight, weight)
