"""`make results`: keep what `kd run` reported as the record, experiments/results/*.json, and write RESULTS.md from it.

    python tests/results.py [REPORT FOLDER...]

Each folder is one that `kd run` wrote (runs/mnist/report); its document and pictures are copied. Without any, RESULTS.md
alone is written anew from the documents there are.
"""

import json
import shutil
import sys
from itertools import takewhile
from pathlib import Path

from kdcli.report import markdown
from kdcli.runs import Document

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECORD = EXPERIMENTS / "results"
ORDER = ("mnist", "mnist-quick", "digits")  # first; the studies follow
INTRODUCTION = """\
# Results

What `kd run` reported, unedited, under what each experiment file says of itself: `make results` writes this page from the
documents in `results/`, and a test compares the two. Every figure is of the last epoch; recipes were chosen on held-out
training images (`search.yaml`), and the test images were read at the end.
"""


def keep(folder: Path) -> None:
    """Copy the document of a report, without its runs' own documents, and its pictures."""
    document = json.loads((folder / "report.json").read_text())
    for part in document.get("points", [document]):
        part["runs"] = [run["run"] for run in part.pop("runs")]
    stem = document["file"]
    RECORD.mkdir(exist_ok=True)
    for picture in (pictures := sorted(folder.glob("*.png"))):
        shutil.copy(picture, RECORD / f"{stem}-{picture.name}")
    document["pictures"] = [f"{stem}-{picture.name}" for picture in pictures]
    (RECORD / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")


def record(documents: dict[str, Document]) -> str:
    """RESULTS.md."""
    stems = sorted(documents, key=lambda stem: (ORDER.index(stem) if stem in ORDER else len(ORDER), stem))
    text = [INTRODUCTION]
    for stem in stems:
        pictures = [f"results/{name}" for name in documents[stem]["pictures"]]
        heading, _, rest = markdown(documents[stem], pictures).partition("\n\n")
        text.append(f"#{heading}\n\n{about(stem)}{rest}")
    return "\n".join(text)


def about(stem: str) -> str:
    """What a shipped experiment file says of itself: its comment, but for the command, which the document has."""
    file = EXPERIMENTS / f"{stem}.yaml"
    lines = file.read_text().splitlines() if file.exists() else []
    comment = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)][1:]
    return "".join(f"\n{line}\n" if line.startswith(("Time: ", "Result: ")) else f"{line}\n" for line in comment) + "\n"


def kept() -> dict[str, Document]:
    """The documents by experiment file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RECORD.glob("*.json"))}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
    (EXPERIMENTS / "RESULTS.md").write_text(record(kept()))
