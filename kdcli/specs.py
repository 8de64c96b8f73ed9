"""What each run is: its settings, seed and parents, as the experiment file says."""

from collections.abc import Sequence
from typing import Any

from kdcli import BadInput
from kdcli.config import Data, Experiment, Model, Omission, Section, Train
from kdcli.runs import Document, Run, Spec


def data_settings(data: Data) -> Document:
    """The settings that a training depends on: the held-out images only where they are not trained on."""
    return data.model_dump(exclude={"transfer"} if data.evaluate_on == "heldout" else {"heldout", "transfer"})


def _student_settings(experiment: Experiment, train: Train, **more: Any) -> Document:
    if experiment.data.transfer is not None:
        more["transfer"] = experiment.data.transfer
    return _settings(experiment, experiment.student.model, train, **more)


def _settings(experiment: Experiment, model: Model, train: Train, **more: Any) -> Document:
    def dump(section: Section) -> Document:
        return section.model_dump(exclude_none=True)

    return {"data": data_settings(experiment.data), "model": dump(model), "train": dump(train), **more}


def teacher_spec(experiment: Experiment, seed: int, model: Model | None = None) -> Spec:
    settings = _settings(experiment, model or experiment.teacher.model, experiment.teacher.train)
    return Spec(experiment.name, "train-teacher", seed, settings)


def member_specs(experiment: Experiment, seed: int) -> list[Spec]:
    """The members of the ensemble with this seed. Raises BadInput when the experiment has no ensemble section."""
    if experiment.ensemble is None:
        raise BadInput("ensemble: the experiment has no such section: add `ensemble: {members: 5}` or --members 5")
    models = experiment.ensemble.models or [experiment.teacher.model]
    return [teacher_spec(experiment, seed + i, models[i % len(models)]) for i in range(experiment.ensemble.members)]


def ensemble_spec(experiment: Experiment, seed: int, members: Sequence[Spec] = ()) -> Spec:
    """The ensemble of these members, or of the teachers with this seed and the next ones."""
    members = members or member_specs(experiment, seed)
    assert experiment.ensemble is not None
    settings = {"data": data_settings(experiment.data), "average": experiment.ensemble.average}
    return Spec(experiment.name, "ensemble", seed, settings, tuple(member.name for member in members))


def baseline_spec(experiment: Experiment, seed: int) -> Spec:
    train = experiment.baseline.train or experiment.student.train
    return Spec(experiment.name, "baseline", seed, _student_settings(experiment, train))


def student_spec(experiment: Experiment, seed: int, teacher: Run) -> Spec:
    loss = experiment.distill.model_dump(exclude={"teacher"})
    settings = _student_settings(experiment, experiment.student.train, distill=loss)
    return Spec(experiment.name, "distill", seed, settings, (teacher.name,))


def omission_spec(experiment: Experiment, seed: int, teacher: Run, entry: Omission) -> Spec:
    loss = experiment.distill.model_dump(exclude={"teacher"})
    settings = _student_settings(
        experiment,
        entry.train or experiment.student.train,
        distill=loss,
        omitted=entry.omitted,
        heldout=experiment.data.heldout,
    )
    return Spec(experiment.name, "omit-classes", seed, settings, (teacher.name,))
