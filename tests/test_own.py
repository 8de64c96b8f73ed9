"""Somebody's own images, classes and nets through every command: colour, not square, names, BatchNorm; and 100 classes."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import OWN, OWN_DATA, OWN_NETS, Done, Shell, kd_here
from PIL import Image
from safetensors.torch import load_file
from test_page import Page

from kdcli.config import Data
from kdcli.data import sources
from kdcli.data.dataset import Split, open_dataset

NAMES = ["cat", "dog", "owl"]
ROWS = ["teacher", "ensemble", "baseline", "ensemble of baselines", "student", "student of ensemble", "omit dog"]
SHORT = ("--jobs", "1", "--epochs", "1")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder in which `kd run own.yaml` was run; tests read it, or train runs of other settings."""
    shell = Shell(tmp_path_factory.mktemp("own"))
    done = shell("run", "own.yaml", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    (shell.folder / "run.json").write_text(done.out)
    return shell


@pytest.fixture(scope="module")
def document(own: Shell) -> dict[str, Any]:
    """What `kd run` prints, with the one table of an experiment without a grid at the top."""
    found: dict[str, Any] = json.loads((own.folder / "run.json").read_text())
    found |= found["points"][0]
    return found


def run_of(document: dict[str, Any], row: str) -> str:
    return next(str(run["run"]) for run in document["runs"] if run["row"] == row)


def test_images(folder: Path) -> Split:
    return open_dataset(Data(function=f"{folder / 'own_data.py'}:load", heldout=24)).test


test_images.__test__ = False  # type: ignore[attr-defined]


def lines(done: Done) -> list[str]:
    """What kd says on stderr, without what the net prints."""
    return [line for line in done.err.splitlines() if line != "a net is made"]


def test_the_table_is_of_the_named_classes(document: dict[str, Any]) -> None:
    table = {row["row"]: row for row in document["table"]}
    assert list(table) == [*ROWS, *(f"omit dog, {bias} bias" for bias in ("test", "heldout", "prior"))]
    assert (document["classes"], document["total"]) == (NAMES, 60)
    assert all(len(run["test"]["per_class_errors"]) == 3 for run in document["runs"])
    omitted = next(run for run in document["runs"] if run["row"] == "omit dog")
    assert (omitted["omitted"], table["omit dog"]["unseen"]) == (["dog"], omitted["test"]["per_class_errors"][1])
    assert omitted["samples"] == 120 - 24 - 40 + 8  # without held-out images and dogs
    assert table["teacher"]["mean"] < 40  # better than guessing
    assert document["verdict"]["fewer_errors"] == table["baseline"]["mean"] - table["student"]["mean"]


def test_a_state_with_batch_norm_is_kept_whole(own: Shell, document: dict[str, Any]) -> None:
    weights = load_file(own.folder / "runs" / run_of(document, "teacher") / "weights.safetensors")
    assert {"net.1.running_mean", "net.1.running_var", "mean", "scale"} <= weights.keys()
    assert bool((weights["net.1.running_mean"] != 0).all())


def test_the_page_names_the_classes_and_shows_the_images_as_they_are(own: Shell) -> None:
    text = (own.folder / "runs/own/report/report.html").read_text()
    page = Page(text)
    assert page.open == []
    for part in ("omit dog: a class learned without examples", "label cat", "label owl", "own_nets.py"):
        assert part in page.text
    assert "<th>cat</th><th>dog</th><th>owl</th>" in text
    pngs = re.findall(r'<img alt="" src="data:image/png;base64,([^"]+)"', text)
    shown = [Image.open(io.BytesIO(base64.b64decode(png))) for png in pngs]
    assert len(shown) > 10
    assert {(image.size, image.mode) for image in shown} == {((9, 6), "RGB")}
    pictures = {path.name for path in (own.folder / "runs/own/report").glob("*.png")}
    assert {"dark-knowledge.png", "omitted-classes.png"} <= pictures


def test_evaluation_counts_parameters_and_multiply_adds_of_convolutions(own: Shell, document: dict[str, Any]) -> None:
    runs = [run_of(document, row) for row in ("teacher", "student")]
    words = ("evaluate", "own.yaml", *(word for run in runs for word in ("--run", run)))
    found = kd_here(own.folder, *words, "--json").json
    assert found["classes"] == NAMES
    for run, width in zip(found["runs"], (16, 4), strict=True):
        assert run["test"] == json.loads((own.folder / "runs" / run["run"] / "result.json").read_text())["test"]
        assert [len(row) for row in run["quality"]["confusion"]] == [3, 3, 3]
        assert run["cost"]["multiply_adds"] == 27 * width * 6 * 9 + 4 * width * 3
        assert run["cost"]["parameters"] == 28 * width + 2 * width + 4 * width * 3 + 3
    assert found["runs"][1]["teacher"]["run"] == runs[0]
    text = kd_here(own.folder, *words).out
    assert re.search(r"(cat|dog|owl): \d+, (cat|dog|owl): \d+", text)  # errors by class
    assert " → " in text


@pytest.mark.parametrize(("flag", "omitted"), [("--omit=cat", ["cat"]), ("--keep=owl", ["cat", "dog"])])
def test_classes_are_omitted_by_name(own: Shell, flag: str, omitted: list[str]) -> None:
    found = kd_here(own.folder, "omit-classes", "own.yaml", flag, "--json", *SHORT).json
    assert (found["row"], found["omitted"]) == (flag[2:].replace("=", " "), omitted)
    text = kd_here(own.folder, "omit-classes", "own.yaml", flag, *SHORT).out
    assert re.search(r"^ +run +teacher +errors +rate +bias +unseen *$", text, re.MULTILINE)
    assert len(re.findall(r" (?:test|heldout|prior) bias +\d+ +[\d.]+ % +[+-][\d.]+ +\d+ *$", text, re.MULTILINE)) == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "omit-classes own.yaml --omit cow",
            "--omit cow: omit_classes.0.omit: there is no class cow; did you mean owl?",
        ),
        ("omit-classes own.yaml --keep 3", "--keep 3: omit_classes.0.keep: there is no class 3 (known: cat, dog, owl)"),
        ("omit-classes own.yaml --omit cat,dog,owl", "omit_classes.0.omit: must leave one class out and one in"),
        (
            "train-teacher own.yaml --set teacher.train.jitter=3",
            "teacher.train.jitter: must be less than half of the 6 x 9",
        ),
        ("run own.yaml --set student.train.max_norm=3", "student.train.max_norm: is for multi-layer perceptrons"),
        ("run own.yaml --set data.heldout=2", "data.heldout: 2 of 120 images: must leave one of each of 3 classes"),
        ("run own.yaml --set data.transfer=2", "data.transfer: 2 of 120 images: must leave one of each of 3 classes"),
        ("predict STUDENT --test-image 60", "--test-image 60: there are images 0 to 59"),
        ("predict STUDENT x.png --invert", "--invert: is for nets of grey images, and those of "),
    ],
)
def test_a_mistake_gets_one_line(own: Shell, document: dict[str, Any], words: str, line: str) -> None:
    done = kd_here(own.folder, *words.replace("STUDENT", run_of(document, "student")).split())
    assert (done.code, done.out) == (2, "")
    (said,) = lines(done)
    assert line in said


