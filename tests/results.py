"""`make results`: keep what `kd run` reported as the record, experiments/results/*.json, and write RESULTS.md from it.

    python tests/results.py [REPORT FOLDER...]

Each folder is one that `kd run` wrote (runs/mnist/report); its document and pictures are copied. Without any, RESULTS.md
alone is written anew from the documents there are.
"""

import json
import shutil
import sys
from pathlib import Path

from kdcli.report import markdown
from kdcli.runs import Document

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECORD = EXPERIMENTS / "results"
ORDER = ("mnist", "mnist-quick", "digits")  # first; the studies follow
INTRODUCTION = """\
# Results

What `kd run` reported, unedited: `make results` writes this page from the documents in `results/`, and a test compares
the two. Every figure is of the last epoch; recipes were chosen on held-out training images (`search.yaml`), and the test
images were read at the end.
"""


def keep(folder: Path) -> None:
    """Copy the document of a report, without its runs' own documents, and its pictures."""
    document = json.loads((folder / "report.json").read_text())
    for part in document.get("points", [document]):
        part["runs"] = [run["run"] for run in part.pop("runs")]
    stem = document["file"]
    RECORD.mkdir(exist_ok=True)
    (RECORD / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    for picture in folder.glob("*.png"):
        shutil.copy(picture, RECORD / f"{stem}-{picture.name}")


def record(documents: dict[str, Document], pictures: list[str]) -> str:
    """RESULTS.md."""
    stems = sorted(documents, key=lambda stem: (ORDER.index(stem) if stem in ORDER else len(ORDER), stem))
    parts = [INTRODUCTION]
    for stem in stems:
        mine = [f"results/{name}" for name in pictures if name.rpartition(".")[0].startswith(f"{stem}-")]
        longer = [other for other in stems if other != stem and other.startswith(f"{stem}-")]
        mine = [name for name in mine if not any(name.startswith(f"results/{other}-") for other in longer)]
        parts.append("#" + markdown(documents[stem], mine))
    return "\n".join(parts)


def kept() -> tuple[dict[str, Document], list[str]]:
    """The documents by experiment file, and the names of the pictures."""
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(RECORD.glob("*.json"))}
    return documents, sorted(path.name for path in RECORD.glob("*.png"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
    (EXPERIMENTS / "RESULTS.md").write_text(record(*kept()))
