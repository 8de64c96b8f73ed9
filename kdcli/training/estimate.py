"""How long trainings take on this machine, from a few timed steps of each kind."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from kdcli import code
from kdcli.config import AUGMENTATION, COUNTLESS
from kdcli.data.augment import different_views
from kdcli.data.dataset import Dataset, Split
from kdcli.machine import distributed
from kdcli.machine.device import place, seeded
from kdcli.runs.directory import Places
from kdcli.runs.spec import Spec
from kdcli.teachers.imports import imported
from kdcli.teachers.teacher import Teacher, predict
from kdcli.training.fit import fit

Times = tuple[float, float, float]
ENOUGH = 0.3  # seconds of steps that are timed


@distributed.alone()
@code.quiet()
def seconds(specs: Sequence[Spec], known: Sequence[Spec], dataset: Dataset, places: Places) -> dict[str, float]:
    """The seconds that the training of each spec takes, by name; `known` are the specs of their parents. Kinds that
    differ in the numbers of a recipe alone are timed once."""
    torch.set_num_threads(places.threads)
    by_name, timed, found = {spec.name: spec for spec in known}, dict[str, Times](), {}
    asked = set[str]()
    for spec in (s for s in specs if s.model and s.train):
        model, train = spec.trained
        live = spec.distill and train.augmented
        taught_by = _members(by_name, places, spec.parents[0]) if live else []
        teachers = [s for s in taught_by if s.model or (s.origin and s.origin.onnx and Path(s.origin.onnx).is_file())]
        how = train.model_dump(include={"batch_size", "optimizer", "ema", *COUNTLESS})
        asks = spec.distill and (bool(spec.distill.views), spec.distill.loss)
        kind = repr((model, spec.origin, how, train.augmented, asks, [(s.model, s.origin) for s in teachers]))
        if kind not in timed:
            timed[kind] = _timed(spec, teachers, dataset, torch.device(places.device))
        a_step, an_image, a_view = timed[kind]
        images, tested = len(dataset.seen(spec)), len(dataset.test)
        tests = -(-train.epochs // train.tested_every(images, tested))
        found[spec.name] = train.epochs * train.steps(images) * a_step + tests * tested * an_image
        views = min(spec.distill.views or 0, different_views(train)) if spec.distill else 0
        whole = images if train.mixup else len(dataset.train) + len(dataset.unlabelled or ())
        own = spec.omitted if train.mixup else None  # blends no image that the student does not see
        kept = repr((spec.parents, views, train.model_dump(include={*AUGMENTATION}), whole, own))
        if kept not in asked:  # once for all that learn from this teacher on these images
            found[spec.name] += views * whole * a_view
            asked.add(kept)
    return found


def _members(planned: dict[str, Spec], places: Places, name: str) -> list[Spec]:
    """The spec of a run that is planned or there, or those of an ensemble's members."""
    spec = planned[name] if name in planned else places.open(name).spec
    if spec.command != "ensemble":
        return [spec]
    return [member for parent in spec.parents for member in _members(planned, places, parent)]


def _timed(spec: Spec, teachers: Sequence[Spec], dataset: Dataset, device: torch.device) -> Times:
    """Seconds of a step; of an image that errors are counted on; and of a view that is kept."""
    train = spec.trained[1]
    batch = min(train.batch_size, len(dataset.seen(spec)))
    images = dataset.train.at(torch.zeros(batch, dtype=torch.int64)).to(device)
    short = train.model_copy(update={"epochs": 1, "batch_size": batch, "warmup": 0.0, "milestones": [1]})
    logits = torch.zeros(1, batch, len(dataset.facts.classes), device=device)
    with seeded(0, "estimate"):
        made = (imported(s.origin, s.model, dataset.facts, load=False).net for s in (spec, *teachers))
        net, *nets = (place(one, device) for one in made)
        nets = [one.eval().requires_grad_(False) for one in nets]
        live = Teacher(lambda _, x: torch.stack([teacher(x) for teacher in nets]))
        asked = nets if spec.distill and spec.distill.views else []
        teacher = live if nets and not asked else Teacher(lambda index, _: logits[:, index])
        times = list[float]()
        while len(times) < 2 or (sum(times) < ENOUGH and len(times) < 30):  # the first one warms up
            start = time.perf_counter()
            next(fit(net, images, short, 0, teacher=teacher if spec.distill else None, distill=spec.distill))
            times.append(time.perf_counter() - start)
        _an_image(asked, images)  # the first one warms up
        return sorted(times[1:])[len(times) // 2 - 1], _an_image([net], images), _an_image(asked, images)


def _an_image(nets: Sequence[nn.Module], images: Split) -> float:
    """Seconds in which nets classify an image."""
    start = time.perf_counter()
    for net in nets:
        predict(net, images).cpu()
    return (time.perf_counter() - start) / len(images)


def cheaper(specs: Sequence[Spec], dataset: Dataset) -> str:
    """What to say where the teacher of a training is asked live and kept views would ask it half as often or less, or
    the other way round; else empty."""
    for spec in (s for s in specs if s.distill and s.trained[1].augmented):
        train, images = spec.trained[1], len(dataset.transfer_set(spec.omitted, spec.data.transfer))
        views, k = spec.distill.views if spec.distill else None, int(min(8, different_views(train)))
        live = sum(other.trained[1].epochs for other in specs if other.parents == spec.parents)
        if views and 2 * live <= (kept := min(views, different_views(train))):
            return f"distill.views asks the teacher about {kept} views of every image; without it, in {live} passes"
        if not views and not train.mixup and 2 * k * len(dataset.train) <= train.epochs * images:
            every = f"the teacher is asked about every image in every epoch, {train.epochs} passes"
            return f"{every}; --set distill.views={k} would keep {k} views of each: {k} passes"
    return ""