def test_a_colour_image_file_is_the_test_image_that_it_shows(
    own: Shell, document: dict[str, Any], tmp_path: Path
) -> None:
    pixels = test_images(own.folder).store[25].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "dog.png")
    student = run_of(document, "student")
    words = ("predict", student, str(tmp_path / "dog.png"), "--test-image", "25", "--T", "1,4", "--json")
    found = kd_here(own.folder, *words).json
    file, test = found["images"]
    assert (found["classes"], test["label"]) == (NAMES, "dog")
    assert [(view["net"], view["T"]) for view in file["views"]] == [("student", 1), ("teacher", 1), ("teacher", 4)]
    for one, other in zip(file["views"], test["views"], strict=True):
        assert sum(one["p"]) == pytest.approx(1)
        assert one["p"] == pytest.approx(other["p"], abs=1e-5)
    assert "the label is dog (*)" in kd_here(own.folder, "predict", student, "--test-image", "25").out


def test_an_exported_file_says_what_the_run_says(own: Shell, document: dict[str, Any], tmp_path: Path) -> None:
    student, file = run_of(document, "student"), tmp_path / "net.onnx"
    done = kd_here(own.folder, "export", student, "--out", str(file), "--json")
    assert done.code == 0, done.err
    assert (
        done.json["errors"]
        == done.json["torch_errors"]
        == next(run["test"]["errors"] for run in document["runs"] if run["run"] == student)
    )
    card = Path(done.json["card"]).read_text()
    assert "float32 [batch, 3, 6, 9]: red, green and blue" in card
    assert "of the classes cat, dog, owl" in card
    image = tmp_path / "large.jpg"
    Image.fromarray(test_images(own.folder).store[50].permute(1, 2, 0).numpy()).resize((90, 60)).save(image)
    by_run, by_file = (kd_here(own.folder, "predict", net, str(image), "--json").json for net in (student, str(file)))
    assert by_file["classes"] == NAMES
    assert by_file["images"][0]["views"][0]["p"] == pytest.approx(by_run["images"][0]["views"][0]["p"], abs=1e-5)


