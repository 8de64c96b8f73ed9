"""How close a training step comes to its own matrix products: `make bench`, or `python tools/bench.py [--json]`.

For each case, in one process, the arms shuffled in every round:

    products  the step's matrix products alone, written into preallocated outputs: one forward and one for the weights'
              gradient a layer, and one for the inputs' gradient a layer but the first
    kd        the step as `fit` runs it: epochs of `fit` itself, divided by their steps
    naive     the loop as most people write it: DataLoader, ToTensor and RandomAffine a sample, stock dropout, an
              unfused optimizer, torch.renorm with a copy, `.item()` every step, a live teacher

A second table holds the commands as shipped, `kd train-teacher mnist` and `kd distill mnist`: CPU seconds an epoch with
all that goes with one (averaged weights, evaluation, saving), over the products of its steps. It needs MNIST. A third
holds what kd does itself against the library's way, each put into the same loop in its place.

The images are random bytes, which costs what real ones cost. Times are medians over the rounds with their quartiles;
ratios are taken round by round, so that a drift of the machine's speed cancels. `--scale` prints the other table:
seconds an epoch of 60,000 images and peak memory, each figure from a process of its own.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdcli import BadInput, cores, yamlfile
from kdcli.config import Data, Distill, Model, Section, Train
from kdcli.data import augment
from kdcli.data.dataset import Split, open_dataset
from kdcli.machine.device import seeded
from kdcli.nets.models import MLP, build
from kdcli.plan import plan
from kdcli.runs.directory import SAVE_EVERY, Places, Run, State
from kdcli.runs.spec import Epoch, Facts, Spec
from kdcli.teachers.teacher import Teacher, predict
from kdcli.training import fit as training
from kdcli.training.fit import Fitted, fit, make_optimizer
from kdcli.training.train import train as train_run
from kdcli.yamlfile import Override

STEPS, BATCH, CLASSES, SHAPE = 30, 128, 10, [1, 28, 28]
FACTS = Facts(fingerprint="", classes=[str(c) for c in range(CLASSES)], shape=SHAPE, white=255)
DISTILL = Distill(T=20, lambda1=0.9, lambda2=0.1)
Optimizer = Literal["sgd", "adam"]


class Case(NamedTuple):
    """A net and how it is trained."""

    name: str
    model: Model
    jitter: int = 0
    max_norm: float | None = None
    distilled: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """The inputs and outputs of each layer."""
        return list(pairwise([math.prod(SHAPE), *(self.model.hidden or []), CLASSES]))

    def train(self, optimizer: Optimizer, batch_size: int = BATCH) -> Train:
        return Train(
            epochs=1_000,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=1e-3,
            momentum=0.9 if optimizer == "sgd" else None,
            jitter=self.jitter,
            max_norm=self.max_norm,
        )


STUDENT = Model(hidden=[800, 800])
TEACHER = Case("jittered teacher", Model(hidden=[1200, 1200], dropout=0.5, input_dropout=0.2), jitter=2, max_norm=4.0)
SHIPPED = {"train-teacher": "teacher", "distill": "student"}  # commands and their rows
CASES = (Case("hard-label student", STUDENT), Case("distilled student", STUDENT, distilled=True), TEACHER)


class Time(NamedTuple):
    """Seconds a step."""

    wall: float
    cpu: float


class Quartiles(Section):
    """Of a figure over the rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Figures(Section):
    """What one case took."""

    case: str
    optimizer: Optimizer
    ms_wall: dict[str, Quartiles]
    ms_cpu: dict[str, Quartiles]
    gflop_per_s: dict[str, float]
    kd_over_products: Quartiles
    naive_over_kd_cpu: Quartiles
    naive_over_products_cpu: Quartiles
    contended: bool


class Shipped(Section):
    """What an epoch of a command takes, as its experiment file has it."""

    command: str
    batch: int
    s_cpu: Quartiles  # an epoch
    over_products_cpu: Quartiles


class Bought(Section):
    """What a step takes with the library's way in place of kd's own, over what it takes with that."""

    own: str
    instead: str
    ratio_cpu: Quartiles


