from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OWN_NETS, TINY

from kdcli import BadInput, plan, yamlfile
from kdcli.config import Data, Experiment
from kdcli.data.dataset import Dataset, Split, open_dataset
from kdcli.plan import Job
from kdcli.runs.directory import Places, Run
from kdcli.runs.spec import Facts
from kdcli.yamlfile import parse_set

DIGITS = open_dataset(Data(name="digits", heldout=200))


def colours(names: tuple[str, ...] = ("cat", "dog", "cow"), each: int = 20, fingerprint: str = "c0") -> Dataset:
    """`each` images of 6 x 9 coloured pixels of every class."""
    labels = torch.arange(len(names)).repeat(each)
    split = Split(torch.zeros(len(labels), 3, 6, 9, dtype=torch.uint8), labels, 255)
    facts = Facts(fingerprint=fingerprint, classes=list(names), shape=[3, 6, 9], white=255)
    return Dataset(split, split, max(len(labels) // 10, len(names)), facts)


def described(folder: Path, text: str = TINY, *sets: str) -> list[Experiment]:
    path = folder / "f.yaml"
    path.write_text(text)
    return [point.experiment for point in yamlfile.points(str(path), [parse_set(s) for s in sets])]


def names(jobs: list[Job], row: str) -> list[str]:
    return [job.spec.name for job in jobs if job.row.name == row]


@pytest.fixture(scope="module")
def digits() -> list[Job]:
    """The jobs of digits.yaml: seeds 0 to 4, ensembles of 5, two omissions."""
    return plan.plan([yamlfile.load("digits").experiment], DIGITS)


# The list.


def test_the_rows_and_runs_of_digits_are_those_counted_by_hand(digits: list[Job]) -> None:
    rows = Counter(job.row.name for job in digits)
    once = ["teacher", "ensemble", "baseline", "ensemble of baselines", "student", "student of ensemble"]
    once += ["omit 3", "keep 7,8"]
    assert rows == dict.fromkeys(once, 5) | {"member": 25, "member of the baselines": 25}
    assert list(dict.fromkeys(job.row.kind for job in digits)) == [
        "teacher", "member", "baseline", "ensemble", "student", "omission",
    ]  # fmt: skip
    found = Counter(job.spec.command for job in plan.distinct(digits))
    assert found == {"train-teacher": 9, "baseline": 9, "ensemble": 10, "distill": 10, "omit-classes": 10}
    assert [row.name for row in yamlfile.load("digits").experiment.rows] == [
        "teacher", "ensemble", "baseline", "ensemble of baselines", "student", "student of ensemble", "omit 3",
        "keep 7,8", "member", "member of the baselines",
    ]  # fmt: skip


def test_a_run_comes_after_all_that_it_is_made_from(digits: list[Job]) -> None:
    done: set[str] = set()
    for spec in (job.spec for job in plan.distinct(digits)):
        assert set(spec.parents) <= done
        done.add(spec.name)
    assert len(done) == 48


def test_who_is_made_from_whom(digits: list[Job]) -> None:
    teachers, baselines, ensembles = (names(digits, row) for row in ("teacher", "baseline", "ensemble"))
    assert [job.spec.seed for job in digits if job.row.name == "teacher"] == [0, 1, 2, 3, 4]
    first = {job.row.name: job for job in digits if job.spec.seed == 0 and job.row.kind not in ("member", "teacher")}
    assert first["ensemble"].spec.parents == names(digits, "member")[:5]
    assert first["ensemble"].spec.parents == teachers
    assert first["ensemble of baselines"].spec.parents == baselines
    assert first["baseline"].spec.parents == []
    for row in ("student", "omit 3", "keep 7,8"):
        assert [job.spec.parents for job in digits if job.row.name == row] == [[teacher] for teacher in teachers]
    for_all = {tuple(job.spec.parents) for job in digits if job.row.name == "student of ensemble"}
    assert for_all == {(ensembles[0],)}  # one ensemble, that of the first seed
    hard = [job for job in digits if job.row.kind in ("teacher", "ensemble") or job.row.name == "member"]
    assert {job.teacher for job in hard} == {None}
    beside = {job.spec.seed: job.teacher for job in digits if job.spec.command == "baseline"}
    assert beside == {job.spec.seed: job.spec.name for job in digits if job.spec.command == "train-teacher"}
    assert [job.teacher for job in digits if job.row.name == "baseline"] == teachers
    assert [job.teacher for job in digits if job.row.name == "student"] == teachers
    assert {job.teacher for job in digits if job.row.name == "student of ensemble"} == {ensembles[0]}


def test_what_each_run_is_told(digits: list[Job]) -> None:
    experiment = yamlfile.load("digits").experiment
    first = {job.row.name: job.spec for job in reversed(digits) if job.row.kind not in ("member", "ensemble")}
    assert (first["teacher"].model, first["teacher"].train) == (experiment.teacher.model, experiment.teacher.train)
    for row in ("baseline", "student", "omit 3"):
        assert (first[row].model, first[row].train) == (experiment.student.model, experiment.student.train)
    assert first["omit 3"].omitted == ["3"]
    assert {label: first[label].omission for label in ("omit 3", "keep 7,8", "student")} == {
        "omit 3": "omit 3", "keep 7,8": "keep 7,8", "student": "",
    }  # fmt: skip
    assert first["keep 7,8"].omitted == ["0", "1", "2", "3", "4", "5", "6", "9"]
    assert {row for row, spec in first.items() if spec.distill} == {*first} - {"teacher", "baseline"}
    assert {row for row, spec in first.items() if spec.data.heldout} == {"omit 3", "keep 7,8"}
    assert all(job.spec.dataset == DIGITS.facts for job in digits)
    ensemble = next(job.spec for job in digits if job.row.name == "ensemble")
    assert (ensemble.model, ensemble.train, ensemble.average) == (None, None, "arithmetic")


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("train-teacher", {"teacher": 5}),
        ("ensemble", {"ensemble": 5, "member": 25}),
        ("distill", {"student": 5, "baseline": 5}),
        ("omit-classes", {"omit 3": 5, "keep 7,8": 5}),
        (
            "run",
            {"teacher": 5, "baseline": 5, "student": 5, "omit 3": 5, "keep 7,8": 5, "student of ensemble": 5}
            | {"ensemble": 1, "ensemble of baselines": 1},
        ),
    ],
)
def test_a_command_is_the_list_restricted_to_some_rows(command: str, rows: dict[str, int], digits: list[Job]) -> None:
    chosen = plan.part(digits, command)
    assert Counter(job.row.name for job in chosen) == rows
    assert chosen == [job for job in digits if job in chosen]  # in the order of the list
    if command == "run":
        assert {job.spec.seed for job in chosen if job.row.kind == "ensemble"} == {0}
        assert plan.part(digits, "report") == chosen


