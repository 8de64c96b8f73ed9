"""How close a training step comes to its own matrix products: `make bench`, or `python tests/bench.py [--json]`.

For each case, in one process, the arms shuffled in every round:

    products  the step's matrix products alone, written into preallocated outputs: one forward and one for the weights'
              gradient a layer, and one for the inputs' gradient a layer but the first
    kd        the step as `fit` runs it: epochs of `fit` itself, divided by their steps
    naive     the loop as most people write it: DataLoader, ToTensor and RandomAffine a sample, stock dropout, an
              unfused optimizer, torch.renorm with a copy, `.item()` every step, a live teacher

On a GPU, the same step three ways instead, timed with device events: launched kernel by kernel (eager), as one CUDA
graph, and as one graph of ten nets stacked.

The images are random bytes, which costs what real ones cost. Times are medians over the rounds with their quartiles;
ratios are taken round by round, so that a drift of the machine's speed cancels. `--scale` prints the other table:
seconds an epoch of 60,000 images and peak memory, each figure from a process of its own.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdcli import train as training
from kdcli.config import Distill, Train
from kdcli.core import MLP, average, generator
from kdcli.data import Split
from kdcli.recipes import SAVE_EVERY
from kdcli.runs import Run, Spec
from kdcli.train import fit, predict

STEPS, BATCH = 30, 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    net = MLP(784, case["hidden"], 10, dropout=dropout, input_dropout=input_dropout, init=generator(0, "init"))
    return net.to(DEVICE)


def kd(case: dict[str, Any], images: Split, train: Train, members: int = 1) -> Iterator[None]:
    """Epochs of the loop itself."""
    distill = None
    if case.get("distill"):
        targets = average(predict(teacher(), images)[None], 20, "arithmetic").exp()
        distill = Distill(T=20, lambda1=0.9, lambda2=0.1), lambda index, _: targets[index]
    for _ in fit([model(case) for _ in range(members)], images, train, range(members), distill):
        yield


def teacher() -> MLP:
    return MLP(784, [1200, 1200], 10, init=generator(1, "init")).eval().to(DEVICE)


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


def random_images(count: int) -> Split:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
    return Split(pixels, torch.from_numpy(rng.integers(0, 10, count)), 255)


def settings(case: dict[str, Any], optimizer: str) -> Train:
    common = {"epochs": 1_000, "batch_size": BATCH, "optimizer": optimizer, "lr": 1e-3, "schedule": "constant"}
    return Train.model_validate(common | case["train"])


def measure(name: str, optimizer: str, rounds: int) -> dict[str, Any]:
    """One case: times of the three arms, and their ratios round by round."""
    case, images = CASES[name], random_images(STEPS * BATCH)
    train = settings(case, optimizer)
    arms = {"products": products(case), "kd": kd(case, images, train), "naive": naive(case, images, train)}
    for warm_up in arms.values():
        timed(warm_up)
    times: dict[str, list[Time]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in random.sample(list(arms), len(arms)):
            times[arm].append(timed(arms[arm]))
    widths = [784, *case["hidden"], 10]
    flop = 2 * BATCH * (3 * sum(n * m for n, m in pairwise(widths)) - 784 * widths[1])

    def ratio(a: str, b: str, clock: Callable[[Time], float]) -> dict[str, float]:
        return spread([clock(x) / clock(y) for x, y in zip(times[a], times[b], strict=True)])

    return {
        "case": name,
        "optimizer": optimizer,
        "ms_wall": {arm: spread([1e3 * t.wall for t in ts]) for arm, ts in times.items()},
        "ms_cpu": {arm: spread([1e3 * t.cpu for t in ts]) for arm, ts in times.items()},
        "gflop_per_s": {arm: flop / statistics.median(t.wall for t in ts) / 1e9 for arm, ts in times.items()},
        "kd_over_products": ratio("kd", "products", lambda t: t.wall),
        "naive_over_kd_cpu": ratio("naive", "kd", lambda t: t.cpu),
        "naive_over_products_cpu": ratio("naive", "products", lambda t: t.cpu),
        "contended": any(statistics.median(t.wall / t.cpu for t in ts) > 1.05 for ts in times.values()),
    }


def measure_gpu(name: str, optimizer: str, rounds: int) -> dict[str, Any]:
    """One case on a GPU: milliseconds a step and net, by device events; start-up and capture apart."""
    case, images, captured = CASES[name], random_images(STEPS * BATCH).to(DEVICE), training._captured
    arms, start = {}, {}
    for arm, members in (("eager", 1), ("graph", 1), ("stacked", 10)):
        training._captured = captured if arm != "eager" else lambda step, *_: step
        began = time.perf_counter()
        arms[arm] = kd(case, images, settings(case, optimizer), members), members
        next(arms[arm][0])
        torch.cuda.synchronize()
        start[arm] = time.perf_counter() - began
    training._captured = captured
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in random.sample(list(arms), len(arms)):
            epochs, members = arms[arm]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            next(epochs)
            end.record()
            torch.cuda.synchronize()
            times[arm].append(begin.elapsed_time(end) / STEPS / members)
    return {
        "case": name,
        "optimizer": optimizer,
        "ms_a_step_and_net": {arm: spread(ts) for arm, ts in times.items()},
        "seconds_to_first_epoch": start,
    }


def saving(rounds: int) -> dict[str, float]:
    """Saving the training state of net B with Adam and averaged weights, as a share of the training between two saves."""
    net = MLP(784, [1200, 1200], 10)
    train = Train(epochs=1, optimizer="adam", lr=1e-3)
    state, _ = training.make_optimizer(net, train, torch.zeros(()))
    state |= {f"{name}/ema": p.detach().clone() for name, p in net.named_parameters()}
    times = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Run(Path(folder), Spec("bench", "train-teacher", 0, {}))
        with run.writing("cpu", 1):
            for epoch in range(rounds):
                began = time.perf_counter()
                run.save_state(epoch, state)
                times.append((time.perf_counter() - began) / SAVE_EVERY)
            run.end("failed", "a benchmark")
    return spread(times) | {"most": max(times), "megabytes": sum(4 * t.numel() for t in state.values()) / 1e6}


def scale_of(hidden: int, batch: int) -> None:
    """In a process of its own: seconds an epoch, from a part of one, and peak memory of a hard-label net."""
    case, part = {"hidden": [hidden, hidden], "train": {}}, 20 if hidden < 4000 else 100
    images = random_images(60_000)
    few = images.at(torch.arange(max(60_000 // part, 2 * batch)))
    train = settings(case, "adam").model_copy(update={"batch_size": batch})
    epochs = kd(case, few, train)
    next(epochs)
    times = [timed(epochs).wall * STEPS * 60_000 / len(few) for _ in range(3)]
    print(json.dumps([statistics.median(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def scale() -> None:
    """Width, batch and members against seconds an epoch and peak memory (of kd, torch and the images together)."""
    print("| hidden | batch | s an epoch | peak MB |\n| ---: | ---: | ---: | ---: |")
    for hidden, batch in [(w, 128) for w in (300, 800, 1200, 4000)] + [(800, b) for b in (512, 1024, 4096)]:
        words = [sys.executable, __file__, "--scale-of", str(hidden), str(batch)]
        seconds, memory = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        print(f"| {hidden} x {hidden} | {batch} | {seconds:.1f} | {memory:.0f} |", flush=True)
    print(
        "\n| members | s for two epochs of each, start-up included | peak MB of all processes |\n| ---: | ---: | ---: |"
    )
    for members in (1, 2, 4, 8):
        seconds, memory = teachers(members)
        print(f"| {members} | {seconds:.0f} | {memory:.0f} |", flush=True)


def teachers(members: int) -> tuple[float, float]:
    """Seconds and peak memory (MB, shared pages counted once) of `kd train-teacher mnist` for so many seeds."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        words = ["train-teacher", "mnist", "--epochs", "2", "--seeds", f"0-{members - 1}", "--runs-dir", folder]
        with subprocess.Popen(
            [sys.executable, "-m", "kdcli", *words, "--threads", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while process.poll() is None:
                peak = max(peak, sum(map(memory_of, family(process.pid))))
                time.sleep(2)  # to look costs the processes time
    assert process.returncode == 0, "kd failed: is MNIST in data/ or $KD_DATA?"
    return time.perf_counter() - began, peak / 1024


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [pid, *(one for child in children for one in family(child))]


def memory_of(pid: int) -> int:
    """Proportional set size in KiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", action="store_true", help="print seconds an epoch and memory by width and batch")
    parser.add_argument("--scale-of", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.scale_of:
        return scale_of(*arguments.scale_of)
    if arguments.scale:
        return scale()
    load, run = os.getloadavg()[0], measure_gpu if DEVICE.type == "cuda" else measure
    results = [run(name, optimizer, arguments.rounds) for name in CASES for optimizer in ("sgd", "adam")]
    document: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": 1,
        "batch": BATCH,
        "load_at_start": round(load, 2),
        "contended": load > 0.5 or any(r.get("contended", False) for r in results),
        "results": results,
        "saving": saving(arguments.rounds),
    }
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    print(", ".join(f"{key}: {value}" for key, value in document.items() if key not in ("results", "saving")), "\n")
    for line in (gpu_lines if DEVICE.type == "cuda" else cpu_lines)(results):
        print(line)
    share = document["saving"]
    print(
        f"\nSaving the state of a teacher ({share['megabytes']:.0f} MB) every {SAVE_EVERY:.0f} s: {share['median']:.2%} of the "
        f"time ({share['quartile1']:.2%} to {share['quartile3']:.2%}, at most {share['most']:.2%})"
    )
    if document["contended"]:
        print("\nThis machine was doing something else at the same time: measure again when it is quiet.")


def cpu_lines(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| case | optimizer | ms a step: products / kd / naive | ms CPU | GFLOP/s | kd / products | naive / kd, CPU | naive / products, CPU |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in results:
        wall, cpu = (" / ".join(f"{ms['median']:.2f}" for ms in r[key].values()) for key in ("ms_wall", "ms_cpu"))
        flops = " / ".join(f"{rate:.0f}" for rate in r["gflop_per_s"].values())
        ratios = " | ".join(
            shown(r[key]) for key in ("kd_over_products", "naive_over_kd_cpu", "naive_over_products_cpu")
        )
        yield f"| {r['case']} | {r['optimizer']} | {wall} | {cpu} | {flops} | {ratios} |"


def gpu_lines(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| case | optimizer | ms a step and net: eager | graph | ten stacked | s to the first epoch |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in results:
        times = " | ".join(shown(x, 4) for x in r["ms_a_step_and_net"].values())
        start = " / ".join(f"{x:.1f}" for x in r["seconds_to_first_epoch"].values())
        yield f"| {r['case']} | {r['optimizer']} | {times} | {start} |"


def shown(x: dict[str, float], digits: int = 2) -> str:
    return f"{x['median']:.{digits}f} ({x['quartile1']:.{digits}f} to {x['quartile3']:.{digits}f})"


if __name__ == "__main__":
    main()