class Saving(Section):
    """The time that saving the training state takes, as a share of the training between two saves."""

    share: Quartiles
    most: float
    megabytes: float


class Started(Section):
    """What a command that trains nothing takes, over the import of the libraries that every command needs."""

    words: str
    over_imports_cpu: Quartiles


class Report(Section):
    """The document of `--json`."""

    machine: str
    torch: str
    threads: int = 1
    batch: int = BATCH
    load_at_start: float
    contended: bool
    results: list[Figures]
    shipped: list[Shipped]
    bought: list[Bought]
    saving: Saving
    started: list[Started]


def products(case: Case, batch: int = BATCH) -> Iterator[None]:
    """The matrix products of `STEPS` steps, every time it is asked."""
    inputs = [torch.randn(batch, n) for n, _ in case.layers]
    weights = [torch.randn(m, n) for n, m in case.layers]
    outputs, input_gradients = [torch.empty(batch, m) for _, m in case.layers], [torch.empty_like(x) for x in inputs]
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


def built(model: Model) -> nn.Module:
    with seeded(0, "init"):
        return build(model, FACTS)


def kd(case: Case, images: Split, train: Train) -> Iterator[Fitted]:
    """Epochs of the loop itself; a student's teacher is asked once, before them."""
    if not case.distilled:
        return fit(built(case.model), images, train, 0)
    logits = predict(built(TEACHER.model), images)[None]
    teacher = Teacher(lambda index, _: logits.index_select(1, index))
    return fit(built(case.model), images, train, 0, teacher=teacher, distill=DISTILL)


class Samples(Dataset[tuple[Tensor, int]]):
    """Images read one by one as torchvision's MNIST reads them, then its transforms."""

    def __init__(self, images: Split, jitter: int) -> None:
        self.images, self.labels = images.store, images.labels
        self.transform = transforms.Compose([transforms.ToTensor(), *([affine(jitter)] if jitter else [])])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0].numpy())), int(self.labels[index])


def affine(jitter: int) -> transforms.RandomAffine:
    return transforms.RandomAffine(0, translate=(jitter / SHAPE[2], jitter / SHAPE[1]))


def naive(case: Case, images: Split, train: Train) -> Iterator[None]:
    """Epochs of the loop as most people write it."""
    *hidden, (width, _) = case.layers
    drop = [nn.Dropout(p) for p in (case.model.input_dropout, *(case.model.dropout for _ in hidden))]
    layers = [
        part for i, (n, m) in enumerate(hidden) for part in (drop[i], nn.Linear(n, m), nn.ReLU())
    ]  # dropout before each layer: on the pixels, then on the hidden units
    net = nn.Sequential(nn.Flatten(), *layers, drop[-1], nn.Linear(width, CLASSES))
    sgd = train.optimizer == "sgd"
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9) if sgd else torch.optim.Adam(net.parameters(), 1e-3)
    loader, live, losses = DataLoader(Samples(images, case.jitter), BATCH, shuffle=True), built(TEACHER.model), []
    live.eval()
    while True:
        for x, y in loader:
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            if case.distilled:
                with torch.no_grad():
                    soft_targets = F.softmax(live(x) / 20, 1)
                kl = F.kl_div(F.log_softmax(logits / 20, 1), soft_targets, reduction="batchmean")
                loss = 0.9 * 400 * kl + 0.1 * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for layer in net[:-1] if case.max_norm else []:
                if isinstance(layer, nn.Linear):
                    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, case.max_norm or 0)
            losses.append(loss.item())
        yield


