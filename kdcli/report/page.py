"""The report of `kd run` or of one run: a page that is whole in itself, the same as Markdown and JSON, the pictures."""

import base64
import io
import re
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from kdcli import BadInput, score
from kdcli.data.dataset import Dataset
from kdcli.evidence.findings import Findings, pixels
from kdcli.evidence.results import Summary
from kdcli.report import show
from kdcli.report.pictures import pictures
from kdcli.runs.directory import Places, write_aside

OWN_PICTURES = "errors|learning-curves|calibration|cost|dark-knowledge|omitted-classes|grid|soft-targets|taught-.*"


def write_report(summary: Summary, dataset: Dataset, places: Places, folder: Path, figures: str = "") -> list[Path]:
    """Write the page, the table, the document and the pictures to a folder, the last also as `figures` (svg or pdf) for
    a paper; returns the files. Raises BadInput when the folder cannot be made, or a run's logits are not there."""
    try:
        (folder / "figures" if figures else folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    found = None if summary.grid else Findings(summary, dataset, places)
    drawn = pictures(found or summary)
    files = {
        "report.html": html(summary, found, pictures(found or summary, "svg")).encode(),
        "report.md": show.markdown(summary, list(drawn)).encode(),
        "report.json": (summary.model_dump_json(indent=1, exclude_none=True) + "\n").encode(),
        **drawn,
    }
    if figures:
        files |= {f"figures/{name}": drawn for name, drawn in pictures(found or summary, figures, column=True).items()}
    for old in folder.glob("*.png"):  # of an earlier report that had more; a file of the user's own stays
        if old.name not in files and re.fullmatch(OWN_PICTURES, old.stem):
            old.unlink()
    for name, content in files.items():
        write_aside(folder / name, content)
    return [folder / name for name in files]


def html(summary: Summary, found: Findings | None, drawn: dict[str, bytes]) -> str:
    """The page of what was found; without it, of a grid."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {
        "short": partial(show.short, most=60),
        "svg": lambda svg: _url(svg, "svg+xml"),
        "png": lambda image: _url(_png(image), "png"),
        "tensor": torch.tensor,
    }
    settings = yaml.safe_dump(summary.settings, sort_keys=False, default_flow_style=None, width=90)
    page.globals |= {"pixels": partial(pixels, photo=bool(found and found.names)), "score": score, "show": show}
    return page.get_template("page.html").render(summary=summary, found=found, drawn=drawn, settings=settings)


def _url(image: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(image).decode()}"


def _png(image: NDArray[np.uint8]) -> bytes:
    """An image no larger than a page shows."""
    shown, buffer = Image.fromarray(image), io.BytesIO()
    shown.thumbnail((256, 256))
    shown.save(buffer, "PNG")
    return buffer.getvalue()
