"""`kd compare`, grids, the paper's figures, and the record of results."""

import json
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import results
import yaml
from conftest import TINY, Done, Shell, kd_here
from scipy import stats

from kdcli import yamlfile
from kdcli.data.dataset import open_dataset
from kdcli.evidence.results import Summary
from kdcli.evidence.verdict import holm
from kdcli.plan import plan
from kdcli.report import show
from kdcli.runs.directory import open_run


def runs(folder: Path, command: str) -> list[str]:
    return sorted(f"tiny/{command}/{path.name}" for path in (folder / "runs" / "tiny" / command).iterdir())


# kd compare.


def test_two_single_runs_are_compared_by_mcnemars_test(trained: Shell) -> None:
    student = json.loads((trained.folder / "run.json").read_text())["points"][0]["runs"]
    (document,) = (d for d in student if d.get("row") == "student")
    baseline = document["baseline"]
    found = json.loads(kd_here(trained.folder, "compare", baseline["run"], document["run"], "--json").out)
    (comparison,) = found["comparisons"]
    n = baseline["fixed"] + baseline["broken"]
    assert comparison["verdict"]["p"] == pytest.approx(stats.binomtest(baseline["fixed"], n).pvalue)
    assert comparison["verdict"]["fewer_errors"] == baseline["errors"] - document["test"]["errors"]
    assert comparison["changed"]["command"] == ["baseline", "distill"]
    assert comparison["changed"]["teacher"] == [None, "train-teacher"]
    text = kd_here(trained.folder, "compare", baseline["run"], document["run"]).out
    assert "B differs from A: command distill (A: baseline); distill T=4 lambda1=0.9" in text
    assert "do not cover the sampling of the test set" in text
    assert "orrected" not in text
    assert "p_corrected" not in comparison["verdict"]  # nor anything else that goes with it
    markdown = kd_here(trained.folder, "compare", baseline["run"], document["run"], "--md").out
    assert f"| B | {document['run']} | 1 | {document['test']['errors']} |  |" in markdown


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder in which a grid of two temperatures and a part of the training images was run, over three seeds."""
    shell = Shell(tmp_path_factory.mktemp("grid"))
    text = TINY.replace("heldout: 200", "heldout: 200, transfer: 300").replace("epochs: 6", "epochs: 3")
    text = text.replace(
        "omit_classes:\n  - omit: [3]\n", "grid: {distill.T: [1, 8], student.model.hidden: [[8], [24]]}\n"
    )
    (shell.folder / "study.yaml").write_text(text)
    done = kd_here(shell.folder, "run", "study.yaml", "--seeds", "0-2", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    (shell.folder / "run.json").write_text(done.out)
    return shell


def test_groups_are_compared_over_the_seeds_they_share(grid: Shell) -> None:
    found = json.loads(kd_here(grid.folder, "compare", "tiny/baseline", "tiny/distill", "--json").out)
    assert [g["seeds"] for g in found["groups"]] == [[0, 1, 2]] * 10
    first = found["groups"][0]
    for group, comparison in zip(found["groups"][1:], found["comparisons"], strict=True):
        fewer = [a - b for a, b in zip(first["errors"], group["errors"], strict=True)]
        assert comparison["verdict"]["fewer_errors"] == pytest.approx(sum(fewer) / 3)
        assert comparison["verdict"]["p"] == pytest.approx(stats.ttest_1samp(fewer, 0).pvalue)
    hidden = {json.dumps(c["changed"].get("model.hidden")) for c in found["comparisons"]}
    assert len(hidden) == 2  # the same width as A's, and the other


def test_the_seeds_that_count_are_said_where_a_group_has_others(grid: Shell) -> None:
    listed = [run["run"] for run in kd_here(grid.folder, "runs", "--json").json["runs"]]
    one, other = (next(run for run in listed if f"/baseline/{seed}-" in run) for seed in (1, 2))
    done = kd_here(grid.folder, "compare", one, "tiny/distill")
    assert done.out.count("Seeds in both: 1. ") == 8
    (pair,) = kd_here(grid.folder, "compare", one, other, "--json").json["comparisons"]
    assert (pair["seeds"], pair["changed"]["seed"]) == ([], [1, 2])


def test_the_others_are_filtered_and_sorted(grid: Shell) -> None:
    words = ["compare", "tiny/baseline", "tiny/distill", "--json"]
    found = json.loads(kd_here(grid.folder, *words, "--match", "distill.T=8.0", "--sort", "errors").out)
    assert len(found["groups"]) == 5  # A, and two widths taught by the teacher and by the ensemble
    means = [g["mean"] for g in found["groups"][1:]]
    assert means == sorted(means)
    assert found["groups"][0] == json.loads(kd_here(grid.folder, *words).out)["groups"][0]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with students of their own teachers, of the teacher of seed 0 and of that of seed 1, and one set of
    baselines; and, called later, two ensembles that differ in their last member, and students of theirs."""
    shell = Shell(tmp_path_factory.mktemp("taught"))
    (shell.folder / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: 2"))
    commands = [["train-teacher"], ["distill"]]
    commands += [["distill", "--teacher", f"tiny/train-teacher/{seed}"] for seed in (0, 1)]
    for last in (12, 16):
        members = ["--set", "name=later", "--set", f"ensemble.models=[{{hidden: [8]}}, {{hidden: [{last}]}}]"]
        students = ["--no-baseline", "--set", "distill.teacher=ensemble"]
        commands += [["ensemble", *members], ["distill", *members, *students]]
    for command, *words in commands:
        done = kd_here(shell.folder, command, "tiny.yaml", *words, "--seeds", "0-1", "--jobs", "1")
        assert done.code == 0, done.err
    return shell


def test_students_of_two_teachers_count_a_seed_once(taught: Shell) -> None:
    found = kd_here(taught.folder, "compare", "tiny/baseline", "tiny/distill", "--json").json
    baselines, *students = found["groups"]
    assert [group["seeds"] for group in found["groups"]] == [[0, 1]] * 4
    teachers = [re.search(r"teacher.seed=(\w+)", group["name"]) for group in students]
    assert sorted(seed[1] for seed in teachers if seed) == ["0", "1", "own"]
    for group, comparison in zip(students, found["comparisons"], strict=True):
        fewer = [a - b for a, b in zip(baselines["errors"], group["errors"], strict=True)]
        assert (comparison["verdict"]["n"], comparison["seeds"]) == (2, [0, 1])
        assert comparison["verdict"]["p"] == pytest.approx(stats.ttest_1samp(fewer, 0).pvalue)
    assert len({run for group in students for run in group["runs"]}) == 4


def test_students_of_teachers_that_are_gone_stay_in_their_groups(taught: Shell, tmp_path: Path) -> None:
    def groups() -> list[list[str]]:
        return [
            g["runs"] for g in kd_here(tmp_path, "compare", "tiny/baseline", "tiny/distill", "--json").json["groups"]
        ]

    shutil.copytree(taught.folder / "runs", tmp_path / "runs")
    before = groups()
    teachers = sorted((tmp_path / "runs/tiny/train-teacher").iterdir())
    shutil.rmtree(teachers[0])
    assert groups() == before
    shutil.rmtree(teachers[1])
    assert groups() == before
    done = kd_here(tmp_path, "compare", "tiny/baseline", "tiny/distill")
    assert "; teacher train-teacher (gone) (A: none)" in " ".join(done.out.split())


def test_nets_that_see_their_images_otherwise_are_groups_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: 1"))
    for words in ([], ["--set", "data.mean=[0.3]", "--set", "data.std=[0.4]"]):
        done = kd_here(tmp_path, "train-teacher", "tiny.yaml", "--seeds", "0-1", "--jobs", "1", *words)
        assert done.code == 0, done.err
    found = kd_here(tmp_path, "compare", "tiny/train-teacher", "--json").json
    assert [group["seeds"] for group in found["groups"]] == [[0, 1], [0, 1]]
    (comparison,) = found["comparisons"]
    assert comparison["changed"].keys() == {"data.mean", "data.std"}
    assert [0.3] in comparison["changed"]["data.mean"]


def test_omitted_classes_are_named_as_their_row_is(trained: Shell) -> None:
    done = kd_here(trained.folder, "compare", "tiny/baseline", "tiny/omit-classes", "--json")
    assert done.json["comparisons"][0]["changed"]["omit_classes"] == [None, "omit 3"]


def test_the_name_of_a_single_run_says_its_teacher_too(trained: Shell) -> None:
    found = kd_here(trained.folder, "compare", "tiny/distill", "--json").json
    assert {group["name"].partition(" ")[2] for group in found["groups"]} == {
        "teacher=train-teacher",
        "teacher=ensemble",
    }
    assert all(group["name"].startswith(group["runs"][0]) for group in found["groups"])


def test_kd_evaluate_shows_the_means_of_rows_over_seeds(taught: Shell) -> None:
    """The plan has seed 0 alone: other seeds are in its rows too, other teachers are not."""
    found = kd_here(taught.folder, "evaluate", "tiny.yaml", "--json").json["runs"]
    errors: dict[str, list[int]] = {}
    for run in found:
        errors.setdefault(run["row"], []).append(run["test"]["errors"])
    others = {f"student teacher.seed=own {offset}" for offset in ("+1", "-1")}
    assert {row: len(of) for row, of in errors.items()} == {
        "teacher": 2, "baseline": 2, "student": 2, **dict.fromkeys(others, 1),
    }  # fmt: skip
    means = kd_here(taught.folder, "evaluate", "tiny.yaml").out
    assert re.search(rf"^ student +2 +{mean(errors['student']):.1f} ± ", means, re.MULTILINE)
    every = kd_here(taught.folder, "evaluate", "tiny.yaml", "--all").out
    for run in found:
        name, own = run["run"].partition("/")[2], run["test"]["errors"]
        assert re.search(rf"^ {name} +{own} ", every, re.MULTILINE)
        assert name not in means


def test_runs_of_a_command_that_is_not_planned_share_a_row_only_where_they_are_alike(kd: Shell) -> None:
    for members in "23":
        assert kd_here(kd.folder, "ensemble", "tiny.yaml", "--members", members, "--epochs", "1").code == 0
    text = (kd.folder / "tiny.yaml").read_text()
    (kd.folder / "tiny.yaml").write_text("".join(line for line in text.splitlines(True) if "members" not in line))
    rows = [run["row"] for run in kd_here(kd.folder, "evaluate", "tiny.yaml", "--json").json["runs"]]
    assert [row.partition(" ")[0] for row in rows].count("ensemble") == 2
    assert len({row for row in rows if row.startswith("ensemble")}) == 2


@pytest.mark.parametrize(("command", "key"), [("ensemble", "members"), ("distill", "teacher.members")])
def test_ensembles_that_differ_in_a_later_member_are_two_groups(command: str, key: str, taught: Shell) -> None:
    found = kd_here(taught.folder, "compare", f"later/{command}", "--json").json
    assert [group["seeds"] for group in found["groups"]] == [[0, 1], [0, 1]]
    (comparison,) = found["comparisons"]
    assert sorted(comparison["changed"][f"{key}.model.hidden"]) == [[[8], [12]], [[8], [16]]]
    assert len(comparison["changed"]) == 1


def test_an_ensemble_without_a_member_is_left_out(taught: Shell, tmp_path: Path) -> None:
    shutil.copytree(taught.folder / "runs", tmp_path / "runs")
    one, other = (tmp_path / "runs" / f"later/{command}" for command in ("ensemble", "train-teacher"))
    ensemble = sorted(one.iterdir())[0]
    member = yaml.safe_load((ensemble / "config.yaml").read_text())["parents"][1].rpartition("/")[2]
    shutil.rmtree(other / member)
    done = kd_here(tmp_path, "compare", "later/ensemble", "--json")
    assert done.code == 0, done.err
    assert f"left out: later/ensemble/{ensemble.name}: its member later/train-teacher/{member} is gone" in done.err
    assert f"later/ensemble/{ensemble.name}" not in done.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny/baseline", "tiny/distill", "--match", "T=9"], "groups of finished runs (with T=9), not 1"),
        (
            ["tiny/baseline", "tiny/distill", "--sort", "name"],
            "--sort name: must be one of given, errors (see kd compare --help)",
        ),
        (["tiny/baseline/0", "tiny/distill"], "tiny/baseline/0: is the beginning of 2 runs:"),
        (["tiny/distill/0-ffffffffff", "tiny/baseline"], "tiny/distill/0-ffffffffff: there is no such run"),
        (["tiny/distill", "tiny/distill"], "twice"),
        (["tiny/distill", "tiny/baseline", "--md", "--json"], "--json --md: use one or the other"),
        (["tiny/train-teacher"], "kd compare needs 2 to 26 groups of finished runs, not 1"),
        (["tiny/omit-classes", "tiny/baseline"], "tiny/omit-classes: there are no finished runs"),
    ],
)
def test_what_cannot_be_compared_is_told(grid: Shell, words: list[str], line: str) -> None:
    done = kd_here(grid.folder, "compare", *words)
    assert (done.code, done.out) == (2, "")
    assert line in done.err


