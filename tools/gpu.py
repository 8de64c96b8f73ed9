"""Every figure of a GPU in one call, in under six minutes: `make gpu`, or `python tools/gpu.py`.

The loop is `fit` itself; the arms differ in how it asks the net, in what takes the place of `device.forward_of`:

    float32   kernel by kernel, TF32 allowed in matrix products
    bfloat16  the same under autocast, as kd asks convolutions
    compiled  torch.compile(mode="reduce-overhead") under autocast

First the milliseconds a step, by the device's own events, the seconds that compiling takes and the steps that pay for
it; then whether a seed repeats and a resumed training goes on bit for bit; then the errors on the digits, on the CPU
and with each arm, which shows whether bfloat16 hurts, soft targets at T = 20 above all; then, where MNIST is in data/
or $KD_DATA, some epochs of mnist.yaml's teacher and of its student. A figure that fails says so, and the others go on.
Only the data need scikit-learn and torchvision.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from kdcli import BadInput, failure, yamlfile
from kdcli.config import Data, Distill, Network, TeacherSection, Train
from kdcli.data.dataset import Split, open_dataset
from kdcli.machine.device import place, seeded, select_device
from kdcli.nets.models import build
from kdcli.runs.directory import State
from kdcli.runs.spec import Facts
from kdcli.score import count_errors
from kdcli.teachers.teacher import Teacher, predict
from kdcli.training import fit as training
from kdcli.training.fit import NOTHING, Fitted, fit

Forward = Callable[[Tensor], Tensor]

MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MNIST_FACTS = Facts(fingerprint="", classes=[str(c) for c in range(10)], shape=[1, 28, 28], white=255)


def halved(net: Forward, device: torch.device) -> Forward:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            return net(x)

    return forward


def compiled(net: nn.Module, device: torch.device) -> Forward:
    return halved(torch.compile(net, mode="reduce-overhead") if device.type == "cuda" else net, device)


ARMS: dict[str, Callable[[nn.Module, torch.device], Forward]] = {
    "float32": lambda net, _: net,
    "bfloat16": halved,
    "compiled": compiled,
}


class Sizes(NamedTuple):
    """How much is done for a figure."""

    steps: int = 200  # of a timed epoch
    rounds: int = 5
    seeds: int = 3
    digits: int = 20  # epochs
    mnist: int = 5
    width: int = 64  # of the small convolutional net


class Case(NamedTuple):
    """A net of somebody's and how it is trained; a student where `distill` is given."""

    name: str
    make: Callable[[], nn.Module]
    train: Train
    shape: tuple[int, int, int] = (1, 28, 28)
    distill: Distill | None = None
    channels_last: bool = True
    arms: Sequence[str] = tuple(ARMS)
    repeats: bool = False  # is looked at


class Steps(NamedTuple):
    """What one arm of a case took."""

    ms: float  # a step
    start: float  # seconds of the first epoch beyond a later one
    megabytes: float  # most memory taken from the device