def test_distilling_may_leave_the_baseline_out(digits: list[Job]) -> None:
    assert {job.row.name for job in plan.part(digits, "distill", baseline=False)} == {"student"}


def test_a_run_of_one_seed_trains_the_members_that_no_row_has(tmp_path: Path) -> None:
    (experiment,) = described(tmp_path, TINY, "ensemble.members=3")
    chosen = plan.part(plan.plan([experiment], DIGITS), "run")
    members = {
        row: sorted(job.spec.seed for job in chosen if job.row.name == row)
        for row in ("member", "member of the baselines")
    }
    assert members == {"member": [1, 2], "member of the baselines": [1, 2]}
    assert len(plan.distinct(chosen)) == len(chosen)


def test_members_have_the_nets_that_the_ensemble_names_in_turn(tmp_path: Path) -> None:
    (experiment,) = described(tmp_path, TINY, "ensemble={members: 3, models: [{hidden: [5]}, {hidden: [6]}]}")
    jobs = plan.plan([experiment], DIGITS)
    nets = [job.spec.model.hidden for job in jobs if job.row.name == "member" and job.spec.model]
    assert nets == [[5], [6], [5]]
    run = plan.part(jobs, "run")
    assert len(names(run, "member")) == 3  # the teacher of this seed has another net
    assert set(next(job.spec.parents for job in jobs if job.row.name == "ensemble")) == set(names(jobs, "member"))


