"""What `pip install` makes of the project: a wheel with everything that kd reads, and an editable install."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def built(how: str, out: Path) -> dict[str, bytes]:
    """The files of the wheel that pip would have built."""
    call = [sys.executable, "-c", f"import sys; from hatchling.build import {how} as b; b(sys.argv[1])", str(out)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_a_wheel_holds_all_of_the_package_and_the_experiments(tmp_path: Path) -> None:
    package = [path for path in (ROOT / "kdcli").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    experiments = [path for end in ("yaml", "py") for path in (ROOT / "experiments").glob(f"*.{end}")]
    wanted = {str(path.relative_to(ROOT)) for path in package} | {f"kdcli/experiments/{x.name}" for x in experiments}
    assert {name for name in built("build_wheel", tmp_path) if ".dist-info/" not in name} == wanted


def test_an_editable_install_finds_the_checkout(tmp_path: Path) -> None:
    files = built("build_editable", tmp_path)
    assert [content.decode().strip() for name, content in files.items() if name.endswith(".pth")] == [str(ROOT)]