def test_runs_are_compared_by_the_arguments_of_their_nets(own: Shell, document: dict[str, Any]) -> None:
    teacher, baseline = (run_of(document, row) for row in ("teacher", "baseline"))
    (comparison,) = kd_here(own.folder, "compare", teacher, baseline, "--json").json["comparisons"]
    assert comparison["changed"]["model.args.width"] == [16, 4]
    groups = kd_here(own.folder, "compare", "own/baseline", "own/distill", "--json").json["groups"]
    assert [group["seeds"] for group in groups] == [[0, 1], [0], [0]]


def test_a_report_of_one_run_names_the_classes(own: Shell, document: dict[str, Any]) -> None:
    run = run_of(document, "omit dog")
    done = kd_here(own.folder, "report", run)
    assert done.code == 0, done.err
    page = Page((own.folder / "runs" / run / "report/report.html").read_text())
    assert page.open == []
    assert "The student (omit dog) makes" in page.text


# Code that changes, and code that fails.


@pytest.fixture
def trained_once(kd: Shell) -> Shell:
    """A folder of the test's own with a teacher of own.yaml, trained for an epoch."""
    assert kd_here(kd.folder, "train-teacher", "own.yaml", *SHORT).code == 0
    return kd


def planned(kd: Shell) -> dict[str, Any]:
    (run,) = kd_here(kd.folder, "train-teacher", "own.yaml", *SHORT, "--dry-run", "--json").json["runs"]
    found: dict[str, Any] = run
    return found


def test_a_changed_net_is_another_run_and_refused_for_finished_ones(trained_once: Shell) -> None:
    kd, old = trained_once, planned(trained_once)
    assert old["status"] == "completed"
    nets = kd.folder / "own_nets.py"
    nets.write_text(OWN_NETS.replace("nn.Dropout(0.3)", "nn.Dropout(0.2)"))
    new = planned(kd)
    assert (new["status"], new["run"] != old["run"]) == ("missing", True)
    for words in (
        ("predict", old["run"], "--test-image", "0"),
        ("export", old["run"], "--format", "safetensors"),
        ("evaluate", "own.yaml", "--run", old["run"]),
        ("report", old["run"]),
    ):
        done = kd_here(kd.folder, *words)
        assert (done.code, done.out) == (2, ""), words
        assert lines(done) == [f"{nets}: has changed since {old['run']} was trained with it"]
    assert kd_here(kd.folder, "train-teacher", "own.yaml", *SHORT).code == 0
    listed = {run["run"]: run["status"] for run in kd_here(kd.folder, "runs", "--json").json["runs"]}
    assert listed == {old["run"]: "completed", new["run"]: "completed"}
    done = kd_here(kd.folder, "evaluate", "own.yaml", "--json")
    assert [run["run"] for run in done.json["runs"]] == [new["run"]]
    assert f"left out: {old['run']}: {nets}: has changed since" in done.err
    nets.write_text(OWN_NETS)
    assert planned(kd) == old
    assert kd_here(kd.folder, "predict", old["run"], "--test-image", "0").code == 0