# Grids.


def test_a_grid_has_a_table_of_its_points_and_shares_what_they_share(grid: Shell) -> None:
    document = json.loads((grid.folder / "run.json").read_text())
    assert [list(p["at"].values()) for p in document["points"]] == [
        ["1", "[8]"],
        ["1", "[24]"],
        ["8", "[8]"],
        ["8", "[24]"],
    ]
    assert len(runs(grid.folder, "train-teacher")) == 3
    assert len(runs(grid.folder, "baseline")) == 6
    assert len(runs(grid.folder, "distill")) == 24  # of the teacher and of the ensemble
    for point in document["points"]:
        for run in point["runs"]:
            settings = yaml.safe_load((grid.folder / "runs" / run["run"] / "config.yaml").read_text())
            if run["command"] == "ensemble":
                continue
            assert run["samples"] == (1297 if run["row"] == "teacher" else 300)
            if run["row"] == "student":
                assert f"{settings['distill']['T']:g}" == point["at"]["distill.T"]
                assert str(settings["model"]["hidden"]) == point["at"]["student.model.hidden"]
    folder = grid.folder / "runs" / "tiny" / "report-study"
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert "| T | hidden | baseline | student | student of ensemble | train error | fewer | p | verdict |" in text
    assert "The same at every point: teacher " in text
    best = min(r["mean"] for point in document["points"] for r in point["table"] if r["row"] == "student")
    helped = sum(point["verdict"]["verdict"] == "helped" for point in document["points"])
    hurt = sum(point["verdict"]["verdict"] == "hurt" for point in document["points"])
    assert f"helped at {helped}" in text if helped else "helped at" not in text
    assert f"hurt at {hurt}" in text if hurt else "hurt at" not in text
    assert f"of 4 points, corrected for 4 comparisons. A student makes the fewest errors, {best:.1f} ± " in text
    assert text.count("The student of ensemble has one teacher for all seeds: its interval does not include var") == 1


