"""The report as a page: whole in itself, read by a real browser where there is one, and true to the documents."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import TINY, Shell, kd_here
from matplotlib.figure import Figure

from kdcli.evidence.findings import Findings
from kdcli.report import pictures
from kdcli.report.pictures import telling
from kdcli.runs.spec import Epoch


class Page(HTMLParser):
    """Which tags are open or stand alone, what they refer to, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures, which take seconds."""
    monkeypatch.setattr("kdcli.report.page.pictures", lambda *_, **__: {})


@pytest.fixture(scope="module")
def page(trained: Shell) -> Path:
    return trained.folder / "runs" / "tiny" / "report" / "report.html"


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert len(parsed.references) > 30
    assert all(reference.startswith("data:") for reference in parsed.references)
    assert not re.search(r"https?://|url\(|@import|<script", text)


def test_the_page_begins_with_the_verdict_and_shows_every_part(page: Path, trained: Shell) -> None:
    text = Page(page.read_text()).text
    assert text.index("than the baseline (McNemar") < text.index("errors of the teacher")
    for part in (
        "Learning curves",
        "Where the errors are",
        "Calibration",
        "The hardest test images",
        "Accuracy against cost",
        "What the teacher knows beyond the labels",
        "omit 3: a class learned without examples",
        "kd run tiny.yaml --json",
        "15 equal intervals",
    ):
        assert part in text
    assert {path.name for path in page.parent.iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
        "errors.png",
        "learning-curves.png",
        "omitted-classes.png",
        "calibration.png",
        "cost.png",
        "dark-knowledge.png",
    }


def test_a_real_browser_shows_it_without_an_error(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    log = tmp_path / "net.json"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    words += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120)
    assert "omit 3: a class learned without examples" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert not re.findall(r'"url":"https?://(?!localhost)[^"]*tiny', log.read_text() if log.exists() else "")


@pytest.mark.usefixtures("quick_reports")
def test_report_trains_nothing(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(TINY)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "report")
    before = sorted((tmp_path / "runs").rglob("*"))
    done = kd_here(tmp_path, "report", "tiny.yaml")
    assert done.code == 0, done.err
    assert "next: open runs/tiny/report/report.html, or ship a student: kd export tiny/distill/" in done.err
    assert (tmp_path / "runs" / "tiny" / "report" / "report.html").is_file()
    made = {path.parent.name for path in (tmp_path / "runs").rglob("*") if path not in before and path.is_file()}
    assert made == {"report"}
    done = kd_here(tmp_path, "report", "tiny.yaml", "--seeds", "0-1")
    assert done.code == 2
    assert re.search(r"runs are not finished, the first is tiny/.*; train them: kd run tiny.yaml --seeds 0-1", done.err)


def test_seeds_whose_errors_were_counted_after_different_epochs_share_a_curve() -> None:
    """By two versions of kd; of the epochs that both counted after."""

    def counted(*after: int) -> list[Epoch]:
        about: dict[str, Any] = {"loss": 1, "hard_loss": 1, "train_errors": 1, "seconds": 1, "images_per_s": 1}
        return [Epoch(epoch=i, test_errors=10 * i if i in after else None, **about) for i in range(1, 7)]

    curves = [("teacher", counted(1, 2, 3, 4, 5, 6)), ("teacher", counted(3, 6)), ("student", counted(2, 4, 6))]
    summary = SimpleNamespace(seeds=[0, 1], file="tiny", evaluated_on="test images")
    figure = Figure()
    pictures._draw_curves(figure, cast(Findings, SimpleNamespace(curves=curves, summary=summary)))
    teacher, student = figure.axes[0].lines
    assert torch.as_tensor(teacher.get_xydata()).tolist() == [[3, 30], [6, 60]]
    assert torch.as_tensor(student.get_xydata()).tolist() == [[2, 20], [4, 40], [6, 60]]


RUN_REPORTS = {  # by command: what the page begins with, and a heading that it has
    "train-teacher": ("The teacher makes", "What the teacher knows beyond the labels"),
    "ensemble": ("The ensemble", "The hardest test images"),
    "baseline": ("The baseline makes", "The hardest test images"),
    "distill": ("than the baseline (McNemar", "What the teacher knows beyond the labels"),
    "omit-classes": ("The student (omit 3) makes", "omit 3: a class learned without examples"),
}


@pytest.mark.parametrize("command", RUN_REPORTS)
def test_a_run_has_a_report_of_its_own(command: str, trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    first, heading = RUN_REPORTS[command]
    run = next((tmp_path / "runs" / "tiny" / command).iterdir())
    done = kd_here(tmp_path, "report", f"tiny/{command}/{run.name[:5]}", "--json")
    assert done.code == 0, done.err
    own = json.loads((run / "result.json").read_text())
    (document,) = json.loads(done.out)["points"]
    assert document["runs"][-1]["run"] == own["run"]
    assert document["runs"][-1]["test"] == own["test"]
    parsed = Page((run / "report" / "report.html").read_text())
    assert parsed.open == []
    assert first in parsed.text[: parsed.text.index("errors of the")]
    assert heading in parsed.text
    assert (run / "report" / "learning-curves.png").exists() == (command != "ensemble")


def test_pictures_follow_the_page_and_the_columns_of_a_paper(page: Path, trained: Shell, tmp_path: Path) -> None:
    """The page's are light or dark as it is; a paper's are as wide as its column, 3.35 inches."""
    drawn = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page.read_text())
    assert len(drawn) == len(list(page.parent.glob("*.png"))) == 6
    for picture in map(base64.b64decode, drawn):
        assert b"prefers-color-scheme:dark" in picture
        assert b"var(--ink)" in picture
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    run = next((tmp_path / "runs" / "tiny" / "baseline").iterdir())
    done = kd_here(tmp_path, "report", f"tiny/baseline/{run.name}", "--figures", "pdf")
    assert done.code == 0, done.err
    figure = (run / "report" / "figures" / "calibration.pdf").read_bytes()
    assert re.search(rb"/MediaBox \[ 0 0 241\.2 ", figure)


@pytest.mark.usefixtures("quick_reports")
def test_a_report_inside_a_run_is_no_obstacle(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(TINY)
    teacher = next((tmp_path / "runs" / "tiny" / "train-teacher").glob("0-*"))
    first, again = (kd_here(tmp_path, "report", f"tiny/train-teacher/{teacher.name}", "--json") for _ in range(2))
    assert first.code == again.code == 0, again.err
    assert first.json["points"][0]["table"] == again.json["points"][0]["table"]
    asked = kd_here(tmp_path, "train-teacher", "tiny.yaml", "--json")
    assert asked.code == 0, asked.err
    assert "finished before" in asked.err
    (teacher / "result.json").write_text(f'{{"status": "interrupted", "run": "tiny/train-teacher/{teacher.name}"}}')
    trained_again = kd_here(tmp_path, "train-teacher", "tiny.yaml", "--json")
    assert trained_again.code == 0, trained_again.err
    assert trained_again.json["test"] == asked.json["test"]


@pytest.mark.usefixtures("quick_reports")
def test_a_student_is_not_held_against_a_baseline_of_another_recipe(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ("distill", "tiny.yaml", "--no-baseline", "--epochs", "1", "--json")
    student = kd_here(tmp_path, *words).json["run"]
    done = kd_here(tmp_path, "report", student, "--json")
    assert done.code == 0, done.err
    (point,) = done.json["points"]
    assert [row["row"] for row in point["table"]] == ["teacher", "student"]
    assert "verdict" not in point
    (remark,) = done.json["remarks"]
    assert (
        remark
        == "There is no baseline of its seed and recipe to compare it with: `kd distill` trains one, unless the file gives the baseline a recipe of its own."
    )
    page = Page((tmp_path / "runs" / student / "report" / "report.html").read_text())
    assert remark in " ".join(page.text.split())


@pytest.mark.usefixtures("quick_reports")
def test_a_run_without_its_teacher_is_reported_alone(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "train-teacher")
    run = next((tmp_path / "runs" / "tiny" / "omit-classes").iterdir())
    done = kd_here(tmp_path, "report", f"tiny/omit-classes/{run.name}")
    assert done.code == 0, done.err
    assert "tiny/train-teacher/0-" in done.out
    assert "is gone" in done.out
    page = Page((run / "report" / "report.html").read_text())
    assert "What the teacher knows" not in page.text  # though the student kept what it says of all images
    done = kd_here(tmp_path, "report", f"tiny/omit-classes/{run.name}", "--seeds", "3")
    assert (done.code, done.out) == (2, "")
    assert "is a run, not an experiment" in done.err


@pytest.mark.usefixtures("quick_reports")
def test_a_trial_replaces_no_report_and_a_report_leaves_no_old_pictures(trained: Shell, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    shutil.copy(trained.folder / "tiny.yaml", tmp_path)
    report = tmp_path / "runs" / "tiny" / "report"
    before = (report / "report.html").read_bytes()
    (report / "grid.png").touch()
    (report / "mine.png").touch()
    done = kd_here(tmp_path, "run", "tiny.yaml", "--set", "student.train.epochs=1", "--jobs", "1")
    assert done.code == 0, done.err
    assert (report / "report.html").read_bytes() == before
    (trial,) = report.parent.glob("report-*")
    assert "epochs: 1," in (trial / "report.html").read_text()
    assert kd_here(tmp_path, "report", "tiny.yaml").code == 0
    assert (report / "mine.png").exists()
    assert not (report / "grid.png").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny/distill"], "tiny/distill: is a group of runs: name one of them; `kd runs` lists what there is"),
        (["tiny.yaml", "nonsense"], "nonsense: neither an experiment's name nor a .yaml file"),
        (["tiny.yaml", "tiny.yaml"], "kd report tiny.yaml tiny.yaml: names something twice"),
        (["tiny.yaml", "digits", "--json"], "--json: is one document: name one experiment or run"),
        (["tiny.yaml", "--seed", "7"], "train them: kd run tiny.yaml --seeds 7"),
        (["tiny.yaml", "--set", "omit_classes.0.omit=[4]"], ": is not finished; train it: kd run tiny.yaml --set "),
    ],
)
def test_what_cannot_be_reported_is_told_before_anything_is(words: list[str], line: str, trained: Shell) -> None:
    done = kd_here(trained.folder, "report", *words)
    assert (done.code, done.out) == (2, "")
    assert line in done.err


def test_telling_images_are_right_hesitant_and_of_different_classes() -> None:
    p = torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.5, 0.3], [0.0, 0.1, 0.9]])
    labels = torch.tensor([0, 0, 0, 1, 2])
    assert telling(p.clamp_min(1e-9).log(), labels) == [3, 0, 4]


def test_a_loss_without_a_temperature_has_none_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: 1"))
    short = ["--jobs", "1", "--set", "omit_classes=[]", "--set", "ensemble=null"]
    for loss, said in (
        ("{loss: mse, lambda1: 0.1, lambda2: 1}", "soft targets."),
        ("{T: 3, lambda1: 0.9}", "at temperature T = 3."),
    ):
        done = kd_here(tmp_path, "run", "tiny.yaml", "--set", f"distill={loss}", *short)
        assert done.code == 0, done.err
        (page,) = {
            line.split(":")[0].removeprefix("wrote ") for line in done.err.splitlines() if line.startswith("wrote ")
        }
        assert said in (tmp_path / page / "report.html").read_text()