def timed(arm: Iterator[object]) -> Time:
    """Seconds a step of the next epoch."""
    wall, cpu = time.perf_counter(), time.process_time()
    next(arm)
    return Time((time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS)


def interleaved(arms: dict[str, Callable[[], Time]], rounds: int) -> dict[str, list[Time]]:
    """The times of every arm in every round, after one to warm up."""
    times: dict[str, list[Time]] = {arm: [] for arm in arms}
    for round_ in range(rounds + 1):
        for arm in random.sample(list(arms), len(arms)):
            taken = arms[arm]()
            if round_:
                times[arm].append(taken)
    return times


def quartiles(values: Sequence[float]) -> Quartiles:
    low, median, high = statistics.quantiles(values, n=4)
    return Quartiles(low=low, median=median, high=high)


def ratio(a: Sequence[Time], b: Sequence[Time], clock: Callable[[Time], float]) -> Quartiles:
    return quartiles([clock(x) / clock(y) for x, y in zip(a, b, strict=True)])


def random_images(count: int) -> Split:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=draws)
    return Split(images, torch.randint(CLASSES, (count,), generator=draws), 255)


def measure(case: Case, optimizer: Optimizer, rounds: int) -> Figures:
    """One case: times of the three arms, and their ratios round by round."""
    images, train = random_images(STEPS * BATCH), case.train(optimizer)
    arms = {"products": products(case), "kd": kd(case, images, train), "naive": naive(case, images, train)}
    times = interleaved({name: partial(timed, arm) for name, arm in arms.items()}, rounds)
    inputs, units = case.layers[0]
    flop = 2 * BATCH * (3 * sum(n * m for n, m in case.layers) - inputs * units)
    return Figures(
        case=case.name,
        optimizer=optimizer,
        ms_wall={arm: quartiles([1e3 * t.wall for t in ts]) for arm, ts in times.items()},
        ms_cpu={arm: quartiles([1e3 * t.cpu for t in ts]) for arm, ts in times.items()},
        gflop_per_s={arm: flop / statistics.median(t.wall for t in ts) / 1e9 for arm, ts in times.items()},
        kd_over_products=ratio(times["kd"], times["products"], lambda t: t.wall),
        naive_over_kd_cpu=ratio(times["naive"], times["kd"], lambda t: t.cpu),
        naive_over_products_cpu=ratio(times["naive"], times["products"], lambda t: t.cpu),
        contended=any(statistics.median(t.wall / t.cpu for t in ts) > 1.05 for ts in times.values()),
    )


def shipped(rounds: int) -> list[Shipped]:
    """The commands' own trainings of mnist.yaml, a few epochs long; none where MNIST is not at hand."""
    mnist = yamlfile.load("mnist").experiment
    try:
        dataset = open_dataset(mnist.data, download=False)
    except BadInput:
        return []
    images, tested = len(dataset.train), len(dataset.test)
    trains = {"teacher": mnist.teacher.train, "student": mnist.student.train}
    every = {net: train.tested_every(images, tested) for net, train in trains.items() if train}
    epochs = [Override(f"{net}.train.epochs", every[net] * (rounds + 1), "bench") for net in every]
    jobs = {job.row.name: job for job in reversed(plan([yamlfile.load("mnist", epochs).experiment], dataset))}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        places = Places(Path(folder), None, "cpu", 1)
        return [epochs_of(f"kd {c} mnist", jobs[row].spec, images, every[row], places) for c, row in SHIPPED.items()]


def epochs_of(command: str, spec: Spec, images: int, every: int, places: Places) -> Shipped:
    """A training in rounds of `every` epochs, after which errors are counted, with products after each epoch; without
    the first round, whose time has the reading of the images in it."""
    model, how = spec.trained
    arm, taken = products(Case("", model), how.batch_size), list[tuple[float, float]]()
    began = time.process_time()

    def tell(_: str, __: int, epoch: Epoch) -> None:
        nonlocal began
        cpu = time.process_time() - began
        taken.append((cpu, timed(arm).cpu * images / how.batch_size))
        began = time.process_time()

    with mock.patch.object(Train, "tested_every", return_value=every):  # as seldom as in the whole training
        train_run(spec, places, tell, lambda line: None)
    own, alone = (
        [statistics.mean(c[i : i + every]) for i in range(every, len(c), every)] for c in zip(*taken, strict=True)
    )
    return Shipped(
        command=command,
        batch=how.batch_size,
        s_cpu=quartiles(own),
        over_products_cpu=quartiles([a / b for a, b in zip(own, alone, strict=True)]),
    )


