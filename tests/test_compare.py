"""Verdicts, `kd compare`, grids, and the record of results."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import results
import yaml
from conftest import TINY, Shell, kd_here
from scipy import stats

from kdcli import BadInput, config, specs
from kdcli.runs import Run
from kdcli.verdict import mean_interval, paired, seeds_to_settle


def runs(folder: Path, command: str) -> list[str]:
    return sorted(f"tiny/{command}/{path.name}" for path in (folder / "runs" / "tiny" / command).iterdir())


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_to_settle_are_those_of_the_textbooks(effect: float, seeds: int) -> None:
    """Cohen's small, medium and large effects, two-sided 5 %, power 80 %: the tables for a paired t-test."""
    assert seeds_to_settle(effect, 1.0) == seeds
    assert seeds_to_settle(-3 * effect, 3.0) == seeds


def test_nothing_settles_an_effect_of_nothing() -> None:
    assert seeds_to_settle(0.0, 1.0) is None
    assert seeds_to_settle(1e-6, 1.0) is None


def test_the_interval_is_scipys() -> None:
    errors = [97, 103, 99, 110, 94]
    wanted = stats.t.interval(0.95, 4, sum(errors) / 5, stats.sem(errors))
    assert mean_interval(errors) == pytest.approx(wanted)
    assert mean_interval([5]) is None


def test_a_verdict_without_evidence_says_how_many_seeds_would_settle_it() -> None:
    found = paired([10, -8, 12, 3, -4], 0, 0)
    assert found.verdict == "no evidence"
    assert found.settle == seeds_to_settle(2.6, stats.tstd([10, -8, 12, 3, -4]))
    assert f"About {found.settle} seeds would settle" in found.sentence()
    assert found.sentence("B", "A").startswith("No evidence at n = 5 that B helped or hurt: 2.6 fewer errors than A")


# kd compare.


