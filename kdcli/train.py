"""One spec to one finished run: a function that needs nothing but its arguments, so that any engine can call it."""

import math
import time
from collections.abc import Callable

import torch
import yaml
from torch import nn

from kdcli import BadInput, code, losses, score
from kdcli.config import Average, Train
from kdcli.data import Dataset, Split, open_dataset
from kdcli.device import place, seeded, select_device
from kdcli.fit import Fitted, fit, learning_rate
from kdcli.models import build
from kdcli.runs import STUDENTS, Brief, Correction, Epoch, Gain, Places, Result, Run, Spec, State
from kdcli.teacher import Teacher, cached, kept_logits, live, members, predict, weights_checksum

Tell = Callable[[str, int, Epoch], None]  # (run, epochs in all, the epoch that is finished)
Note = Callable[[str], None]


@code.quiet()
def train(spec: Spec, places: Places, tell: Tell, note: Note) -> Result:
    """Train the net of a spec, or combine an ensemble, and write its run directory; continue where it was interrupted.

    Raises BadInput when the images or a parent are not those of the spec, or another process is at it; RuntimeError
    when the training diverges. What somebody's own code prints goes to stderr.
    """
    torch.set_num_threads(places.threads)
    run, device = Run(places.runs_dir, spec), select_device(places.device)
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parents = {name: weights_checksum(places.open(name)) for name in spec.parents}
    dataset = open_dataset(spec.data, places.data_dir)
    if dataset.facts.fingerprint != spec.dataset.fingerprint:
        raise BadInput(f"{run.name}: the images are no longer those that it was planned with: start again")
    own_code = spec.model.file if spec.model else ""
    with run.writing(shown, places.threads, parents), code.blaming(own_code):
        if spec.command == "ensemble":
            result = _combine(run, dataset)
        else:
            result = _Training(run, dataset, places, device, tell, note).result()
        result = result.model_copy(update={"device": shown, "threads": places.threads, "parents": parents})
        return run.finish(result, _report(run, result))


class _Training:
    """The training of one net."""

    def __init__(
        self, run: Run, dataset: Dataset, places: Places, device: torch.device, tell: Tell, note: Note
    ) -> None:
        self.run, self.dataset, self.places, self.device = run, dataset, places, device
        self.tell, self.note = tell, note
        self.train, self.test = run.spec.trained[1], dataset.test.to(device)

    def result(self) -> Result:
        """Train the net, keep its weights and logits, and count its errors. The last epoch counts, whatever came
        before."""
        spec, data = self.run.spec, self.dataset
        transfer = data.transfer_set(spec.omitted, spec.data.transfer)
        whole = len(transfer) == len(data.train)
        transfer_set = (data.train if whole else data.train.at(transfer)).to(self.device)
        teacher = self._teacher(transfer) if spec.distill else None
        net, last = self._fit(transfer_set, teacher)
        self.run.save("weights", net.state_dict())
        logits = {"test": predict(net, self.test).cpu()}
        if spec.omitted or spec.command == "train-teacher":
            logits["train"] = predict(net, data.train.to(self.device)).cpu()
        self.run.save("logits", logits)
        test = score.count_errors(logits["test"], data.test.labels)
        guessing = score.errors_of_guessing(data.test.labels)
        warning = None
        if test.errors >= guessing and not spec.omitted:
            warning = f"is no better than guessing, which makes {guessing:,} errors: try a lower lr"
            self.note(f"{self.run.name}: {test.errors:,} errors of {test.total:,}: {warning}")
        return Result(
            **self.run.head(),
            seconds=last.seconds,
            evaluated_on="test images" if spec.data.evaluate_on == "test" else "held-out training images",
            test=test,
            samples=len(transfer_set),
            last_epoch=last,
            warning=warning,
            omitted=spec.omitted,
            bias=_corrections(logits, data, spec.omitted) if spec.omitted else {},
        )

    def _teacher(self, transfer: torch.Tensor) -> Teacher:
        """Cached logits, or the nets themselves where students see the images shifted."""
        source = self.places.open(self.run.spec.parents[0])
        if self.train.augmented:
            return live(source, self.device)
        return cached(source, transfer, len(self.dataset.train), self.device)

    def _fit(self, transfer_set: Split, teacher: Teacher | None) -> tuple[nn.Module, Epoch]:
        """Train, log every epoch and save the state now and then; the net to keep, and the last epoch."""
        spec, run, facts = self.run.spec, self.run, self.dataset.facts
        # A student of its teacher's shape must not start from its teacher's initial weights; it shares its baseline's.
        stream = 2 * spec.seed + (spec.command in STUDENTS)
        with seeded(stream, "init"):
            net = place(build(spec.trained[0], facts), self.device)
        start = run.load_state(self.note)
        before = run.metrics()[start.epochs - 1].seconds if start.epochs else 0.0
        if start.epochs:
            self.note(f"{run.name}: continued after epoch {start.epochs}")
        began = last_save = last_epoch = time.perf_counter()
        with run.logging() as log:
            epochs = fit(net, transfer_set, self.train, stream, teacher=teacher, distill=spec.distill, start=start)
            for fitted in epochs:
                seconds = round(before + time.perf_counter() - began, 3)
                speed = round(len(transfer_set) / (time.perf_counter() - last_epoch))
                epoch = self._counted(fitted, seconds, speed, math.ceil(len(transfer_set) / self.train.batch_size))
                log(epoch)
                self.tell(run.name, self.train.epochs, epoch)
                if time.perf_counter() - last_save >= self.places.save_every and epoch.epoch < self.train.epochs:
                    run.save_state(State(epoch.epoch, fitted.state()))
                    last_save = time.perf_counter()
                last_epoch = time.perf_counter()
        return fitted.net, epoch

    def _counted(self, fitted: Fitted, seconds: float, speed: int, steps: int) -> Epoch:
        """The epoch with its errors on the test images. Raises RuntimeError, and says so in the run, where the loss or
        what the net says now is not finite."""
        logits = predict(fitted.net, self.test)
        if fitted.diverged_at is not None or not bool(logits.isfinite().all()):
            step = fitted.epoch * steps - 1 if fitted.diverged_at is None else fitted.diverged_at
            error = _divergence(self.train, step, steps)
            self.run.end("diverged", error)
            raise RuntimeError(error)
        return Epoch(
            epoch=fitted.epoch,
            loss=fitted.loss,
            hard_loss=fitted.hard_loss,
            t2_kl=fitted.t2_kl,
            train_errors=fitted.train_errors,
            test_errors=score.count_errors(logits, self.test.labels).errors,
            seconds=seconds,
            images_per_s=speed,
        )


