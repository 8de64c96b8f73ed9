"""What photographs cost: `python tools/bench_images.py FOLDER`, a folder as `kd` reads it, of 32 x 32 pixels.

    a step      of `fit` against the bare forward, backward and optimizer on one ready float batch (resnet8, batch 128)
    a loop      as most people write it: ImageFolder, DataLoader with two workers, ToTensor, RandomCrop,
                RandomHorizontalFlip, Normalize, a live resnet56 as the teacher; CPU seconds of all processes
    starts      the first, which decodes the folder, and the second; with one thread and with all
    memory      the peak of anonymous memory while 0.3 and 3 GB of decoded images train
    views       resnet56 (--teacher resnet56.th) teaching resnet8 with flip and shift, whole trainings on a part of the
                images (--images, --epochs): CPU seconds with 8 kept views, asking for them included, against a live
                teacher; and the students' errors over three seeds
    onnx        an imported ONNX teacher (resnet20) asked for its logits, against onnxruntime alone

Arms are shuffled in every round and ratios taken round by round (tools/bench.py); one thread.
"""

import argparse
import copy
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench import Time, interleaved, quartiles, ratio
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kdcli import cores
from kdcli.config import Data, Distill, Experiment, Model, Origin, Train
from kdcli.data import cache, sources
from kdcli.data.dataset import Dataset, Split, open_dataset
from kdcli.evidence.verdict import paired
from kdcli.machine.device import place, seeded
from kdcli.nets import resnets
from kdcli.nets.models import Normalised, build
from kdcli.plan import plan
from kdcli.runs.directory import Places
from kdcli.runs.spec import Facts
from kdcli.teachers.imports import imported
from kdcli.teachers.teacher import Teacher, predict
from kdcli.training.fit import fit
from kdcli.training.train import train

BATCH, STEPS, CPU = 128, 8, torch.device("cpu")
SOFT = {"T": 4, "lambda1": 0.9, "lambda2": 0.1}
DISTILL = Distill.model_validate(SOFT)
FACTS = Facts(fingerprint="", classes=[str(c) for c in range(10)], shape=[3, 32, 32], white=255, mean=[0.5], std=[0.25])


def recipe(**more: object) -> Train:
    return Train.model_validate({"epochs": 10_000, "batch_size": BATCH, "lr": 0.01, "schedule": "constant", **more})


def student() -> nn.Module:
    with seeded(0, "init"):
        return build(Model(name="resnet8"), FACTS)


def bare(images: Split) -> Iterator[None]:
    """The same net and optimizer on one batch that is ready."""
    net, x, y = resnets.build("resnet8", 3, 10), images.inputs(torch.arange(BATCH)), images.labels[:BATCH]
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, fused=True)
    while True:
        for _ in range(STEPS):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield


def steps(images: Split, distilled: bool, live: nn.Module | None = None, **views: object) -> Iterator[object]:
    """Epochs of `fit` over STEPS batches."""
    logits = torch.randn(1, len(images), 10)
    teacher = Teacher(lambda index, x: live(x)[None] if live else logits[:, index])
    soft = {"teacher": teacher, "distill": DISTILL} if distilled else {}
    return fit(place(student(), CPU), images, recipe(**views), 0, **soft)  # type: ignore[arg-type]


def cpu() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def by_wall(taken: Time) -> float:
    return taken.wall


def by_cpu(taken: Time) -> float:
    return taken.cpu


def timed(arm: Iterator[object]) -> Time:
    wall, spent = time.perf_counter(), cpu()
    next(arm)
    return Time((time.perf_counter() - wall) / STEPS, (cpu() - spent) / STEPS)


def naive(folder: Path, teacher: nn.Module, augment: bool) -> Iterator[None]:
    """The loop as most people write it, over STEPS batches; every epoch starts its workers anew, as usual."""
    views = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
    normalise = transforms.Normalize([0.5] * 3, [0.25] * 3)
    whole = ImageFolder(str(folder / "train"), transforms.Compose([*views, transforms.ToTensor(), normalise]))
    part = torch.utils.data.Subset(whole, torch.randperm(len(whole))[: STEPS * BATCH].tolist())
    net = resnets.build("resnet8", 3, 10)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
    while True:
        net.train()
        for x, y in DataLoader(part, BATCH, shuffle=True, num_workers=2):
            logits = net(x)
            with torch.no_grad():
                soft_targets = F.softmax(teacher(x) / 4, 1)
            kl = F.kl_div(F.log_softmax(logits / 4, 1), soft_targets, reduction="batchmean")
            loss = 0.9 * 16 * kl + 0.1 * F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        yield


