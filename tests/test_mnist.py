"""The five subcommands on real MNIST, their trainings shorter than the paper's; about two minutes on one core."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Shell

pytestmark = pytest.mark.timeout(1800)  # against hanging alone: the fixture trains six nets

SHORT = """\
name: mnist
data: {name: mnist, heldout: 5000}
teacher:
  model: {hidden: [300, 300], dropout: 0.2}
  train: {epochs: 8, batch_size: 200, optimizer: adam, lr: 2e-3, jitter: 1}
student:
  model: {hidden: [300, 300]}
  train: {epochs: 6, batch_size: 100, optimizer: adam, lr: 2e-3}
baseline:
  train: {epochs: 6, batch_size: 100, optimizer: adam, lr: 1e-3}
distill: {T: 4, lambda1: 0.9}
"""


@pytest.fixture(scope="module")
def mnist(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each command says, in the order that a user would type them."""
    shell = Shell(tmp_path_factory.mktemp("mnist"))
    (shell.folder / "short.yaml").write_text(SHORT)
    calls = {
        "teacher": ["train-teacher"],
        "student": ["distill"],
        "omit": ["omit-classes", "--omit", "3", "--epochs", "5"],
        "keep": ["omit-classes", "--keep", "7,8", "--epochs", "8"],
        "ensemble": ["ensemble", "--members", "2", "--epochs", "1"],
        "evaluation": ["evaluate"],
    }
    documents = {}
    for name, (command, *flags) in calls.items():
        done = shell(command, "short.yaml", *flags, "--jobs", "1", "--threads", "1", "--json", KD_DATA=str(mnist_dir))
        assert done.code == 0, done.err
        documents[name] = done.json
    return documents


def test_the_student_beats_its_baseline_clearly(mnist: dict[str, dict[str, Any]]) -> None:
    """When this was written: teacher 121, baseline 177, student 145 errors of the 10,000 test images."""
    student = mnist["student"]
    assert student["test"]["total"] == 10_000
    assert mnist["teacher"]["test"]["errors"] < 150
    assert student["teacher"]["run"] == mnist["teacher"]["run"]
    assert student["test"]["errors"] < student["baseline"]["errors"]
    assert student["last_epoch"]["t2_kl"] < 0.1


def test_a_class_never_seen_is_learned_from_the_soft_targets_and_a_bias(mnist: dict[str, dict[str, Any]]) -> None:
    """The paper: 133 of the 1,010 threes are wrong before the bias, 14 after it."""
    omit = mnist["omit"]
    assert omit["samples"] < 50_000
    assert omit["test"]["per_class_errors"][3] < 900  # far from the 1,010 of a student that only saw labels
    for bias in omit["bias"].values():
        assert bias["shift"] > 0
        assert bias["errors"] < omit["test"]["errors"]
        assert bias["per_class_errors"][3] < omit["test"]["per_class_errors"][3] / 2
    assert omit["bias"]["heldout"]["per_class_errors"][3] < 101  # over 90 % right


def test_two_classes_teach_most_of_the_others(mnist: dict[str, dict[str, Any]]) -> None:
    """The paper: 47.3 % errors from 7s and 8s alone, 13.2 % after lowering their biases; chance is 80 %."""
    keep = mnist["keep"]
    assert keep["omitted"] == ["0", "1", "2", "3", "4", "5", "6", "9"]
    assert keep["bias"]["heldout"]["errors"] < 0.75 * keep["test"]["errors"]
    assert keep["bias"]["heldout"]["errors"] < 4000
    assert abs(keep["bias"]["heldout"]["shift"] - keep["bias"]["test"]["shift"]) < 2


def test_an_ensemble_beats_its_mean_member(mnist: dict[str, dict[str, Any]]) -> None:
    ensemble = mnist["ensemble"]
    assert [member["seed"] for member in ensemble["members"]] == [0, 1]
    assert ensemble["fewer_errors_than"]["mean_member"] > 0


def test_evaluation_counts_the_same_errors(mnist: dict[str, dict[str, Any]]) -> None:
    runs = {run["run"]: run for run in mnist["evaluation"]["runs"]}
    for name in ("teacher", "student", "omit", "keep", "ensemble"):
        assert runs[mnist[name]["run"]]["test"] == mnist[name]["test"]
    student, teacher = runs[mnist["student"]["run"]], runs[mnist["teacher"]["run"]]
    assert student["teacher"]["run"] == teacher["run"]
    assert student["teacher"]["agreement"] > 0.98
    assert student["cost"]["multiply_adds"] == 784 * 300 + 300 * 300 + 300 * 10
    assert sum(map(sum, student["quality"]["confusion"])) == 10_000


def test_a_training_imports_no_pictures(mnist_dir: Path, tmp_path: Path) -> None:
    words = ["train-teacher", "mnist", "--epochs", "1", "--set", "teacher.model.hidden=[8]", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kdcli", *words, "--data-dir", str(mnist_dir)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in imported
    assert "matplotlib" not in imported