def walked(folder: Path, varied: str, *words: str) -> Done:
    """A short `kd run` of members.yaml, which has this grid."""
    text = TINY.replace("omit_classes:\n  - omit: [3]\n", f"grid: {{{varied}}}\n")
    (folder / "members.yaml").write_text(text.replace("epochs: 6", "epochs: 2"))
    return kd_here(folder, "run", "members.yaml", "--json", "--jobs", "1", *words)


@pytest.mark.parametrize(
    "varied",
    [
        "ensemble.members: [2, 3]",
        "ensemble: [{members: 2}, {members: 3}]",
        "distill.T: [1, 4], ensemble.members: [2, 3]",
    ],
)
def test_where_the_ensemble_varies_the_verdict_is_about_its_student(varied: str, tmp_path: Path) -> None:
    done = walked(tmp_path, varied, "--seeds", "0-1", "--set", "expect={student of ensemble: 0}")
    document = done.json
    assert re.findall("errors, at (.*), not 0 or fewer", done.err) == [
        ", ".join(f"{key} = {value}" for key, value in point["at"].items()) for point in document["points"]
    ]
    for point in document["points"]:
        mean = {r["row"]: r["mean"] for r in point["table"]}
        assert point["verdict"]["fewer_errors"] == mean["baseline"] - mean["student of ensemble"]
    (page,) = (tmp_path / "runs" / "tiny").glob("report-members-*/report.md")
    text = page.read_text()
    assert "| student of ensemble |" in text
    assert f"The same at every point: teacher {document['points'][0]['table'][0]['mean']:.1f} ± " in text
    assert "A student of ensemble makes the fewest errors, " in text