def _divergence(train: Train, step: int, steps: int) -> str:
    """What to say of a training whose loss was not finite at a step."""
    return (
        f"diverged at step {step + 1} (epoch {step // steps + 1}), at a learning rate of "
        f"{learning_rate(train, step, steps):.3g}: lower the lr of {train.lr:g}, or let it rise over a warmup"
    )


def _corrections(logits: dict[str, torch.Tensor], data: Dataset, omitted: list[str]) -> dict[str, Correction]:
    """The bias correction chosen on the test set (the paper's way), on the held-out images, and by the class prior."""
    train, test, held, absent = data.train.labels, data.test.labels, data.heldout, data.numbers(omitted)
    classes: list[int] = absent.tolist()
    shifts = {
        "test": score.fewest_errors_shift(logits["test"], test, classes),
        "heldout": score.fewest_errors_shift(logits["train"][held], train[held], classes),
        "prior": score.prior_shift(logits["train"], classes, float(torch.isin(train, absent).double().mean())),
    }

    def corrected(shift: float) -> Correction:
        counted = score.count_errors(score.shift_bias(logits["test"], classes, shift), test)
        return Correction(shift=shift, errors=counted.errors, per_class_errors=counted.per_class_errors)

    return {name: corrected(shift) for name, shift in shifts.items()}


def _combine(run: Run, dataset: Dataset) -> Result:
    """Both averages of an ensemble's members, and by how many errors the chosen one beats them."""
    spec, labels, found = run.spec, dataset.test.labels, [member.result() for member in members(run)]
    logits = kept_logits(run, "test", len(labels))
    how: tuple[Average, ...] = ("arithmetic", "geometric")
    averages = {a: score.count_errors(losses.average(logits, 1.0, a), labels) for a in how}
    test, errors = averages[spec.average], [member.test.errors for member in found]
    gain = Gain(best_member=min(errors) - test.errors, mean_member=sum(errors) / len(errors) - test.errors)
    return Result(
        **run.head(),
        seconds=sum(member.seconds for member in found),
        evaluated_on=found[0].evaluated_on,
        test=test,
        average=spec.average,
        averages={how: averages[how] for how in averages},
        members=[Brief(run=m.run, errors=m.test.errors, seed=m.seed) for m in found],
        fewer_errors_than=gain,
    )


def _report(run: Run, result: Result) -> str:
    """report.md: what the run is and what came out, for a reader."""
    test, classes = result.test, run.spec.dataset.classes
    worst = sorted(zip(test.per_class_errors, classes, strict=True), key=lambda pair: -pair[0])[:12]
    settings = run.spec.model_dump(exclude_defaults=True, exclude={"dataset"})
    lines = [
        f"# {run.name}",
        f"{test.errors} errors on {test.total} {result.evaluated_on}; by class, most first: "
        + ", ".join(f"{name} {errors}" for errors, name in worst),
        f"Trained in {result.seconds:.0f} s on {result.device}.",
        *[f"Learned from {parent}." for parent in run.spec.parents],
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
    ]
    return "\n\n".join(lines) + "\n"
