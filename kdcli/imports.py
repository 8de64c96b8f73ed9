"""Teachers that were trained elsewhere: what they are, read and checked."""

from collections.abc import Iterator

from kdcli.config import Model, Origin, TeacherSection
from kdcli.runs import Facts


def resolved(origin: Origin, model: Model | None) -> tuple[Origin, str]:
    """An origin with all that its file or its library says of its inputs; and the content that it is told by."""
    raise NotImplementedError


def problems(key: str, teacher: TeacherSection, facts: Facts) -> Iterator[tuple[str, str]]:
    """What keeps a teacher that was trained elsewhere from classifying the images of a dataset, by key."""
    yield from ()