# What kd does itself, and the library's way.


def stock_dropout(net: MLP, x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p, net.training)


def random_affine(x: Tensor, _: Tensor, __: int) -> Tensor:
    """It draws one shift for all that it is given: an image at a time."""
    return torch.stack([affine(TEACHER.jitter)(image) for image in x])


def grid_sample(x: Tensor, shifts: Tensor, most: int) -> Tensor:
    """torch's own sampling of a whole batch, with the shifts as affine maps."""
    maps = torch.eye(2, 3).repeat(len(x), 1, 1)
    maps[:, :, 2] = (shifts.flip(1) - most) * 2 / torch.tensor(SHAPE[:0:-1])
    grid = F.affine_grid(maps, [len(x), *SHAPE], align_corners=False)
    return F.grid_sample(x.float(), grid, align_corners=False)


def unfused(net: nn.Module, train: Train) -> torch.optim.Optimizer:
    optimizer = make_optimizer(net, train)
    for group in optimizer.param_groups:
        group["fused"] = False
    return optimizer


INSTEAD: dict[str, tuple[str, AbstractContextManager[object]]] = {
    "nn.Dropout": ("byte_mask", mock.patch.object(MLP, "_drop", stock_dropout)),
    "RandomAffine": ("augment.shift", mock.patch.object(augment, "shift", random_affine)),
    "grid_sample": ("augment.shift", mock.patch.object(augment, "shift", grid_sample)),
    "unfused": ("fused optimizers", mock.patch.object(training, "make_optimizer", unfused)),
    "": ("all of it", nullcontext()),
}
epochs: list[Iterator[object]] = []  # of a process of `bought`


def next_epoch(instead: str) -> Time:
    """In a process of its own, since what one arm does to the allocator stays: the next epoch of a teacher."""
    with INSTEAD[instead][1]:
        if not epochs:
            torch.set_num_threads(1)
            epochs.append(kd(TEACHER, random_images(STEPS * BATCH), TEACHER.train("adam")))
        return timed(epochs[0])


def bought(rounds: int) -> list[Bought]:
    """Each of `INSTEAD` against the loop as it is, on the teacher with Adam."""
    spawn = get_context("spawn")
    with ExitStack() as processes:
        pools = {name: processes.enter_context(spawn.Pool(1)) for name in INSTEAD}
        times = interleaved({name: partial(pool.apply, next_epoch, (name,)) for name, pool in pools.items()}, rounds)
    as_it_is = times.pop("")
    return [
        Bought(own=INSTEAD[name][0], instead=name, ratio_cpu=ratio(taken, as_it_is, lambda t: t.cpu))
        for name, taken in times.items()
    ]


def saving(rounds: int) -> Saving:
    """Saving the training state of the teacher with Adam and averaged weights."""
    train = TEACHER.train("adam").model_copy(update={"ema": 0.999})
    state = next(kd(TEACHER, random_images(BATCH), train)).state()
    spec = Spec(experiment="bench", command="train-teacher", seed=0, dataset=FACTS, data=Data(name="mnist"))
    shares = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Run(Path(folder), spec)
        run.path.mkdir(parents=True)
        for epoch in range(rounds):
            began = time.perf_counter()
            run.save_state(State(epoch, state))
            shares.append((time.perf_counter() - began) / SAVE_EVERY)
    size = sum(t.numel() * t.element_size() for t in state.values())
    return Saving(share=quartiles(shares), most=max(shares), megabytes=size / 1e6)


# Starting up.
COMPARE = "compare digits/baseline digits/distill"
STARTS = ("--help", "runs", "distill --T abc", COMPARE, "distill digits --dry-run --with-teacher")


def process(folder: str, *words: str) -> Time:
    """The CPU seconds of a process of its own."""
    before, environment = os.times(), os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Time(cpu, cpu)