def of_steps(dataset: Dataset, folder: Path, rounds: int) -> Iterator[str]:
    images = dataset.train.at(torch.randperm(len(dataset.train))[: STEPS * BATCH])
    big = resnets.build("resnet56", 3, 10).eval().requires_grad_(False)
    seen = place(Normalised(copy.deepcopy(big), [0.5], [0.25]).eval(), CPU)
    arms = {
        "bare": bare(images),
        "cached logits": steps(images, distilled=True),
        "flip and shift": steps(images, distilled=False, flip=True, jitter=4),
        "flip and shift, live resnet56": steps(images, distilled=True, live=seen, flip=True, jitter=4),
        "naive": naive(folder, big, augment=False),
        "naive, augmented": naive(folder, big, augment=True),
    }
    times = interleaved({name: partial(timed, arm) for name, arm in arms.items()}, rounds)
    yield "| arm | ms a step | ms CPU |\n| --- | ---: | ---: |"
    for name, taken in times.items():
        yield f"| {name} | {quartiles([1e3 * t.wall for t in taken])} | {quartiles([1e3 * t.cpu for t in taken])} |"
    yield f"\nkd / bare: cached logits {ratio(times['cached logits'], times['bare'], by_wall)}, "
    yield f"flip and shift {ratio(times['flip and shift'], times['bare'], by_wall)}"
    yield f"naive / kd, CPU: {ratio(times['naive'], times['cached logits'], by_cpu)} (the teacher's one pass apart), "
    live = times["flip and shift, live resnet56"]
    yield f"augmented, both teachers live: {ratio(times['naive, augmented'], live, by_cpu)}\n"


