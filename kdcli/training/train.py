"""One spec to one finished run: a function that needs nothing but its arguments, so that any engine can call it."""

import contextlib
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kdcli import BadInput, Note, code, failure, losses, score
from kdcli.config import Average, Origin, Train
from kdcli.data.augment import Fixed
from kdcli.data.dataset import Dataset, Split
from kdcli.machine import distributed
from kdcli.machine.device import place, seeded, select_device
from kdcli.runs.directory import ONNX, Diverged, Places, Run, State, write_aside
from kdcli.runs.spec import STUDENTS, Brief, Correction, Counted, Epoch, Gain, Reading, Result, Spec
from kdcli.teachers import misread
from kdcli.teachers.imports import answers, imported, resolved
from kdcli.teachers.kept import kept_views
from kdcli.teachers.teacher import Teacher, cached, dataset_of, kept_logits, live, members, predict, weights_checksum
from kdcli.training.fit import Fitted, fit, learning_rate

Tell = Callable[[str, int, Epoch], None]  # (run, epochs in all, the epoch that is finished)


@code.quiet()
def train(spec: Spec, places: Places, tell: Tell, note: Note) -> None:
    """Train the net of a spec, or combine an ensemble, and write its run directory; continue where it was interrupted.

    Raises BadInput when the images or a parent are not those of the spec, or another process is at it; Diverged when
    the loss is not finite. What somebody's own code prints goes to stderr.
    """
    torch.set_num_threads(places.threads)
    run, device = Run(places.runs_dir, spec), select_device(places.device)
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parents = {name: weights_checksum(places.open(name)) for name in spec.parents}
    dataset = dataset_of(run, places.data_dir)
    own_code, own_loss = spec.model.file if spec.model else "", spec.distill.file if spec.distill else ""
    for file, content in ((own_code, spec.code), (own_loss, spec.loss_code)):
        if file and not code.unchanged(f"{file}:", content):
            raise BadInput(f"{file}: has changed since {run.name} was planned: ask again")
    about: dict[str, Any] = {"run": run.name, "device": shown, "threads": places.threads, "parents": parents}
    about |= spec.model_dump(include={"command", "experiment", "seed", "omitted"})
    about["evaluated_on"] = "test images" if spec.data.evaluate_on == "test" else "held-out training images"
    if spec.origin and resolved(spec.origin, spec.model)[1] != spec.content:
        raise BadInput(f"{spec.origin.file}: has changed since {run.name} was planned: ask again")
    with run.writing(shown, places.threads, parents), code.blaming(own_code), code.blaming(own_loss):
        if spec.command == "ensemble":
            found = _combined(run, dataset)
        elif not spec.train:
            found = _imported(run, dataset, device, note)
        else:
            distributed.same(lambda: (spec, places))
            found = _trained(run, dataset, places, device, tell, note)
        run.finish(Result(**about, **found))