def test_a_row_that_only_a_later_point_has_is_shown(tmp_path: Path) -> None:
    done = walked(tmp_path, "ensemble: [null, {members: 2}]")
    first, later = done.json["points"]
    assert [point["at"] for point in (first, later)] == [{"ensemble": "none"}, {"ensemble": "members=2"}]
    text = (tmp_path / "runs/tiny/report-members/report.md").read_text()
    assert "| ensemble |" in text
    assert ", ensemble " not in text.partition("The same at every point: ")[2].splitlines()[0]
    rows = [[row["row"] for row in point["table"]] for point in (first, later)]
    assert rows[0] == ["teacher", "baseline", "student"]
    assert set(rows[1]) - set(rows[0]) == {"ensemble", "ensemble of baselines", "student of ensemble"}


def test_keys_of_a_grid_are_called_by_what_tells_them_apart() -> None:
    assert show.headings(["distill.T", "student.train.lr"]) == ["T", "lr"]
    assert show.headings(["teacher.train.lr", "student.train.lr"]) == ["teacher.train.lr", "student.train.lr"]


def test_only_run_walks_a_grid(grid: Shell) -> None:
    done = kd_here(grid.folder, "distill", "study.yaml")
    assert done.code == 2
    assert "has a grid, which `kd run` walks; for one of its points: --set distill.T=… --set student.model" in done.err
    point = ["--set", "distill.T=8", "--set", "student.model.hidden=[8]", "--seeds", "0-2"]
    for command in ("evaluate", "train-teacher"):  # which T changes nothing of
        done = kd_here(grid.folder, command, "study.yaml", *point)
        assert done.code == 0, done.err
    assert "next: kd distill study.yaml --set distill.T=8 --set 'student.model.hidden=[8]' --seeds 0-2" in done.err