def conv_net(width: int) -> nn.Module:
    """A net with BatchNorm for 3 x 32 x 32: three convolutions, of `width`, 2 and 4 times as many channels."""
    layers: list[nn.Module] = []
    for n, m in pairwise((3, width, 2 * width, 4 * width)):
        layers += [nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def cases(width: int) -> list[Case]:
    mnist = yamlfile.load("mnist").experiment

    def mlp(name: str, network: Network, distill: Distill | None = None) -> Case:
        return Case(name, lambda: build(network.model, MNIST_FACTS), network.train, distill=distill)

    def conv(width: int) -> Case:
        train = Train(epochs=1, lr=0.1, jitter=2, weight_decay=5e-4)
        return Case(f"convolutional net, {width} channels", partial(conv_net, width), train, (3, 32, 32))

    teacher, small, wide = network_of(mnist.teacher), conv(width), conv(4 * width)
    plain = teacher.model_copy(update={"train": teacher.train.model_copy(update={"ema": None})})
    return [
        mlp("student, hard labels", mnist.student),
        mlp("student, distilled", mnist.student, mnist.distill),
        mlp("teacher, jittered", teacher)._replace(repeats=True),
        mlp("teacher, no average", plain),
        small._replace(repeats=True),
        wide,
        wide._replace(name=f"{wide.name}, not channels_last", channels_last=False, arms=("float32", "bfloat16")),
    ]


def arm(name: str) -> AbstractContextManager[object]:
    return mock.patch.object(training, "forward_of", ARMS[name])


def answers(logits: Tensor) -> Teacher:
    """A teacher with these logits [N, C] of the transfer set."""
    return Teacher(lambda index, _: logits[None].index_select(1, index))


def random_images(count: int, shape: Sequence[int]) -> Split:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=draws)
    return Split(images, torch.randint(10, (count,), generator=draws), 255)


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long some work takes on the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def forget() -> None:
    """Free what the arm before left: compiled code and its graphs hold memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def epochs_of(case: Case, device: torch.device, steps: int, epochs: int, start: State = NOTHING) -> Iterator[Fitted]:
    """Epochs of `fit`, the last batch of each a smaller one, as it mostly is."""
    train = case.train.model_copy(update={"epochs": epochs, "warmup": 0.0})
    images = random_images(steps * train.batch_size - train.batch_size // 4, case.shape).to(device)
    with seeded(0, "init"):
        net = case.make().to(device)
    if case.channels_last:
        net = place(net, device)
    teacher = answers(torch.randn(len(images), 10, device=device)) if case.distill else None
    return fit(net, images, train, 0, teacher=teacher, distill=case.distill, start=start)


def timed(case: Case, device: torch.device, sizes: Sizes) -> Steps:
    forget()
    epochs = epochs_of(case, device, sizes.steps, 1_000)
    first, *later = [milliseconds(device, lambda: next(epochs)) for _ in range(sizes.rounds + 1)]
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    ms = statistics.median(later)
    return Steps(ms / sizes.steps, (first - ms) / 1e3, peak / 1e6)


def step_times(case: Case, device: torch.device, sizes: Sizes) -> None:
    found = {}
    for name in case.arms:
        with arm(name):
            found[name] = timed(case, device, sizes)
    ms = " / ".join(f"{steps.ms:.3f}" for steps in found.values())
    memory = " / ".join(f"{steps.megabytes:.0f}" for steps in found.values())
    seconds, pays = "", ""
    if "compiled" in found:
        gain = found["bfloat16"].ms - found["compiled"].ms
        compiling = found["compiled"].start - found["bfloat16"].start
        seconds, pays = f"{compiling:.1f}", f"{1e3 * compiling / gain:,.0f}" if gain > 0 else "never"
    row(case.name, str(case.train.batch_size), ms, seconds, pays, memory)


def repeats(case: Case, device: torch.device) -> None:
    """Whether the losses of four epochs are the same a second time, and continued after two of them."""
    for name in ARMS:
        forget()
        with arm(name):
            once, again = ([end.loss for end in epochs_of(case, device, 8, 4)] for _ in range(2))
            half = next(end for end in epochs_of(case, device, 8, 4) if end.epoch == 2)
            start = State(2, {key: tensor.clone() for key, tensor in half.state().items()})
            resumed = [end.loss for end in epochs_of(case, device, 8, 4, start)]
        row(case.name, name, *("yes" if same else "no" for same in (once == again, once[2:] == resumed)))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def heading(title: str, *columns: str) -> None:
    print(f"\n{title}\n")
    row(*columns)
    row(*("---" for _ in columns))


def attempt(name: str, figure: Callable[[], None]) -> None:
    """One figure; what goes wrong with it is printed."""
    began = time.perf_counter()
    try:
        figure()
    except Exception as error:
        row(name, f"failed after {time.perf_counter() - began:.0f} s: {failure(error)[:500]}")


# Errors.


def last(epochs: Iterator[Fitted]) -> Fitted:
    *_, end = epochs
    return end


def trained(network: Network, train_set: Split, seed: int, device: torch.device, soft: Tensor | None) -> Fitted:
    """The end of a training on hard labels or, with a teacher's logits `soft` [N, C], at T = 20."""
    images = train_set.to(device)
    with seeded(seed, "init"):
        facts = MNIST_FACTS.model_copy(update={"shape": list(images.store.shape[1:])})
        net = place(build(network.model, facts), device)
    if soft is None:
        return last(fit(net, images, network.train, seed))
    distill = Distill(T=20, lambda1=0.9, lambda2=0.1)
    return last(fit(net, images, network.train, seed, teacher=answers(soft.to(device)), distill=distill))


def network_of(teacher: TeacherSection) -> Network:
    """The net and its training, of a teacher that is trained here."""
    assert teacher.model
    assert teacher.train
    return Network(model=teacher.model, train=teacher.train)


def shorter(network: Network, epochs: int, **model: object) -> Network:
    train = network.train.model_copy(update={"epochs": epochs})
    return network.model_copy(update={"train": train, "model": network.model.model_copy(update=model)})