@code.quiet()
def take_part(spec: Spec, places: Places) -> None:
    """Do this process's share of a training that the first of several processes is at, and write nothing."""
    torch.set_num_threads(places.threads)
    if places.device not in ("cpu", "cuda:0"):
        raise BadInput(f"--device {places.device}: torchrun's processes have a GPU each: use --device cuda")
    device = select_device("cpu" if places.device == "cpu" else f"cuda:{distributed.LOCAL_RANK}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    run = Run(places.runs_dir, spec)
    begun = _begin(run, dataset_of(run, places.data_dir), places, device, lambda _: None)
    with contextlib.suppress(Diverged):  # in all processes alike
        for _ in begun.epochs:
            pass


def together(command: Callable[[], int]) -> int:
    """A command under torchrun: the first process does it, the others take part in what it trains. Where one fails
    torchrun ends them all."""
    if distributed.RANK == 0:
        if not (exit_code := command()):
            distributed.same(list[Any])
        return exit_code
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to put in order
    try:
        while told := distributed.same(list[Any]):
            take_part(*told)
    except Exception as error:
        print(f"kd: failed: process {distributed.RANK}: {failure(error)}", file=sys.stderr)
        return 1
    return 0


class _Begun(NamedTuple):
    """A training: what was said of the weights it starts from, its images, with labels and without, and its epochs."""

    said: list[str]
    samples: int
    unlabelled: int
    epochs: Iterator[tuple[Epoch, Fitted]]


def _begin(run: Run, dataset: Dataset, places: Places, device: torch.device, note: Note) -> _Begun:
    spec, (model, how), facts = run.spec, run.spec.trained, dataset.facts
    transfer = dataset.transfer_set(spec.omitted, spec.data.transfer)
    images, test = dataset.seen(spec).to(device), dataset.test.to(device)
    teacher = _teacher(places.open(spec.parents[0]), spec, dataset, transfer, device, note) if spec.distill else None
    # A student of its teacher's shape must not start from its teacher's initial weights; it shares its baseline's.
    stream = 2 * spec.seed + (spec.command in STUDENTS)
    with seeded(stream, "init"):
        read = imported(spec.origin, model, facts)
    for line in read.said:
        note(f"{run.name}: {line}")
    net = place(read.net, device)
    start = distributed.same(lambda: run.load_state(note))
    before = distributed.same(lambda: run.metrics()[-1].seconds if start.epochs else 0.0)
    if start.epochs:
        note(f"{run.name}: continued after epoch {start.epochs}")
    epochs = fit(net, images, how, stream, teacher=teacher, distill=spec.distill, start=start)
    counted = _counted(epochs, how, len(images), test, before)
    return _Begun(read.said, len(transfer), len(images) - len(transfer), counted)


def _trained(
    run: Run, dataset: Dataset, places: Places, device: torch.device, tell: Tell, note: Note
) -> dict[str, Any]:
    """Train a net, keep its weights and logits, and count its errors. The last epoch counts, whatever came before."""
    begun, (_, how) = _begin(run, dataset, places, device, note), run.spec.trained
    saved = time.perf_counter()
    with run.tensorboard() as show:
        for epoch, fitted in begun.epochs:
            run.log(epoch)
            show(epoch)
            if time.perf_counter() - saved >= places.save_every and epoch.epoch < how.epochs:
                run.save_state(State(epoch.epoch, fitted.state()))
                saved = time.perf_counter()
            tell(run.name, how.epochs, epoch)
    found = _kept(run, fitted.net, dataset, device, note)
    found |= {"reading": Reading(said=begun.said)} if run.spec.origin else {}
    found |= {"samples": begun.samples, "unlabelled": begun.unlabelled or None}
    return found | {"seconds": epoch.seconds, "last_epoch": epoch}


def _teacher(
    source: Run, spec: Spec, dataset: Dataset, transfer: torch.Tensor, device: torch.device, note: Note
) -> Teacher:
    """Cached logits; or, where a student sees each image in many views, those of fixed views or the nets themselves."""
    (_, how), distill, facts, n = spec.trained, spec.distill, dataset.facts, len(dataset.train)
    extra = dataset.unlabelled
    if not how.augmented:
        return cached(source, transfer, n, device, extra.to(device) if extra else None)
    if not (distill and distill.views):
        return replace(said := live(source, device), logits=distributed.asked(said.logits))
    whole, positions, key = dataset.train, transfer, f"{facts.fingerprint} {facts.unlabelled}"
    if how.mixup:  # blends no image that the student does not see
        whole, key = dataset.seen(spec), f"{key} {hashlib.sha256(transfer.numpy().tobytes()).hexdigest()}"
        positions = torch.arange(len(whole))
    elif extra:
        whole, positions = whole.followed_by(extra), torch.cat([transfer, torch.arange(n, n + len(extra))])
    fixed = Fixed(how, distill.views, len(whole), positions)
    return kept_views(source, whole, key, fixed, distill.half, device, note)


def _counted(
    epochs: Iterable[Fitted], how: Train, images: int, test: Split, before: float
) -> Iterator[tuple[Epoch, Fitted]]:
    """Each epoch of a training on so many images, `before` seconds of which came before a continuation; the errors on
    the test images after some of them, and after the last. Raises Diverged where the loss, or what the net says then,
    is not finite."""
    steps, every = how.steps(images), how.tested_every(images, len(test))
    began = last = time.perf_counter()
    for fitted in epochs:
        now = time.perf_counter()
        asked = fitted.epoch % every == 0 or fitted.epoch == how.epochs
        logits = predict(fitted.net, test) if asked else None
        if fitted.diverged_at is not None or (logits is not None and not bool(logits.isfinite().all())):
            step = fitted.epoch * steps - 1 if fitted.diverged_at is None else fitted.diverged_at
            raise Diverged(
                f"diverged at step {step + 1} (epoch {step // steps + 1}), at a learning rate of "
                f"{learning_rate(how, step, steps):.3g}: lower the lr of {how.lr:g}, or add a warmup"
            )
        means = {key: getattr(fitted, key) for key in ("epoch", "loss", "hard_loss", "t2_kl", "soft", "train_errors")}
        errors = None if logits is None else score.count_errors(logits, test.labels).errors
        seconds, speed = round(before + now - began, 3), round(images / (now - last))
        yield Epoch(**means, test_errors=errors, seconds=seconds, images_per_s=speed), fitted
        last = time.perf_counter()


def _kept(run: Run, net: nn.Module, dataset: Dataset, device: torch.device, note: Note) -> dict[str, Any]:
    """Keep the weights and the logits of a trained net; what is counted on the test images."""
    spec, guessing = run.spec, score.errors_of_guessing(dataset.test.labels)
    run.save("weights", net.state_dict())
    asked = {"test": dataset.test}
    if spec.omitted or spec.command == "train-teacher":
        asked["train"] = dataset.train
    logits = {name: predict(net, split.to(device)).cpu() for name, split in asked.items()}
    run.save("logits", logits)
    test = score.count_errors(logits["test"], dataset.test.labels)
    found: dict[str, Any] = {"test": test}
    if spec.omitted:
        found["bias"] = _corrections(logits, dataset, spec.omitted)
    elif test.errors >= guessing:
        found["warning"] = (
            f"is no better than guessing, which makes {guessing:,} errors: train it longer, or at another lr"
        )
        note(f"{run.name}: {test.errors:,} errors of {test.total:,}: {found['warning']}")
    return found


def _imported(run: Run, dataset: Dataset, device: torch.device, note: Note) -> dict[str, Any]:
    """Keep a teacher that was trained elsewhere, as it is: its weights or its file, and its logits."""
    spec, began, net = run.spec, time.perf_counter(), None
    origin, labels = spec.origin or Origin(), dataset.test.labels
    if origin.logits:
        logits, said = answers(origin, dataset)
    else:
        read = imported(origin, spec.model, dataset.facts)
        said, net = read.said, place(read.net, device).eval()
        splits = {"train": dataset.train, "test": dataset.test}
        logits = {name: predict(net, split.to(device)).cpu() for name, split in splits.items()}
    if origin.onnx:
        write_aside(run.path / ONNX, Path(origin.onnx).read_bytes())
    if bad := next((name for name, z in logits.items() if not bool(z.isfinite().all())), None):
        raise BadInput(f"{origin.file or run.name}: gives logits of {bad} images that are not finite")
    run.save("weights", net.state_dict() if net else {})
    run.save("logits", logits)
    read_as = misread.reading(net, logits["train"], dataset, origin, said)
    for line in read_as.said:
        note(f"{run.name}: {line}")
    test = (
        score.count_errors(logits["test"], labels)
        if "test" in logits
        else Counted(errors=0, total=0, per_class_errors=[])
    )
    return {"test": test, "reading": read_as, "seconds": time.perf_counter() - began}


def _corrections(logits: dict[str, torch.Tensor], data: Dataset, omitted: list[str]) -> dict[str, Correction]:
    """The bias correction chosen on the test set (the paper's way), on the held-out images, and by the class prior."""
    train, test, held, absent = data.train.labels, data.test.labels, data.heldout, data.numbers(omitted)
    classes: list[int] = absent.tolist()
    shifts = {
        "test": score.fewest_errors_shift(logits["test"], test, classes),
        "heldout": score.fewest_errors_shift(logits["train"][held], train[held], classes),
        "prior": score.prior_shift(logits["train"], classes, float(torch.isin(train, absent).double().mean())),
    }
    found = {}
    for name, shift in shifts.items():
        counted = score.count_errors(score.shift_bias(logits["test"], classes, shift), test)
        found[name] = Correction(shift=shift, errors=counted.errors, per_class_errors=counted.per_class_errors)
    return found


def _combined(run: Run, dataset: Dataset) -> dict[str, Any]:
    """Both averages of an ensemble's members, and by how many errors the chosen one beats them."""
    spec, labels, found = run.spec, dataset.test.labels, [member.result() for member in members(run)]
    if silent := [member.run for member in found if not member.test.total]:
        raise BadInput(f"{silent[0]}: has no answers for the test images, on which an ensemble is judged: leave it out")
    logits = kept_logits(run, "test", len(labels))
    how: tuple[Average, ...] = ("arithmetic", "geometric")
    averages = {a: score.count_errors(losses.average(logits, 1.0, a, spec.weights), labels) for a in how}
    test, errors = averages[spec.average], [member.test.errors for member in found]
    gain = Gain(best_member=min(errors) - test.errors, mean_member=sum(errors) / len(errors) - test.errors)
    return {
        "seconds": sum(member.seconds for member in found),
        "test": test,
        "average": spec.average,
        "averages": averages,
        "members": [Brief(run=m.run, errors=m.test.errors, seed=m.seed) for m in found],
        "fewer_errors_than": gain,
    }