# Several verdicts at once.

FEWER = ([30, 31, 32], [10, 16, 12], [1, -2, 3], [0, 4, -1])  # at the points of a grid, than the baselines' 100 errors


@pytest.fixture
def counted(grid: Shell, tmp_path: Path) -> Path:
    """The folder of the grid again, but the students of the teacher make so many errors fewer than the baselines, and
    those of the ensemble as many."""
    shutil.copytree(grid.folder / "runs", tmp_path / "runs")
    shutil.copy(grid.folder / "study.yaml", tmp_path)
    for i, point in enumerate(json.loads((grid.folder / "run.json").read_text())["points"]):
        for found in point["runs"]:
            if found["command"] in ("baseline", "distill"):
                errors = 100 - (FEWER[i][found["seed"]] if found["row"] == "student" else 0)
                run = open_run(tmp_path / "runs", found["run"])
                result = run.result()
                run.finish(result.model_copy(update={"test": result.test.model_copy(update={"errors": errors})}))
    return tmp_path


def raw(i: int) -> float:
    return float(stats.ttest_1samp(FEWER[i], 0).pvalue)


def test_the_verdicts_of_a_grid_are_corrected_for_its_points(counted: Path) -> None:
    assert raw(1) < 0.05 < 3 * raw(1)
    document = kd_here(counted, "run", "study.yaml", "--seeds", "0-2", "--json").json
    found = [point["verdict"] for point in document["points"]]
    assert [v["verdict"] for v in found] == ["helped", *["no evidence"] * 3]
    assert [v["p"] for v in found] == pytest.approx([raw(i) for i in range(4)])
    assert [v["p_corrected"] for v in found] == pytest.approx([4 * raw(0), 3 * raw(1), 1, 1])
    assert [v["comparisons"] for v in found] == [4] * 4
    text = (counted / "runs" / "tiny" / "report-study" / "report.md").read_text()
    assert "The soft targets helped at 1 of 4 points, corrected for 4 comparisons." in text
    assert "| 0.019 (0.057) | no evidence |" in text
    assert "Corrected p (in tables, in brackets): for all comparisons, by Holm's procedure." in text
    summary = Summary.model_validate(document)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary  # a record is read again as it was


