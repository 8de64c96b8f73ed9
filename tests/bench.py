"""How close a training step comes to its own matrix products: `make bench`, or `python tests/bench.py [--json]`.

For each case, in one process, the arms shuffled in every round:

    products  the step's matrix products alone, written into preallocated outputs: one forward and one for the weights'
              gradient a layer, and one for the inputs' gradient a layer but the first
    kd        the step as `fit` runs it: epochs of `fit` itself, divided by their steps
    naive     the loop as most people write it: DataLoader, ToTensor and RandomAffine a sample, stock dropout, an
              unfused optimizer, torch.renorm with a copy, `.item()` every step, a live teacher

The images are random bytes, which costs what real ones cost. Times are medians over the rounds with their quartiles;
ratios are taken round by round, so that a drift of the machine's speed cancels.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdcli.config import Distill, Train
from kdcli.core import MLP, average, generator
from kdcli.data import Split
from kdcli.train import fit, predict

STEPS, BATCH = 30, 128
CASES: dict[str, dict[str, Any]] = {
    "hard-label student": {"hidden": [800, 800], "train": {}},
    "distilled student": {"hidden": [800, 800], "train": {}, "distill": True},
    "jittered teacher": {"hidden": [1200, 1200], "dropout": 0.5, "input_dropout": 0.2, "train": {"jitter": 2, "max_norm": 4.0}},
}  # fmt: skip


class Time(NamedTuple):
    """Seconds a step."""

    wall: float
    cpu: float


def products(case: dict[str, Any]) -> Iterator[None]:
    """The matrix products of `STEPS` steps, every time it is asked."""
    widths = [784, *case["hidden"], 10]
    layers = list(pairwise(widths))
    inputs = [torch.randn(BATCH, n) for n, _ in layers]
    weights = [torch.randn(m, n) for n, m in layers]
    outputs, input_gradients = [torch.empty(BATCH, m) for _, m in layers], [torch.empty(BATCH, n) for n, _ in layers]
    weight_gradients = [torch.empty_like(w) for w in weights]
    while True:
        for _ in range(STEPS):
            for x, w, out in zip(inputs, weights, outputs, strict=True):
                torch.mm(x, w.t(), out=out)
            for x, gradient, out in zip(inputs, weight_gradients, outputs, strict=True):
                torch.mm(out.t(), x, out=gradient)
            for w, gradient, out in list(zip(weights, input_gradients, outputs, strict=True))[1:]:
                torch.mm(out, w, out=gradient)
        yield


def model(case: dict[str, Any]) -> MLP:
    dropout, input_dropout = case.get("dropout", 0.0), case.get("input_dropout", 0.0)
    return MLP(784, case["hidden"], 10, dropout=dropout, input_dropout=input_dropout, init=generator(0, "init"))


def kd(case: dict[str, Any], images: Split, train: Train) -> Iterator[None]:
    """Epochs of `STEPS` steps of the loop itself."""
    distill = None
    if case.get("distill"):
        targets = average(predict(teacher(), images)[None], 20, "arithmetic").exp()
        distill = Distill(T=20, lambda1=0.9, lambda2=0.1), lambda index, _: targets[index]
    for _ in fit([model(case)], images, train, [0], distill):
        yield


def teacher() -> MLP:
    return MLP(784, [1200, 1200], 10, init=generator(1, "init")).eval()


class Samples(Dataset[tuple[Tensor, int]]):
    """Images read one by one as torchvision's MNIST reads them, then its transforms."""

    def __init__(self, images: Split, jitter: int) -> None:
        self.images, self.labels = images.images, images.labels
        shift = [transforms.RandomAffine(0, translate=(jitter / 28, jitter / 28))] if jitter else []
        self.transform = transforms.Compose([transforms.ToTensor(), *shift])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def naive(case: dict[str, Any], images: Split, train: Train) -> Iterator[None]:
    """Epochs of the loop as most people write it."""
    widths, dropout, device = [784, *case["hidden"]], case.get("dropout", 0.0), DEVICE
    hidden = [part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.ReLU(), nn.Dropout(dropout))]
    net = nn.Sequential(nn.Flatten(), nn.Dropout(case.get("input_dropout", 0.0)), *hidden, nn.Linear(widths[-1], 10))
    net.to(device)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    options = {"momentum": 0.9} if train.optimizer == "sgd" else {}
    optimizer = kinds[train.optimizer](net.parameters(), lr=train.lr, **options)
    loader, live, losses = DataLoader(Samples(images, train.jitter), BATCH, shuffle=True), teacher(), []
    while True:
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            if case.get("distill"):
                with torch.no_grad():
                    soft_targets = F.softmax(live(x.flatten(1)) / 20, 1)
                kl = F.kl_div(F.log_softmax(logits / 20, 1), soft_targets, reduction="batchmean")
                loss = 0.9 * 400 * kl + 0.1 * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            max_norm = train.max_norm or torch.inf
            for layer in net if train.max_norm else []:
                if isinstance(layer, nn.Linear):
                    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, max_norm)
            losses.append(loss.item())
        yield