def test_changed_images_are_another_run_and_refused_for_finished_ones(trained_once: Shell) -> None:
    kd, old = trained_once, planned(trained_once)
    (kd.folder / "own_data.py").write_text(OWN_DATA.replace("noise=60", "noise=61"))
    sources._read.cache_clear()  # which lives as long as a command
    assert planned(kd)["run"] != old["run"]
    for words in (("predict", old["run"], "--test-image", "0"), ("export", old["run"]), ("report", old["run"])):
        done = kd_here(kd.folder, *words)
        assert done.code == 2
        assert lines(done) == [
            f"{old['run']}: its images are not those that it was planned with: they have changed since"
        ]
    (kd.folder / "own_data.py").write_text(f"# the same images\n{OWN_DATA}")
    sources._read.cache_clear()
    assert planned(kd) == old


def test_a_folder_that_has_moved_keeps_its_runs(trained_once: Shell, tmp_path: Path) -> None:
    old, moved = planned(trained_once), Shell(tmp_path / "moved")
    (trained_once.folder / "runs").rename(moved.folder / "runs")
    assert planned(moved) == old


FAILURES = {  # the file, what is put into it at the mark, what the line holds
    "no Python": ("own_nets.py", "    return (\n", "SyntaxError: "),
    "a module that is not there": (
        "own_nets.py",
        "    import nothing_like_it\n",
        "ModuleNotFoundError: No module named",
    ),
    "a net that fails to build": ("own_nets.py", "    raise ValueError('so wide?')\n", "ValueError: so wide?"),
    "images that fail": ("own_data.py", "    raise OSError('no disk')\n", "OSError: no disk"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_code_that_fails_is_told_with_its_file_and_line(what: str, kd: Shell) -> None:
    name, text, said = FAILURES[what]
    file = kd.folder / name
    before, mark, after = file.read_text().partition('    print("a net is made")' if "nets" in name else "    rng =")
    file.write_text(before + text + mark + after)
    done = kd_here(kd.folder, "train-teacher", "own.yaml")
    assert (done.code, done.out) == (2, "")
    where = f"{file}:{before.count(chr(10)) + 1}: "
    assert all(where + said in line for line in lines(done))
    assert len(lines(done)) == (2 if "model.name" in done.err else 1)  # the teacher's net and the student's


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("own_nets.py:make", "own_nets.py:made", "own_nets.py: has no function made"),
        ("own_nets.py:make", "nets.py:make", "own.yaml:5: teacher.model.name: there is no file "),
        ("own_nets.py:make", "own_nets:make", "own.yaml:5: teacher.model.name: must be resnet8 (…20, 56, 110)"),
        ("{width: 16}", "{depth: 16}", "own_nets.py: make() got an unexpected keyword argument 'depth'"),
        ("own_data.py:load", "own_data.py:lod", "own_data.py: has no function lod"),
        ("own_data.py:load", "data.py:load", "own.yaml:3: data.function: there is no file "),
    ],
)
def test_code_that_is_not_there_is_told(old: str, new: str, line: str, kd: Shell) -> None:
    (kd.folder / "own.yaml").write_text(OWN.replace(old, new, 1))
    done = kd_here(kd.folder, "train-teacher", "own.yaml")
    assert (done.code, done.out) == (2, "")
    (said,) = lines(done)
    assert line in said


# A hundred classes.