def test_a_grid_of_losses_is_judged_against_its_first_point_too(tmp_path: Path) -> None:
    """The same runs, p and correction as by hand; of one seed no verdict, since a paired t-test has none."""
    losses = "[{T: 4, lambda1: 0.9}, {loss: mse, lambda1: 0.01}, {loss: dist, T: 4, lambda1: 2, lambda2: 1}]"
    text = TINY.replace("omit_classes:\n  - omit: [3]\n", f"grid: {{distill: {losses}}}\n")
    (tmp_path / "losses.yaml").write_text(text.replace("epochs: 6", "epochs: 2"))
    document = kd_here(tmp_path, "run", "losses.yaml", "--seeds", "0-2", "--json", "--jobs", "1").json
    errors = [next(r["errors"] for r in p["table"] if r["row"] == "student") for p in document["points"]]
    first, *others = [point.get("than_first") for point in document["points"]]
    assert first is None
    p = [float(stats.ttest_rel(errors[0], own).pvalue) for own in errors[1:]]
    assert [v["p"] for v in others] == pytest.approx(p)
    assert [v["p_corrected"] for v in others] == pytest.approx(holm(p))
    assert [v["fewer_errors"] for v in others] == pytest.approx([mean(errors[0]) - mean(own) for own in errors[1:]])
    report = tmp_path / "runs" / "tiny" / "report-losses"
    assert "| than the first | p  | verdict  |" in (report / "report.md").read_text()
    assert "Compared with the first point, T=4 lambda1=0.9, the others" in (report / "report.md").read_text()
    alone = kd_here(tmp_path, "run", "losses.yaml", "--seeds", "0", "--json").json
    assert not any("than_first" in point for point in alone["points"])


def test_comparisons_with_one_group_are_corrected_for_their_number(counted: Path, grid: Shell) -> None:
    """Of nine, those of the four students of the teacher, and five groups that make as many errors as the first."""
    assert raw(1) < 0.05 < 8 * raw(1)
    points = json.loads((grid.folder / "run.json").read_text())["points"]
    names = [next(run["run"] for run in point["runs"] if run["row"] == "student") for point in points]
    words = ["compare", "tiny/baseline", "tiny/distill"]
    document = kd_here(counted, *words, "--json").json
    group = {run: g["group"] for g in document["groups"] for run in g["runs"]}
    found = {c["group"]: c["verdict"] for c in document["comparisons"]}
    assert [found[group[name]]["verdict"] for name in names] == ["helped", *["no evidence"] * 3]
    corrected = [found[group[name]]["p_corrected"] for name in names]
    assert corrected == pytest.approx([9 * raw(0), 8 * raw(1), 1, 1])
    assert [v["comparisons"] for v in found.values()] == [9] * 9
    text = " ".join(kd_here(counted, *words).out.split())
    assert f"p = {raw(1):.2g}, {8 * raw(1):.2g} corrected for 9 comparisons)" in text
    assert "Corrected p (in tables, in brackets): for all comparisons, by Holm's procedure." in text
    alone = kd_here(counted, *words, "--match", names[1], "--json").json["comparisons"]
    assert [c["verdict"]["verdict"] for c in alone] == ["helped"]
    assert "p_corrected" not in alone[0]["verdict"]
    text = kd_here(counted, *words, "--match", names[1]).out
    assert "B helped: 12.7 fewer errors than A" in text
    assert "orrected" not in text