def timed(arm: Iterator[None]) -> Time:
    wall, cpu = time.perf_counter(), time.process_time()
    next(arm)
    return Time((time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS)


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile1": low, "quartile3": high}


def measure(name: str, optimizer: str, rounds: int) -> dict[str, Any]:
    """One case: times of the three arms, and their ratios round by round."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (STEPS * BATCH, 28, 28), dtype=np.uint8))
    images = Split(pixels, torch.from_numpy(rng.integers(0, 10, STEPS * BATCH)), 255)
    settings = {"epochs": 1_000, "batch_size": BATCH, "optimizer": optimizer, "lr": 1e-3, "schedule": "constant"}
    train = Train.model_validate(settings | case["train"])
    arms = {"products": products(case), "kd": kd(case, images, train), "naive": naive(case, images, train)}
    for warm_up in arms.values():
        timed(warm_up)
    times: dict[str, list[Time]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in random.sample(list(arms), len(arms)):
            times[arm].append(timed(arms[arm]))
    widths = [784, *case["hidden"], 10]
    weights = sum(n * m for n, m in pairwise(widths))
    flop = 2 * BATCH * (3 * weights - 784 * widths[1])

    def ratio(a: str, b: str, clock: Callable[[Time], float]) -> dict[str, float]:
        return spread([clock(x) / clock(y) for x, y in zip(times[a], times[b], strict=True)])

    return {
        "case": name,
        "optimizer": optimizer,
        "ms_wall": {arm: spread([1e3 * t.wall for t in ts]) for arm, ts in times.items()},
        "ms_cpu": {arm: spread([1e3 * t.cpu for t in ts]) for arm, ts in times.items()},
        "gflop_per_s": flop / statistics.median(t.wall for t in times["products"]) / 1e9,
        "kd_over_products": ratio("kd", "products", lambda t: t.wall),
        "naive_over_kd_cpu": ratio("naive", "kd", lambda t: t.cpu),
        "contended": any(statistics.median(t.wall / t.cpu for t in ts) > 1.05 for ts in times.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    results = [measure(name, optimizer, arguments.rounds) for name in CASES for optimizer in ("sgd", "adam")]
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": 1,
        "batch": BATCH,
        "load_at_start": load,
        "contended": load > 0.5 or any(r["contended"] for r in results),
        "results": results,
    }
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    print(", ".join(f"{key}: {value}" for key, value in document.items() if key != "results"))
    print(
        f"\n{'':20}{'':6}{'ms a step: products':>20}{'kd':>8}{'naive':>8}{'GFLOP/s':>9}{'kd / products':>22}{'naive / kd (CPU)':>24}"
    )
    for r in results:
        ms = r["ms_wall"]
        ratios = [
            f"{x['median']:.2f} ({x['quartile1']:.2f} to {x['quartile3']:.2f})"
            for x in (r["kd_over_products"], r["naive_over_kd_cpu"])
        ]
        times = f"{ms['products']['median']:20.2f}{ms['kd']['median']:8.2f}{ms['naive']['median']:8.2f}{r['gflop_per_s']:9.0f}"
        print(f"{r['case']:20}{r['optimizer']:6}{times}{ratios[0]:>22}{ratios[1]:>24}")
    if document["contended"]:
        print("\nThis machine was doing something else at the same time: measure again when it is quiet.")


if __name__ == "__main__":
    main()
