"""`make results`: keep what `kd run` reported as the record, experiments/results/*.json, and write RESULTS.md from it.

    python tools/results.py [REPORT FOLDER...]

Each folder is one that `kd run` wrote (runs/mnist/report); its document and pictures are copied. Without any,
RESULTS.md alone is written anew from the documents there are.
"""

import shutil
import sys
from itertools import takewhile
from pathlib import Path

from kdcli.evidence.results import Document, Summary
from kdcli.report import show

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECORD = EXPERIMENTS / "results"
ORDER = ("mnist", "mnist-cnn", "photos", "mnist-quick", "digits")  # first; the studies follow
INTRODUCTION = """\
# Results

What `kd run` reported, unedited, under what each experiment file says of itself: `make results` writes this page from
the documents in `results/`, and a test compares the two. Verdicts on the points of a grid are corrected for their
number when they are read, those of older documents too. Every figure is of the last epoch; recipes were chosen on
held-out training images (`search.yaml`), and the test images were read at the end.
"""


def keep(folder: Path) -> None:
    """Copy the document of a report, with the names of its runs in place of their documents, and its pictures."""
    summary = Summary.model_validate_json((folder / "report.json").read_text())
    stem, pictures = summary.file, sorted(folder.glob("*.png"))
    RECORD.mkdir(exist_ok=True)
    for picture in pictures:
        shutil.copy(picture, RECORD / f"{stem}-{picture.name}")
    points = [
        point.model_copy(update={"runs": [run.run if isinstance(run, Document) else run for run in point.runs]})
        for point in summary.points
    ]
    short = summary.model_copy(update={"points": points, "pictures": [f"{stem}-{p.name}" for p in pictures]})
    only_of_documents = [line for line in show.remarks(summary) if line not in show.remarks(short)]
    short = short.model_copy(update={"remarks": [*summary.remarks, *only_of_documents]})
    (RECORD / f"{stem}.json").write_text(short.model_dump_json(indent=1, exclude_none=True) + "\n")


def record(summaries: dict[str, Summary]) -> str:
    """RESULTS.md."""
    stems = sorted(summaries, key=lambda stem: (ORDER.index(stem) if stem in ORDER else len(ORDER), stem))
    text = [INTRODUCTION]
    for stem in stems:
        pictures = [f"results/{name}" for name in summaries[stem].pictures]
        heading, _, rest = show.markdown(summaries[stem], pictures).partition("\n\n")
        text.append(f"#{heading}\n\n{about(stem)}{rest}")
    return "\n".join(text)


def about(stem: str) -> str:
    """What a shipped experiment file says of itself: its comment, but for the command, which the document has."""
    file = EXPERIMENTS / f"{stem}.yaml"
    lines = file.read_text().splitlines() if file.exists() else []
    comment = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)][1:]
    return "".join(f"\n{line}\n" if line.startswith(("Time: ", "Result: ")) else f"{line}\n" for line in comment) + "\n"


def kept() -> dict[str, Summary]:
    """The documents by experiment file."""
    return {path.stem: Summary.model_validate_json(path.read_text()) for path in sorted(RECORD.glob("*.json"))}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
    (EXPERIMENTS / "RESULTS.md").write_text(record(kept()))
