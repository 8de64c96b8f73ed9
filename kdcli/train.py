"""One spec to one finished run: a function that needs nothing but its arguments, so that any engine can call it."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from kdcli import code, losses, score
from kdcli.config import Average, Train
from kdcli.data import Dataset, Split
from kdcli.device import place, seeded, select_device
from kdcli.fit import Fitted, fit, learning_rate
from kdcli.models import build
from kdcli.runs import STUDENTS, Brief, Correction, Diverged, Epoch, Gain, Places, Result, Run, Spec, State
from kdcli.teacher import cached, dataset_of, kept_logits, live, members, predict, weights_checksum

Tell = Callable[[str, int, Epoch], None]  # (run, epochs in all, the epoch that is finished)
Note = Callable[[str], None]


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
    own_code = spec.model.file if spec.model else ""
    about: dict[str, Any] = {"run": run.name, "device": shown, "threads": places.threads, "parents": parents}
    about |= spec.model_dump(include={"command", "experiment", "seed", "omitted"})
    about["evaluated_on"] = "test images" if spec.data.evaluate_on == "test" else "held-out training images"
    with run.writing(shown, places.threads, parents), code.blaming(own_code):
        if spec.command == "ensemble":
            found = _combined(run, dataset)
        else:
            found = _trained(run, dataset, places, device, tell, note)
        run.finish(Result(**about, **found))


def _trained(
    run: Run, dataset: Dataset, places: Places, device: torch.device, tell: Tell, note: Note
) -> dict[str, Any]:
    """Train a net, keep its weights and logits, and count its errors. The last epoch counts, whatever came before."""
    spec, (model, how), facts = run.spec, run.spec.trained, dataset.facts
    transfer = dataset.transfer_set(spec.omitted, spec.data.transfer)
    images, test = dataset.seen(spec).to(device), dataset.test.to(device)
    extra = images.at(torch.arange(len(transfer), len(images), device=device))
    teacher = None
    if spec.distill:  # cached logits, or the nets themselves where students see each image in many views
        source = places.open(spec.parents[0])
        teacher = live(source, device) if how.augmented else cached(source, transfer, len(dataset.train), device, extra)
    # A student of its teacher's shape must not start from its teacher's initial weights; it shares its baseline's.
    stream = 2 * spec.seed + (spec.command in STUDENTS)
    with seeded(stream, "init"):
        net = place(build(model, facts), device)
    start, saved = run.load_state(note), time.perf_counter()
    before = run.metrics()[-1].seconds if start.epochs else 0.0
    if start.epochs:
        note(f"{run.name}: continued after epoch {start.epochs}")
    epochs = fit(net, images, how, stream, teacher=teacher, distill=spec.distill, start=start)
    with run.tensorboard() as show:
        for epoch, fitted in _counted(epochs, how, len(images), test, before):
            run.log(epoch)
            show(epoch)
            tell(run.name, how.epochs, epoch)
            if time.perf_counter() - saved >= places.save_every and epoch.epoch < how.epochs:
                run.save_state(State(epoch.epoch, fitted.state()))
                saved = time.perf_counter()
    kept = _kept(run, fitted.net, dataset, device, note)
    samples = {"samples": len(transfer), "unlabelled": len(extra) or None}
    return kept | samples | {"seconds": epoch.seconds, "last_epoch": epoch}


def _counted(
    epochs: Iterable[Fitted], how: Train, images: int, test: Split, before: float
) -> Iterator[tuple[Epoch, Fitted]]:
    """Each epoch of a training on so many images, `before` seconds of which came before a continuation, with its errors
    on the test images. Raises Diverged where the loss, or what the net says now, is not finite."""
    steps = how.steps(images)
    began = last = time.perf_counter()
    for fitted in epochs:
        now = time.perf_counter()
        logits = predict(fitted.net, test)
        if fitted.diverged_at is not None or not bool(logits.isfinite().all()):
            step = fitted.epoch * steps - 1 if fitted.diverged_at is None else fitted.diverged_at
            raise Diverged(
                f"diverged at step {step + 1} (epoch {step // steps + 1}), at a learning rate of "
                f"{learning_rate(how, step, steps):.3g}: lower the lr of {how.lr:g}, or let it rise over a warmup"
            )
        means = {key: getattr(fitted, key) for key in ("epoch", "loss", "hard_loss", "t2_kl", "train_errors")}
        errors = score.count_errors(logits, test.labels).errors
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
    logits = kept_logits(run, "test", len(labels))
    how: tuple[Average, ...] = ("arithmetic", "geometric")
    averages = {a: score.count_errors(losses.average(logits, 1.0, a), labels) for a in how}
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