class Drawn:
    """What was drawn on a figure: of each of its axes."""

    def __init__(self, figure: Any) -> None:
        self.bars = [len(axes.patches) for axes in figure.axes]
        self.names = [len([t for t in axes.get_xticklabels() if t.get_text()]) for axes in figure.axes]
        self.texts = [len(axes.texts) for axes in figure.axes]
        self.cells = [max(image.get_array().shape[:2]) for axes in figure.axes for image in axes.images]
        self.inches = tuple(figure.get_size_inches())


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return []


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory, drawn: list[Drawn]) -> Shell:
    """A folder in which an experiment of 100 classes was run, one of them left out, and 60 of them kept."""
    shell = Shell(tmp_path_factory.mktemp("hundred"))
    text = OWN.replace("name: own", "name: hundred").replace('own_data.py:load", heldout: 24', 'own_data.py:hundred"')
    text = text.replace("epochs: 8", "epochs: 2").replace("ensemble: {members: 2}\n", "")
    kept = ", ".join(f"kind {i}" for i in range(60))
    (shell.folder / "hundred.yaml").write_text(text.replace("omit: [dog]", "omit: [kind 3]") + f"  - keep: [{kept}]\n")
    from matplotlib.figure import Figure

    save = Figure.savefig

    def note_and_save(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(Drawn(figure))
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", note_and_save)
        done = kd_here(shell.folder, "run", "hundred.yaml", "--json", "--jobs", "1")
    assert done.code == 0, done.err
    (shell.folder / "run.json").write_text(done.out)
    return shell


def test_many_classes_have_no_column_each_in_the_report(hundred: Shell) -> None:
    folder = hundred.folder / "runs/hundred/report"
    text = (folder / "report.html").read_text()
    assert Page(text).open == []
    columns = [max(row.count("<td"), row.count("<th>")) for row in re.split("</tr>", text)]
    assert 3 <= max(columns) <= 13
    assert "the worst classes" in text
    assert "taken for" in text
    assert "soft target of" in text
    assert "The transfer set contains no kind 3" in text
    markdown = (folder / "report.md").read_text()
    assert max(line.count("|") for line in markdown.splitlines()) <= 8


def test_many_classes_have_no_bar_or_cell_each_in_the_pictures(hundred: Shell, drawn: list[Drawn]) -> None:
    assert len(drawn) == 2 * len(list((hundred.folder / "runs/hundred/report").glob("*.png"))) == 12  # for the page too
    for figure in drawn:
        assert max([0, *figure.bars]) <= 24  # 12 before and after
        assert max([0, *figure.names, *figure.texts]) <= 24
        assert max([0, *figure.cells]) < 100
        assert max(figure.inches) <= 12


def test_many_classes_have_no_column_each_in_the_terminal(hundred: Shell) -> None:
    found = json.loads((hundred.folder / "run.json").read_text())
    assert len(found["classes"]) == 100
    student = run_of(found["points"][0], "student")
    out = kd_here(hundred.folder, "evaluate", "hundred.yaml", "--run", student).out
    assert "errors by class, most first" in out
    assert max(map(len, out.splitlines())) <= 100
    omitted = kd_here(hundred.folder, "omit-classes", "hundred.yaml", "--jobs", "1").out
    assert max(len(line) for line in omitted.splitlines() if line.startswith(" ")) <= 80
    asked = kd_here(hundred.folder, "predict", student, "--test-image", "5").out
    assert len(re.findall(r"^ kind \d+", asked, re.MULTILINE)) <= 4


def test_many_classes_are_held_out_in_their_shares(hundred: Shell) -> None:
    found = json.loads((hundred.folder / "run.json").read_text())
    held = math.ceil(1200 / 10)  # left out in the file: a tenth
    samples = {run["row"]: run["samples"] for run in found["points"][0]["runs"]}
    assert samples["student"] == 1200
    assert samples["omit kind 3"] == pytest.approx(1200 - held - 12 + 1, abs=1)


def test_a_net_that_changes_while_runs_wait_is_noticed(trained_once: Shell) -> None:
    """A net that rewrites its own file is as good as somebody who does it during the first seed's training."""
    kd = trained_once
    (kd.folder / "own_nets.py").write_text(OWN_NETS + "open(__file__, 'a').write('# changed')\n")
    done = kd_here(kd.folder, "train-teacher", "own.yaml", *SHORT, "--seeds", "0,1", "--jobs", "1")
    assert done.code == 2
    assert "own_nets.py: has changed since own/train-teacher/" in done.err


def test_what_kd_itself_gives_a_function_is_no_argument_of_the_file(kd: Shell) -> None:
    done = kd_here(kd.folder, "run", "own.yaml", "--dry-run", "--set", "student.model.args={classes: 10, width: 4}")
    assert (done.code, done.out) == (2, "")
    assert "student.model.args.classes: is what kd itself calls the function with: remove it" in done.err