# The paper's table, and the record.


def test_rows_are_held_against_the_papers_figures(
    trained: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    paper = "paper: {student: 1, baseline: 499, teacher: 300, omit 3: [499, 1]}\n"
    (tmp_path / "tiny.yaml").write_text(TINY + paper)
    monkeypatch.setattr("kdcli.report.page.pictures", lambda *_, **__: {})  # which take long
    document = kd_here(tmp_path, "run", "tiny.yaml", "--json").json
    (point,) = document["points"]
    rows: dict[str, dict[str, Any]] = {row["row"]: row for row in point["table"]}
    assert {name: row["paper"] for name, row in rows.items() if row["paper"]} == {
        "student": [1], "baseline": [499], "teacher": [300], "omit 3": [499, 1],
    }  # fmt: skip
    omitted = next(run for run in point["runs"] if run["row"] == "omit 3")
    assert rows["omit 3"]["unseen"] == omitted["test"]["per_class_errors"][3]
    out = kd_here(tmp_path, "run", "tiny.yaml").out
    words = {name: line.split()[-1] for line in out.splitlines() for name in rows if line.startswith(f" {name}  ")}
    assert {name: word for name, word in words.items() if word in ("lower", "higher")} == {
        "student": "higher", "baseline": "lower", "teacher": "lower", "omit 3": "lower",
    }  # fmt: skip
    assert "499 (1)" in out


def test_results_md_is_what_the_documents_say() -> None:
    assert (results.EXPERIMENTS / "RESULTS.md").read_text() == results.record(results.kept())


def test_records_from_before_there_was_a_correction_are_read_with_it() -> None:
    """That of the temperatures, as it would have been written then: 9 verdicts of 18, of which 7 are left."""
    document = json.loads((results.RECORD / "study-temperature.json").read_text())
    verdicts = [point["verdict"] for point in document["points"]]
    for v in verdicts:
        del v["p_corrected"], v["comparisons"]
        v["verdict"] = "no evidence" if v["p"] >= 0.05 else "helped" if v["fewer_errors"] > 0 else "hurt"
    assert sum(v["verdict"] != "no evidence" for v in verdicts) == 9
    read = [point.verdict for point in Summary.model_validate(document).points]
    assert [v and v.p for v in read] == [v["p"] for v in verdicts]
    assert [v.verdict for v in read if v and v.verdict != "no evidence"] == ["helped"] * 7
    assert min(v.p_corrected or 0 for v in read if v) == pytest.approx(18 * min(v["p"] for v in verdicts))


def test_the_readme_quotes_only_what_stands_in_the_record() -> None:
    readme, record = (
        (results.EXPERIMENTS.parent / name).read_text() for name in ("README.md", "experiments/RESULTS.md")
    )
    quoted, _, _ = readme.partition("<!-- results -->")[2].partition("<!-- end of results -->")
    rows = [line for line in quoted.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert set(rows) <= set(record.splitlines())


def test_the_tour_names_the_student_that_it_trains() -> None:
    experiment = yamlfile.load("digits").experiment
    jobs = plan([experiment], open_dataset(experiment.data))
    wanted = [job.spec.name for job in jobs if job.row.name == "student" and job.spec.seed == 0]
    others = [job.spec.name for job in jobs if job.row.name == "student of ensemble"]
    found = re.findall(r"digits/distill/0-\w+", (results.EXPERIMENTS.parent / "docs" / "commands.md").read_text())
    assert len(found) == 2
    for typed in found:
        assert [name for name in wanted + others if name.startswith(typed)] == wanted


def test_a_report_becomes_a_part_of_the_record(grid: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RECORD", tmp_path / "results")
    results.keep(grid.folder / "runs" / "tiny" / "report-study")
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == ["study-grid.png"]
    text = results.record(results.kept())
    assert "## study" in text
    assert "![results/study-grid.png](results/study-grid.png)" in text
    assert "kd run study.yaml --seeds 0-2" in text