def test_students_of_the_ensemble_or_of_a_run_that_is_named(tmp_path: Path) -> None:
    (experiment,) = described(tmp_path, TINY, "distill.teacher=ensemble", "seed=[3, 4]")
    jobs = plan.plan([experiment], DIGITS)
    assert not names(jobs, "student of ensemble")
    (ensemble,) = {parent for job in jobs if job.row.kind in ("student", "omission") for parent in job.spec.parents}
    assert ensemble == names(jobs, "ensemble")[0]
    named = Run(tmp_path, next(job.spec for job in jobs if job.row.name == "teacher" and job.spec.seed == 4))
    jobs = plan.plan([experiment], DIGITS, named)
    assert {tuple(job.spec.parents) for job in jobs if job.row.name in ("student", "omit 3")} == {(named.name,)}
    by_name = plan.plan(
        [experiment.model_copy(update={"distill": experiment.distill.model_copy(update={"teacher": "teacher"})})],
        DIGITS,
    )
    assert names(by_name, "student")[1] == names(jobs, "student")[1]  # it matters who teaches, not how that was said


def test_a_student_of_a_named_teacher_does_not_move_the_student_of_the_ensemble(tmp_path: Path) -> None:
    (experiment,) = described(tmp_path)
    plain = plan.plan([experiment], DIGITS)
    named = Run(tmp_path, next(job.spec for job in plain if job.row.name == "member" and job.spec.seed == 1))
    jobs = plan.plan([experiment], DIGITS, named)
    assert names(jobs, "student of ensemble") == names(plain, "student of ensemble")
    assert names(jobs, "student") != names(plain, "student")


def test_points_of_a_grid_share_what_does_not_vary(tmp_path: Path) -> None:
    text = TINY.partition("omit_classes")[0] + "grid: {distill.T: [1, 8], student.model.hidden: [[8], [24]]}\n"
    jobs = plan.plan(described(tmp_path, text), DIGITS)
    assert {job.point for job in jobs} == {0, 1, 2, 3}
    assert Counter(job.spec.command for job in plan.distinct(plan.part(jobs, "run"))) == {
        "train-teacher": 2, "ensemble": 3, "baseline": 4, "distill": 8,
    }  # fmt: skip


# Names.