def digits() -> tuple[Split, Split]:
    """Training and test images: the digits or, without scikit-learn, ten prototypes under noise."""
    try:
        data = open_dataset(Data(name="digits"))
        return data.train, data.test
    except ImportError:
        draws = torch.Generator().manual_seed(0)
        labels = torch.arange(1_797) % 10
        prototypes = torch.rand(10, 1, 8, 8, generator=draws)
        noisy = prototypes[labels] + 0.6 * torch.randn(1_797, 1, 8, 8, generator=draws)
        all_ = Split((16 * noisy).clamp(0, 16).to(torch.uint8), labels, 16)
        return all_.at(torch.arange(1_297)), all_.at(torch.arange(1_297, 1_797))


def digits_errors(device: torch.device, sizes: Sizes) -> None:
    """Teachers and students of several seeds, on the CPU in float32 and on the device with each arm."""
    train, test = digits()
    small = yamlfile.load("digits").experiment
    networks = {
        "teacher": shorter(network_of(small.teacher), sizes.digits),
        "student": shorter(small.student, sizes.digits),
    }
    soft = {
        seed: predict(trained(networks["teacher"], train, seed, torch.device("cpu"), None).net, train)
        for seed in range(sizes.seeds)
    }
    machines = [("cpu, float32", "float32", torch.device("cpu")), *((f"{device.type}, {a}", a, device) for a in ARMS)]
    for role, network in networks.items():
        for where, name, on in machines:
            with arm(name):
                ends = [trained(network, train, s, on, soft[s] if role == "student" else None) for s in soft]
            errors = [count_errors(predict(end.net, test.to(on)).cpu(), test.labels).errors for end in ends]
            kl = [end.t2_kl for end in ends if end.t2_kl is not None]
            row(role, where, ", ".join(map(str, errors)), f"{statistics.mean(kl):.4f}" if kl else "")


def mnist_errors(device: torch.device, sizes: Sizes) -> None:
    """A few epochs of mnist.yaml's teacher, and of its student from the float32 teacher's logits."""
    data, experiment = open_dataset(Data(name="mnist"), download=False), yamlfile.load("mnist").experiment
    soft: Tensor | None = None
    for role, network in (("teacher", network_of(experiment.teacher)), ("student", experiment.student)):
        for name in ARMS:
            forget()
            began = time.perf_counter()
            with arm(name):
                end = trained(shorter(network, sizes.mnist), data.train, 0, device, soft)
            seconds = (time.perf_counter() - began) / sizes.mnist
            errors = count_errors(predict(end.net, data.test.to(device)).cpu(), data.test.labels).errors
            row(role, name, f"{seconds:.2f}", str(errors), f"{end.t2_kl:.4f}" if end.t2_kl is not None else "")
            if role == "teacher" and name == "float32":
                logits = predict(end.net, data.train.to(device))
        soft = logits


def figures(device: torch.device, sizes: Sizes) -> None:
    heading(
        f"Steps ({' / '.join(ARMS)}; the last batch is a smaller one)",
        *("net", "batch", "ms a step", "s of compiling", "steps that pay for it", "MB"),
    )
    for case in cases(sizes.width):
        attempt(case.name, partial(step_times, case, device, sizes))
    heading("The same losses, bit for bit", "net", "arm", "from the same seed", "continued")
    for case in cases(sizes.width):
        if case.repeats:
            attempt(case.name, partial(repeats, case, device))
    heading(f"Digits, {sizes.digits} epochs, {sizes.seeds} seeds", "net", "where", "errors of 500", "T² KL")
    attempt("digits", partial(digits_errors, device, sizes))
    raw = Path(os.environ.get("KD_DATA") or "data") / "MNIST" / "raw"
    if not all((raw / f"{name}-ubyte").is_file() for name in MNIST_FILES):
        print(f"\nMNIST is not in {raw}: its figures are left out.")
        return
    columns = ("net", "arm", "s an epoch, compiling included", "errors of 10,000", "T² KL")
    heading(f"MNIST, {sizes.mnist} epochs of mnist.yaml", *columns)
    attempt("MNIST", partial(mnist_errors, device, sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to try the script itself
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        device = select_device(arguments.device)  # which makes convolutions repeat
    except BadInput as error:
        sys.exit(f"gpu.py: {error}")
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # each compiling is a first one
    torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}; torch {torch.__version__}, Python {platform.python_version()}")
    began = time.perf_counter()
    figures(device, Sizes(4, 2, 1, 2, 1, 4) if arguments.quick else Sizes())
    print(f"\n{time.perf_counter() - began:.0f} s in all.")


if __name__ == "__main__":
    main()