def test_two_single_runs_are_compared_by_mcnemars_test(trained: Shell) -> None:
    student = json.loads((trained.folder / "run.json").read_text())["runs"]
    (document,) = (d for d in student if d.get("row") == "student")
    baseline = document["baseline"]
    found = json.loads(kd_here(trained.folder, "compare", baseline["run"], document["run"], "--json").out)
    (comparison,) = found["comparisons"]
    n = baseline["fixed"] + baseline["broken"]
    assert comparison["p"] == pytest.approx(stats.binomtest(baseline["fixed"], n).pvalue)
    assert comparison["fewer_errors"] == baseline["errors"] - document["test"]["errors"]
    assert comparison["changed"]["command"] == ["baseline", "distill"]
    assert comparison["changed"]["teacher"] == [None, "train-teacher"]
    text = kd_here(trained.folder, "compare", baseline["run"], document["run"]).out
    assert "B against A: command distill, not baseline; distill T=4 lambda1=0.9" in text
    assert "do not cover the sampling of the test set" in text
    markdown = kd_here(trained.folder, "compare", baseline["run"], document["run"], "--md").out
    assert f"| B | {document['run']} | 1 | {document['test']['errors']} |  |" in markdown


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder in which a grid of two temperatures and a part of the training images was run, over three seeds."""
    shell = Shell(tmp_path_factory.mktemp("grid"))
    text = TINY.replace("heldout: 200", "heldout: 200, transfer: 300")
    text = text.replace(
        "omit_classes:\n  - omit: [3]\n", "grid: {distill.T: [1, 8], student.model.hidden: [[8], [24]]}\n"
    )
    (shell.folder / "study.yaml").write_text(text)
    done = shell("run", "study.yaml", "--seeds", "0-2", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    (shell.folder / "run.json").write_text(done.out)
    return shell


def test_groups_are_compared_over_the_seeds_they_share(grid: Shell) -> None:
    found = json.loads(kd_here(grid.folder, "compare", "tiny/baseline", "tiny/distill", "--json").out)
    assert [g["seeds"] for g in found["groups"]] == [[0, 1, 2]] * 10
    first = found["groups"][0]
    for group, comparison in zip(found["groups"][1:], found["comparisons"], strict=True):
        fewer = [a - b for a, b in zip(first["errors"], group["errors"], strict=True)]
        assert comparison["fewer_errors"] == pytest.approx(sum(fewer) / 3)
        assert comparison["p"] == pytest.approx(stats.ttest_1samp(fewer, 0).pvalue)
    hidden = {json.dumps(c["changed"].get("model.hidden")) for c in found["comparisons"]}
    assert len(hidden) == 2  # the same width as A's, and the other


def test_the_others_are_filtered_and_sorted(grid: Shell) -> None:
    words = ["compare", "tiny/baseline", "tiny/distill", "--json"]
    found = json.loads(kd_here(grid.folder, *words, "--match", "distill.T=8.0", "--sort", "errors").out)
    assert len(found["groups"]) == 5  # A, and two widths taught by the teacher and by the ensemble
    means = [g["mean"] for g in found["groups"][1:]]
    assert means == sorted(means)
    assert found["groups"][0] == json.loads(kd_here(grid.folder, *words).out)["groups"][0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny/baseline", "tiny/distill", "--match", "T=9"], "groups of finished runs (with T=9), not 1"),
        (
            ["tiny/baseline", "tiny/distill", "--sort", "name"],
            "'--sort': 'name' is not one of 'given', 'errors' (see kd compare --help)",
        ),
        (["tiny/baseline/0", "tiny/distill"], "tiny/baseline/0: is the beginning of 2 runs:"),
        (["tiny/distill/0-ffffffffff", "tiny/baseline"], "tiny/distill/0-ffffffffff: there is no such run"),
        (["tiny/distill", "tiny/distill"], "twice"),
        (["tiny/distill", "tiny/baseline", "--md", "--json"], "--json --md: choose one of them"),
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
    assert [list(p["at"].values()) for p in document["points"]] == [["1", "8"], ["1", "24"], ["8", "8"], ["8", "24"]]
    assert len(runs(grid.folder, "train-teacher")) == 3
    assert len(runs(grid.folder, "baseline")) == 6
    assert len(runs(grid.folder, "distill")) == 24  # of the teacher and of the ensemble
    for point in document["points"]:
        for run in point["runs"]:
            settings = yaml.safe_load((grid.folder / "runs" / run["run"] / "config.yaml").read_text())["settings"]
            if run["command"] == "ensemble":
                continue
            assert run["samples"] == (1297 if run["row"] == "teacher" else 300)
            if run["row"] == "student":
                assert config._shown(settings["distill"]["T"]) == point["at"]["distill.T"]
                assert str(settings["model"]["hidden"][0]) == point["at"]["student.model.hidden"]
    folder = grid.folder / "runs" / "tiny" / "report-study"
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert "| T | hidden | baseline | student | student of ensemble | train error | fewer | verdict |" in text
    assert "The same at every point: teacher " in text
    best = min(r["mean"] for point in document["points"] for r in point["table"] if r["row"] == "student")
    helped = sum(point["verdict"]["verdict"] == "helped" for point in document["points"])
    hurt = sum(point["verdict"]["verdict"] == "hurt" for point in document["points"])
    assert f"helped at {helped}" in text if helped else "helped at" not in text
    assert f"hurt at {hurt}" in text if hurt else "hurt at" not in text
    assert f"of 4 points. The fewest errors of a student, {best:.1f} ± " in text


def test_where_the_ensemble_alone_varies_the_verdict_is_about_its_student(tmp_path: Path) -> None:
    text = TINY.replace("omit_classes:\n  - omit: [3]\n", "grid: {ensemble.members: [2, 3]}\n")
    (tmp_path / "members.yaml").write_text(text)
    document = kd_here(tmp_path, "run", "members.yaml", "--seeds", "0-1", "--json", "--jobs", "1").json
    for point in document["points"]:
        mean = {r["row"]: r["mean"] for r in point["table"]}
        assert point["verdict"]["fewer_errors"] == mean["baseline"] - mean["student of ensemble"]
    text = (tmp_path / "runs" / "tiny" / "report-members" / "report.md").read_text()
    assert "| student of ensemble |" in text
    assert f"The same at every point: teacher {document['points'][0]['table'][0]['mean']:.1f} ± " in text
    assert "The fewest errors of a student of ensemble, " in text


def test_a_key_set_by_hand_does_not_vary(grid: Shell) -> None:
    name, overrides = str(grid.folder / "study.yaml"), [config.parse_set("distill.T=8")]
    experiment = config.load(name, overrides)
    assert list(config.points(name, overrides, experiment.grid)) == [("8",), ("24",)]
    done = kd_here(grid.folder, "distill", "study.yaml")
    assert done.code == 2
    assert "has a grid, which `kd run` walks; for one of its points: --set distill.T=… --set student.model" in done.err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("grid: {distill.Temp: [3]}", "distill.Temp: unknown key"),
        ("grid: {distill.T: [3, -1]}", "f:14: grid: distill.T=-1: distill.T: must be greater than or equal to 0.001"),
        ("grid: {distill.T: [1, 1.0]}", "f:14: grid: distill.T=1.0: is there twice"),
        ("grid: {distill.T: []}", "f:14: grid.distill.T: must not be empty"),
        ("grid: {data.heldout: [30]}", "f:14: grid.data.heldout: cannot vary within one experiment"),
        ("grid: {seed: [3]}", "f:14: grid.seed: cannot vary within one experiment"),
        ("paper: {studnt: 3}", "f:14: paper.studnt: is not a row of this experiment; did you mean student?"),
        ("paper: {student: -3}", "f:14: paper.student: must be a number of errors, or two: in all, and on the"),
        ("paper: {student: [1, 2, 3]}", "f:14: paper.student: must be a number of errors, or two"),
        ("grid: {distill: [{T: 1}], distill.T: [3]}", "f:14: grid.distill.T: lies within distill, which varies too"),
        ("grid: {distill.T: [3]}", "omit_classes: has no place in the table of a grid: leave it out"),
    ],
)
def test_a_wrong_grid_is_told(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    without = TINY.replace("omit_classes:\n  - omit: [3]\n", "# none\n# at all\n")
    path.write_text(f"{TINY if 'omit_classes' in line else without}{text}\n")
    with pytest.raises(BadInput) as error:
        config.points(str(path), [], config.load(str(path)).grid)
    assert line in str(error.value).replace(str(path), "f")


# The paper's table, and the record.


def test_rows_are_held_against_the_papers_figures(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    paper = "paper: {student: 1, baseline: 499, teacher: 300, omit 3: [499, 1]}\n"
    (tmp_path / "tiny.yaml").write_text(TINY + paper)
    done = kd_here(tmp_path, "run", "tiny.yaml", "--json")
    assert done.code == 0, done.err
    rows: dict[str, dict[str, Any]] = {row["row"]: row for row in json.loads(done.out)["table"]}
    words = {name: row.get("against_paper") for name, row in rows.items() if "paper" in row}
    assert words == {"student": "higher", "baseline": "lower", "teacher": "lower", "omit 3": "lower"}
    omitted = next(run for run in json.loads(done.out)["runs"] if run["row"] == "omit 3")
    assert rows["omit 3"]["unseen"] == omitted["test"]["per_class_errors"][3]
    assert "499 (1)" in kd_here(tmp_path, "run", "tiny.yaml").out


def test_results_md_is_what_the_documents_say() -> None:
    assert (results.EXPERIMENTS / "RESULTS.md").read_text() == results.record(results.kept())


def test_the_readme_quotes_only_what_stands_in_the_record() -> None:
    readme, record = (
        (results.EXPERIMENTS.parent / name).read_text() for name in ("README.md", "experiments/RESULTS.md")
    )
    quoted, _, _ = readme.partition("## Five minutes")
    rows = [line for line in quoted.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert set(rows) <= set(record.splitlines())


def test_the_readme_names_the_student_that_its_tour_trains() -> None:
    experiment = config.load("digits")
    teacher = specs.teacher_spec(experiment, 0), specs.ensemble_spec(experiment, 0)
    names = [specs.student_spec(experiment, 0, Run(Path(), spec)).name for spec in teacher]
    for typed in (found := re.findall(r"digits/distill/0-\w+", (results.EXPERIMENTS.parent / "README.md").read_text())):
        assert [name.startswith(typed) for name in names] == [True, False]
    assert len(found) == 2


def test_a_report_becomes_a_part_of_the_record(grid: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RECORD", tmp_path / "results")
    results.keep(grid.folder / "runs" / "tiny" / "report-study")
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == ["study-grid.png"]
    text = results.record(results.kept())
    assert "## study" in text
    assert "![results/study-grid.png](results/study-grid.png)" in text
    assert "kd run study.yaml --seeds 0-2" in text