def start(folder: Path, cache: str, threads: int) -> float:
    """In a process of its own: seconds to open a folder, imports apart."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=cache), mock.patch("kdcli.data.images.cores", return_value=threads):
        began = time.perf_counter()
        open_dataset(Data(folder=str(folder)))
        return time.perf_counter() - began


def of_starts(folder: Path) -> Iterator[str]:
    for threads in (1, cores()):
        with tempfile.TemporaryDirectory() as cache:
            words = [sys.executable, __file__, str(folder), "--start", cache, str(threads)]
            first, second = (float(subprocess.check_output(words, stderr=subprocess.DEVNULL)) for _ in range(2))
        yield f"Opening {folder} with {threads} thread(s): {first:.1f} s, the second time {second:.2f} s"


def of_memory() -> Iterator[str]:
    """Of `kd train-teacher` on arrays of random images in its cache, an MLP, one epoch."""
    for count in (100_000, 1_000_000):
        with tempfile.TemporaryDirectory(dir=".") as name:
            folder = Path(name)
            with mock.patch.dict(os.environ, XDG_CACHE_HOME=name):
                prepare(folder, count)
            words = [
                sys.executable,
                "-m",
                "kdcli",
                "train-teacher",
                str(folder / "big.yaml"),
                "--runs-dir",
                f"{name}/runs",
            ]
            variables = os.environ | {"XDG_CACHE_HOME": name}
            with subprocess.Popen(words, env=variables, stdout=subprocess.DEVNULL) as process:
                peak = 0
                while process.poll() is None:
                    peak = max(peak, anonymous(process.pid))
                    time.sleep(0.2)
            assert process.returncode == 0
        yield f"{count * 3072 / 1e9:.1f} GB of images: {peak / 1024:.0f} MB of anonymous memory at most"


def prepare(folder: Path, count: int) -> None:
    """The cache that kd would make of an .npz file of so many images, without holding them in memory."""
    (folder / "big.npz").write_bytes(b"stands for what was decoded")
    (folder / "big.yaml").write_text(
        "name: big\ndata: {arrays: big.npz}\n"
        "teacher: &net {model: {hidden: [16]}, train: {epochs: 1, batch_size: 1000, lr: 0.01}}\n"
        "student: *net\ndistill: {T: 4, lambda1: 0.9}\n"
    )

    def filled(_: Data, __: Path, ___: bool, out: Path) -> None:
        draws = np.random.default_rng(0)
        for name, n in (("x_train", count), ("x_test", 1_000)):
            array = np.lib.format.open_memmap(out / f"{name}.npy", "w+", np.uint8, (n, 3, 32, 32))
            for part in np.array_split(np.arange(n), n // 1_000):
                array[part] = draws.integers(0, 256, (len(part), 3, 32, 32), np.uint8)
            np.save(out / f"{name.replace('x', 'y')}.npy", np.arange(n) % 10)
        facts = FACTS.model_copy(update={"fingerprint": "0" * 64})
        cache.keep(out, {"facts": facts.model_dump(), "notes": []})

    with mock.patch.object(sources, "_decode", filled):
        open_dataset(Data(arrays=str((folder / "big.npz").absolute())))


def of_views(folder: Path, weights: Path, count: int, epochs: int) -> Iterator[str]:
    """Each with a pass over as many test images an epoch."""
    whole, seen = open_dataset(Data(folder=str(folder))), {"epochs": epochs, "lr": 0.05, "flip": True, "jitter": 4}
    taught = {"model": {"name": "resnet8"}, "train": seen}
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, XDG_CACHE_HOME=name):
        arrays = dict[str, Any]()
        for split, part, n in (("train", whole.train, count), ("test", whole.test, min(count, len(whole.test)))):
            index = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:n]
            arrays |= {f"x_{split}": part.images(index).numpy(), f"y_{split}": part.labels[index].numpy()}
        np.savez(f"{name}/part.npz", **arrays)
        data, places = {"arrays": f"{name}/part.npz"}, Places(Path(name, "runs"))
        mean = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        teacher = {"model": {"name": "resnet56"}, "weights": str(weights.absolute()), "input": mean}
        spent, errors = dict[int | None, list[float]](), dict[int | None, list[int]]()
        for views in (None, 8):
            sections = {"data": data, "teacher": teacher, "student": taught, "distill": {**SOFT, "views": views}}
            experiment = Experiment.model_validate({"name": "views", "seed": [0, 1, 2], **sections})
            jobs = plan([experiment], open_dataset(experiment.data))
            spent[views], errors[views] = [], []
            for job in (
                job
                for job in jobs
                if job.row.name == "teacher" and not places.runs_dir.joinpath(job.spec.name).is_dir()
            ):
                train(job.spec, places, lambda *_: None, print)
            for job in (job for job in jobs if job.row.name == "student"):
                before = cpu()
                train(job.spec, places, lambda *_: None, print)
                spent[views].append(cpu() - before)
                errors[views].append(places.open(job.spec.name).result().test.errors)
    yield f"resnet56 teaching resnet8, flip and shift, {count:,} images, {epochs} epochs:"
    for what, n in (("one student", 1), ("three, which share the views", 3)):
        live, kept = sum(spent[None][:n]), sum(spent[8][:n])
        yield f"{what}: {kept:.1f} s CPU with 8 views, asked for in them, {live:.1f} s live: {kept / live:.2f} x"
    fewer = [b - a for a, b in zip(errors[8], errors[None], strict=True)]
    yield f"errors {errors[8]} and {errors[None]}. {paired(fewer, 0, 0).sentence('Views', 'live')}"


def of_onnx(folder: Path, rounds: int) -> Iterator[str]:
    """The one from bytes to logits; the other on float batches that are ready."""
    import onnxruntime

    images = open_dataset(Data(folder=str(folder))).test.at(torch.arange(1_000))
    with tempfile.TemporaryDirectory() as name:
        file, net = Path(name, "net.onnx"), build(Model(name="resnet20"), FACTS).eval()
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            net,
            (torch.zeros(2, 3, 32, 32),),
            file,
            input_names=["x"],
            dynamic_shapes=(batch,),
            external_data=False,
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        teacher = imported(Origin(onnx=str(file)), None, FACTS).net
    ready = [images.inputs(index).numpy() for index in torch.arange(len(images)).split(100)]

    def alone() -> Iterator[object]:
        while True:
            yield [session.run(None, {"x": x}) for x in ready]

    def kds() -> Iterator[object]:
        while True:
            yield predict(teacher, images)

    arms: dict[str, Callable[[], Time]] = {"kd": partial(timed, kds()), "onnxruntime": partial(timed, alone())}
    found = interleaved(arms, rounds)
    times = ratio(found["kd"], found["onnxruntime"], by_wall)
    yield f"an imported ONNX teacher, 1,000 images: {times} x onnxruntime alone"


def anonymous(pid: int) -> int:
    """KiB of memory that are no pages of files; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=("steps", "starts", "memory", "views", "onnx"), help="left out: all of them")
    parser.add_argument("--teacher", type=Path, help="resnet56.th, of which views are kept")
    parser.add_argument("--images", type=int, default=1_000, help="of views")
    parser.add_argument("--epochs", type=int, default=60, help="of views")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.start:
        return print(start(arguments.folder, arguments.start[0], int(arguments.start[1])))
    folder = arguments.folder
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "steps": lambda: of_steps(open_dataset(Data(folder=str(folder))), folder, arguments.rounds),
        "starts": lambda: of_starts(folder),
        "memory": of_memory,
        "onnx": lambda: of_onnx(folder, arguments.rounds),
        "views": lambda: of_views(folder, arguments.teacher, arguments.images, arguments.epochs),
    }
    if not arguments.teacher:
        parts.pop("views")
    for part in [arguments.part] if arguments.part else parts:
        for line in parts[part]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
