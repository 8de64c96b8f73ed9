"""README.md and docs/ say what is there: links, commands, options, keys with their defaults, and diffs that apply."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from conftest import TINY, Shell, kd_here

from kdcli.cli import app
from kdcli.config import Experiment, Section
from kdcli.yamlfile import _sections

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
BLOCK = re.compile(r"^(?:    .*\n)+|^```(?!diff)\w*\n(?:.*\n)*?```$", re.MULTILINE)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def calls(page: Path) -> Iterator[list[str]]:
    """The words of each command in the blocks of a page, and of those in its text that have more than a name."""
    text = page.read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`((?:kd|make) [^` ]+ [^`]+)`", text)]:
        if re.search(r"\b(kd|make) ", line):
            apart = re.sub(r"&&|>", r" \g<0> ", line.replace("\\|", "|"))
            for part in " ".join(map(shlex.quote, shlex.split(apart, comments=True))).split(" '&&' "):
                words = shlex.split(part.partition(" '>' ")[0])
                yield words[1:] if "=" in words[0] else words  # without a variable of the shell


@each_page
def test_commands_are_there_with_their_options(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w./-]+):", makefile, re.MULTILINE)
    targets += re.findall(r"^COMMANDS := (.*)", makefile, re.MULTILINE)[0].split()
    for words in calls(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "kd" and words[1] != "COMMAND":
            COMMANDS[words[1]].make_context("kd", words[2:])  # raises what a wrong call of it raises


@each_page
def test_names_of_commands_and_options_in_the_text_are_real(page: Path) -> None:
    text, parameters = page.read_text(), [p for command in COMMANDS.values() for p in command.params]
    options = {name for p in parameters for name in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"`(--[\w-]+)", text)) <= options
    assert set(re.findall(r"`kd ([a-z][\w-]*)", text)) <= COMMANDS.keys()


def test_every_command_has_its_row() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    assert set(re.findall(r"^\| `kd ([\w-]+)", text, re.MULTILINE)) == COMMANDS.keys()


def sections(section: type[Section], heading: str) -> dict[type[Section], str]:
    """The sections of the experiment file, each with the key that it is first found under."""
    found = {section: heading}
    for name, field in section.model_fields.items():
        for inner in _sections(field.annotation):
            found = sections(inner, name) | found
    return found


@pytest.mark.parametrize(("section", "heading"), sections(Experiment, "The file").items())
def test_every_key_is_documented_with_its_default(section: type[Section], heading: str) -> None:
    text = (ROOT / "docs" / "experiment-file.md").read_text()
    (part,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    left_out = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", part, re.MULTILINE))
    above = [base for base in section.__mro__[1:] if base in sections(Experiment, "")]  # which have tables of their own
    fields = {k: f for k, f in section.model_fields.items() if not any(k in base.model_fields for base in above)}
    assert left_out.keys() == fields.keys()
    for key, field in fields.items():
        if isinstance(field.default, bool | int | float | str):
            assert yaml.safe_load(left_out[key].strip("`")) == field.default, key
        needed = (field.is_required() and key != "lambda2") or key == "T"  # what the others say decides on those two
        assert (left_out[key] == "") == needed, key


@pytest.mark.parametrize("which", range(4), ids=("loss", "net", "source", "engine"))
def test_the_diffs_apply(which: int) -> None:
    diff = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "how-it-works.md").read_text(), re.DOTALL)[which]
    assert len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) <= 20
    applied = subprocess.run(["git", "apply", "--check", "-"], cwd=ROOT, input=diff, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr


def test_how_it_works_names_every_module_and_no_other_function() -> None:
    """In backticks: every module alone, and `module.name` of what is there."""
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "kdcli").rglob("[a-z]*.py")]
    modules = {path.stem: ".".join(path.parts) for path in paths}
    assert len(modules) == len(paths)  # no name twice
    named = set(re.findall(r"`(\w+)`", text))
    assert modules.keys() <= named, modules.keys() - named
    for module, name in re.findall(r"`(\w+)\.(\w+)(?:\([^`]*\))?`", text):
        if module in modules:
            assert hasattr(importlib.import_module(modules[module]), name), f"{module}.{name}"


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules of kd that a module imports, at its top or in a function, but for types."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdcli"):
            module = ROOT.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            yield from [module.stem] if module.exists() else [alias.name for alias in node.names]
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node)


def test_no_module_imports_one_above_it_in_the_table() -> None:
    rows = re.findall(r"^\| *(?:`\w+` )?\| (`[^|]*) \|", (ROOT / "docs" / "how-it-works.md").read_text(), re.MULTILINE)
    floor = {module: i for i, row in enumerate(rows) for module in re.findall(r"`(\w+)`", row)}
    houses = {path.stem: _imports(ast.parse(path.read_text())) for path in (ROOT / "kdcli").rglob("[a-z]*.py")}
    graph = {module: {other for other in found if other in floor} for module, found in houses.items()}
    assert [(m, o) for m, others in graph.items() for o in others if floor[o] < floor[m]] == []
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_blocks_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in a folder with the runs of a small digits; the last line of a cell is what a notebook shows."""
    monkeypatch.chdir(tmp_path)
    short = "--set teacher.train.epochs=3 --set student.train.epochs=3 --seeds 0,1 --jobs 1"
    text = (ROOT / "experiments" / "digits.yaml").read_text().partition("omit_classes:")[0]
    Path("digits.yaml").write_text(text)
    assert kd_here(tmp_path, "run", "digits.yaml", *short.split()).code == 0
    report = next(Path("runs/digits").glob("report*"))
    report.replace("runs/digits/report")
    page, names = (ROOT / "docs" / "notebooks.md").read_text(), dict[str, Any]()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)  # as a notebook would
    errors = {row.row: row.mean for row in names["summary"].only.table}
    assert "| teacher | " in names["final_table"](names["summary"])._repr_markdown_()
    assert errors["baseline"] != errors["student"]
    student, taught = names["student_logits"].double(), names["teacher_logits"].double()
    log_q, log_p = (student / 4).log_softmax(1), (taught / 4).log_softmax(1)
    by_hand = 16 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert torch.allclose(names["losses"].kd(student, taught, names["labels"], T=4), by_hand)
    assert names["epoch"].epoch == 3
    assert names["epoch"].t2_kl is not None
    assert names["teacher"].logits(names["index"], torch.zeros(5, 1, 8, 8)).shape == (1, 5, 10)


def test_the_tour_runs_as_it_stands(trained: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it, with a smaller experiment in place of the digits, and that one's student."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool([opened.append(url)]))  # type: ignore[func-returns-value]
    tour = BLOCK.findall((ROOT / "docs" / "commands.md").read_text())[0]
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(TINY)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=lambda *_: ["results"])
    student = next(iter(sorted((tmp_path / "runs/tiny/distill").iterdir()))).name
    names = {"report digits --open": "report tiny.yaml --open", "digits/distill/0-9985": f"tiny/distill/{student[:6]}"}
    for name, own in names.items():
        assert name in tour
        tour = tour.replace(name, own)
    words = [
        shlex.split(line.strip(), comments=True)[1:] for line in tour.splitlines() if line.strip().startswith("kd ")
    ]
    assert [w[0] for w in words] == ["report", "compare", "predict", "export", "predict"]
    for call in words:
        done = kd_here(tmp_path, *(word.replace("digits/", "tiny/") for word in call))
        assert done.code == 0, (call, done.err)
    assert (tmp_path / "student.onnx.md").exists()
    assert [url.startswith("file://") for url in opened] == [True]