def started(rounds: int) -> list[Started]:
    """Commands as they are typed in a folder with a few short runs, against the imports alone."""
    imports = "import typer.main, typer.rich_utils, rich.table, rich.progress, yaml; from pydantic import BaseModel"
    with tempfile.TemporaryDirectory() as folder:
        kd = partial(process, folder, "-m", "kdcli")
        kd("distill", "digits", "--with-teacher", "--epochs", "1", "--set", "teacher.train.epochs=1", "--seeds", "0-4")
        arms = {words: partial(kd, *words.split()) for words in STARTS}
        times = interleaved({**arms, "": partial(process, folder, "-c", imports)}, rounds)
    alone = times.pop("")
    return [Started(words=w, over_imports_cpu=ratio(taken, alone, lambda t: t.cpu)) for w, taken in times.items()]


# Seconds and memory by size.


def scale_of(hidden: int, batch: int) -> None:
    """In a process of its own: seconds an epoch, from a part of one, and peak memory of a hard-label net."""
    case, part = Case("", Model(hidden=[hidden, hidden])), 20 if hidden < 4000 else 100
    images = random_images(60_000)
    few = images.at(torch.arange(max(60_000 // part, 2 * batch)))
    epochs = kd(case, few, case.train("adam", batch))
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


def report(rounds: int) -> Report:
    load = os.getloadavg()[0]
    optimizers: tuple[Optimizer, ...] = ("sgd", "adam")
    results = [measure(case, optimizer, rounds) for case in CASES for optimizer in optimizers]
    return Report(
        machine=f"{platform.machine()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}",
        torch=torch.__version__,
        load_at_start=round(load, 2),
        contended=load > 0.5 or any(r.contended for r in results),
        results=results,
        shipped=shipped(rounds // 2 + 1),
        bought=bought(rounds),
        saving=saving(rounds),
        started=started(rounds),
    )


def lines(found: Report) -> Iterator[str]:
    """The report for a reader."""
    yield (
        f"{found.machine}, torch {found.torch}, {found.threads} thread, batches of {found.batch}, load at the start "
        f"{found.load_at_start}\n"
    )
    yield (
        "| case | optimizer | ms a step: products / kd / naive | ms CPU | GFLOP/s | kd / products | naive / kd, CPU | "
        "naive / products, CPU |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for r in found.results:
        wall, cpu = (" / ".join(f"{ms.median:.2f}" for ms in arms.values()) for arms in (r.ms_wall, r.ms_cpu))
        flops = " / ".join(f"{rate:.0f}" for rate in r.gflop_per_s.values())
        ratios = f"{r.kd_over_products} | {r.naive_over_kd_cpu} | {r.naive_over_products_cpu}"
        yield f"| {r.case} | {r.optimizer} | {wall} | {cpu} | {flops} | {ratios} |"
    if found.shipped:
        yield "\n| command | batch | s CPU an epoch | over the epoch's products, CPU |\n| --- | --- | --- | --- |"
        yield from (f"| {s.command} | {s.batch} | {s.s_cpu} | {s.over_products_cpu} |" for s in found.shipped)
    yield f"\n| kd's own | instead | the step, CPU, over kd's ({TEACHER.name}, adam) |\n| --- | --- | --- |"
    yield from (f"| {b.own} | {b.instead} | {b.ratio_cpu} |" for b in found.bought)
    yield "\n| typed | CPU over that of importing typer, rich, pydantic and yaml |\n| --- | --- |"
    yield from (f"| kd {s.words} | {s.over_imports_cpu} |" for s in found.started)
    saved, share = found.saving, found.saving.share
    yield (
        f"\nSaving the state of a teacher ({saved.megabytes:.0f} MB) every {SAVE_EVERY:.0f} s: {share.median:.2%} of "
        f"the time ({share.low:.2%} to {share.high:.2%}, at most {saved.most:.2%})"
    )
    if found.contended:
        yield "\nThis machine was doing something else at the same time: measure again when it is quiet."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", action="store_true", help="print seconds an epoch and memory by width and batch")
    parser.add_argument("--scale-of", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.scale_of:
        scale_of(*arguments.scale_of)
    elif arguments.scale:
        scale()
    else:
        found = report(arguments.rounds)
        print(found.model_dump_json(indent=1) if arguments.json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