def test_names_depend_on_what_is_said_not_on_how_or_where(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        (folder / "nets.py").write_text(OWN_NETS)
    sets = ["student.model={name: nets.py:make}", "omit_classes=[{omit: [cat]}]"]
    found = [job.spec.name for job in plan.plan(described(tmp_path, TINY, *sets), colours())]
    defaults = [
        "distill.t_squared=true",
        "distill.lambda2=0.1",
        "ensemble.average=arithmetic",
        "teacher.train.ema=null",
    ]
    defaults += ["data.transfer=null", "student.model.args={}", "threads=7", "data.evaluate_on=test"]
    defaults += ["expect={student: 3}", "student.train.momentum=null", "teacher.model.input_dropout=0"]
    assert found == [job.spec.name for job in plan.plan(described(tmp_path, TINY, *sets, *defaults), colours())]
    assert found == [job.spec.name for job in plan.plan(described(tmp_path / "sub", TINY, *sets), colours())]


def test_names_change_with_the_content_of_the_images_and_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(OWN_NETS)
    experiments = described(tmp_path, TINY, "student.model={name: nets.py:make}", "omit_classes=[{omit: [cat]}]")
    before = plan.plan(experiments, colours())
    other = plan.plan(experiments, colours(fingerprint="c1"))
    assert not {job.spec.name for job in before} & {job.spec.name for job in other}
    (tmp_path / "nets.py").write_text(OWN_NETS + "\n")
    after = plan.plan(experiments, colours())
    same = {job.row.name for one, job in zip(before, after, strict=True) if one.spec.name == job.spec.name}
    assert same == {"teacher", "member", "ensemble"}


def test_what_a_run_does_not_depend_on_does_not_name_it(tmp_path: Path) -> None:
    """Held-out images and the transfer set, where they play no part."""
    plain = plan.plan(described(tmp_path), DIGITS)
    few = plan.plan(described(tmp_path, TINY, "data.transfer=500"), DIGITS)
    held = plan.plan(described(tmp_path, TINY, "data.heldout=100"), open_dataset(Data(name="digits", heldout=100)))
    for jobs, moved in ((few, {"baseline", "student", "student of ensemble", "omit 3"}), (held, {"omit 3"})):
        unlike = {job.row.name for one, job in zip(plain, jobs, strict=True) if one.spec.name != job.spec.name}
        assert unlike - {"ensemble of baselines", "member of the baselines"} == moved
    data = Data(name="digits", heldout=200, evaluate_on="heldout")
    search = plan.plan(described(tmp_path, TINY, "data.evaluate_on=heldout"), open_dataset(data))
    assert not {job.spec.name for job in plain} & {job.spec.name for job in search}
    assert {job.spec.data.heldout for job in search} == {200}


# What is checked before anything is trained.

MISTAKES = {
    "unknown class": ("omit_classes=[{omit: [11]}]", "omit_classes.0.omit: there is no class 11; did you mean 1?"),
    "misspelled class": ("omit_classes=[{keep: [cta, dog]}]", "omit_classes.0.keep: there is no class cta; did you mean cat?"),
    "all classes": ("omit_classes=[{omit: [cat, dog, cow]}]", "omit_classes.0.omit: must leave one class out and one in, not ['cat', 'dog', 'cow']"),
    "the same classes in two ways": ("omit_classes=[{omit: [cat]}, {keep: [dog, cow]}]", "omit_classes: names the same classes twice: omit cat, keep cow,dog"),
    "jitter over the edge": ("teacher.train.jitter=3", "teacher.train.jitter: must be less than half of the 6 x 9 pixels of the images"),
    "bent too far": ("teacher.train.elastic=3", "teacher.train.elastic: must be less than half of the 6 x 9 pixels of the images"),
    "jitter of an omission": ("omit_classes.0.train={epochs: 1, lr: 1, jitter: 3}", "omit_classes.0.train.jitter: must be less than half of the 6 x 9 pixels of the images"),
    "too many students' images": ("data.transfer=61", "data.transfer: must be at most 60; the default is all images"),
    "too few students' images": ("data.transfer=2", "data.transfer: 2 of 60 images: must leave one of each of 3 classes, on either side"),
    "a net for other images": ("student.model={name: nets.py:make, args: {width: -1}}", "student.model.name: "),
    "a net for other images of an ensemble": ("ensemble={members: 2, models: [{hidden: [3]}, {name: nets.py:small}]}", "ensemble.models.1.name: does not take images [3, 6, 9]: "),
    "a net for other classes": ("student.model={name: nets.py:two}", "student.model.name: must give [2, 3] logits for 2 images [3, 6, 9], not [2, 2]"),
    "a norm without hidden units": ("student={model: {name: nets.py:make}, train: {epochs: 1, lr: 1, max_norm: 3}}", "student.train.max_norm: is for multi-layer perceptrons (hidden: …): remove it"),
    "a net without its function": ("student.model={name: nets.py:absent}", "nets.py: has no function absent"),
    "an argument too many": ("student.model={name: nets.py:make, args: {widht: 3}}", "unexpected keyword argument 'widht'"),
}  # fmt: skip


def checked(folder: Path, dataset: Dataset, *sets: str) -> list[str]:
    """The lines that the check of an experiment gives, the file's name shortened to `f`."""
    path = folder / "f.yaml"
    path.write_text(TINY)
    more = "\n\ndef two(classes, channels): return nn.Sequential(nn.Flatten(), nn.Linear(162, 2))\n"
    more += "def small(classes, channels): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    (folder / "nets.py").write_text(OWN_NETS + more)
    loaded = yamlfile.load(str(path), [parse_set(s) for s in sets])
    with pytest.raises(BadInput) as error, loaded.located():
        plan.check(loaded.experiment, dataset)
    return [line.replace(str(path), "f") for line in error.value.lines]


def test_a_bound_on_perceptrons_is_refused_where_a_member_of_the_ensemble_is_none(tmp_path: Path) -> None:
    members = "ensemble={members: 2, models: [{hidden: [3]}, {name: nets.py:make}]}"
    (found,) = checked(tmp_path, colours(), "omit_classes=[{omit: [cat]}]", members)
    assert "teacher.train.max_norm: is for multi-layer perceptrons" in found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_done_with_these_images_gives_one_line(mistake: str, tmp_path: Path) -> None:
    value, line = MISTAKES[mistake]
    dataset = DIGITS if "11" in value else colours()
    sets = (
        [value] if dataset is DIGITS or value.startswith("omit_classes=") else ["omit_classes=[{omit: [cat]}]", value]
    )
    sets += ["teacher.train.max_norm=null"] if "models:" in value else []
    (found,) = checked(tmp_path, dataset, *sets)
    assert found.startswith(f"--set {value}: ")
    assert line in found


def test_problems_are_told_all_at_once_with_the_lines_of_the_file(tmp_path: Path) -> None:
    assert checked(tmp_path, colours()) == ["f:13: omit_classes.0.omit: there is no class 3 (known: cat, dog, cow)"]
    plain = colours()
    small = Split(plain.train.store[..., :2, :2], plain.train.labels, 255)
    tiny = Dataset(small, small, 6, plain.facts.model_copy(update={"shape": [3, 2, 2]}))
    assert checked(tmp_path, tiny, "student.train.jitter=2") == [
        "f:6: teacher.train.jitter: must be less than half of the 2 x 2 pixels of the images",
        "--set student.train.jitter=2: student.train.jitter: must be less than half of the 2 x 2 pixels of the images",
        "f:13: omit_classes.0.omit: there is no class 3 (known: cat, dog, cow)",
    ]


def test_a_class_that_is_too_small_is_told_where_a_share_of_it_is_drawn(tmp_path: Path) -> None:
    plain = colours()
    keep = torch.cat([(plain.train.labels != 1).nonzero()[:, 0], torch.tensor([1])])  # one dog
    rare = Dataset(plain.train.at(keep), plain.test, 5, plain.facts)
    message = "class dog has one image: to draw a share of every class takes two of each"
    assert checked(tmp_path, rare, "omit_classes=[{omit: [cat]}]") == [f"f:3: data.heldout: {message}"]
    found = checked(tmp_path, rare, "omit_classes=[]", "data.transfer=12")
    assert found == [f"--set data.transfer=12: data.transfer: {message}"]
    (tmp_path / "g.yaml").write_text(TINY)
    plan.check(yamlfile.load(str(tmp_path / "g.yaml"), [parse_set("omit_classes=[]")]).experiment, rare)


@pytest.mark.parametrize("count", [3, 100])
def test_what_can_be_done_passes(count: int, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(OWN_NETS)
    sets = ["student.model={name: nets.py:make}", "data={name: digits, transfer: 200}", "omit_classes=[{omit: [c1]}]"]
    (experiment,) = described(tmp_path, TINY, *sets)
    plan.check(experiment, colours(tuple(f"c{i}" for i in range(count)), each=90 if count == 3 else 20))


# What a dry run shows.


def test_a_plan_shows_each_run_once_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(OWN_NETS)
    sets = ["student.model={name: nets.py:make}", "omit_classes=[{omit: [cat]}]", "ensemble.members=2"]
    jobs = plan.part(plan.plan(described(tmp_path, TINY, *sets), colours()), "run")
    shown = {planned.run: planned for planned in plan.describe(jobs, colours(), tmp_path / "runs")}
    assert len(shown) == len(plan.distinct(jobs)) == len(jobs)
    assert {planned.status for planned in shown.values()} == {"missing"}
    rows = {planned.row: planned for planned in shown.values()}
    assert rows["teacher"].parameters == 162 * 64 + 64 + 64 * 3 + 3
    assert rows["student"].parameters == 3 * 8 * 9 + 8 + 2 * 8 + 4 * 8 * 3 + 3
    assert (rows["teacher"].samples, rows["teacher"].batch_size, rows["teacher"].steps) == (60, 50, 2 * 6)
    assert (rows["omit cat"].samples, rows["omit cat"].steps) == (36, 6)  # less 20 cats, and 4 held out
    assert (rows["ensemble"].parameters, rows["ensemble"].samples, rows["ensemble"].steps) == (None, None, None)


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    jobs = plan.plan(described(tmp_path), DIGITS)
    places = Places(tmp_path / "runs")
    with pytest.raises(BadInput, match="--teacher nonsense: there is no such run"):
        plan.find_teacher(places, "nonsense")
    for row, message in (("student", "is a distill run; a teacher is"), ("teacher", "is failed: cannot be a teacher")):
        run = Run(places.runs_dir, next(job.spec for job in jobs if job.row.name == row))
        with pytest.raises(ZeroDivisionError), run.writing("cpu", 1, {}):
            raise ZeroDivisionError
        with pytest.raises(BadInput, match=message):
            plan.find_teacher(places, run.name)


def test_the_ensembles_of_the_first_seed_are_those_where_the_teacher_has_another(tmp_path: Path) -> None:
    """One that was trained elsewhere has seed 0."""
    first, *others = plan.plan(described(tmp_path, TINY, "seed=[5, 6]"), DIGITS)
    jobs = [replace(first, spec=first.spec.model_copy(update={"seed": 0})), *others]
    found = {(job.row.name, job.spec.seed) for job in plan.part(jobs, "run") if job.row.kind == "ensemble"}
    assert found == {("ensemble", 5), ("ensemble of baselines", 5)}


def test_an_ensemble_of_baselines_is_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, places = plan.plan(described(tmp_path), DIGITS), Places(tmp_path / "runs")
    (spec,) = {job.spec.name: job.spec for job in jobs if job.row.name == "ensemble of baselines"}.values()
    for name in spec.parents:
        member = next(job.spec for job in jobs if job.spec.name == name)
        with pytest.raises(ZeroDivisionError), Run(places.runs_dir, member).writing("cpu", 1, {}):
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), Run(places.runs_dir, spec).writing("cpu", 1, {}):
        raise ZeroDivisionError
    monkeypatch.setattr(Run, "result", lambda *_: None)
    with pytest.raises(BadInput, match="is an ensemble of baselines, which are no teachers"):
        plan.find_teacher(places, spec.name)


def test_a_teacher_that_is_missing_is_told_with_what_to_type(tmp_path: Path) -> None:
    jobs = plan.plan(described(tmp_path, TINY, "seed=[0, 1]"), DIGITS)
    chosen, places = plan.part(jobs, "distill"), Places(tmp_path / "runs")
    needed = plan.made_from(chosen, jobs)
    assert [job.spec.name for job in needed] == names(jobs, "teacher")
    with pytest.raises(BadInput) as error:
        plan.refuse_missing(needed, [], places, "f.yaml", "9 s", note=pytest.fail)
    typed = "train them: kd train-teacher f.yaml --seed 0-1, or add --with-teacher (about 9 s here)"
    are = f"2 teachers, {names(jobs, 'teacher')[0]} and on (seeds 0-1), are missing"
    assert error.value.lines == (f"{are}; {typed}",)
    assert not plan.made_from(plan.part(jobs, "train-teacher"), jobs)
    of_ensemble = [job for job in jobs if job.row.name == "student of ensemble"]
    assert {job.row.kind for job in plan.made_from(of_ensemble, jobs)} >= {"ensemble"}
    assert len(plan.made_from(of_ensemble, jobs)) == 3  # the ensemble of the first seed, and its two members
