"""What Ray costs beside processes: the same trainings in both, as many at once as there are cores, start-up aside.

    python tools/bench_scale.py [TRAININGS [SECONDS]]

By default 20 teachers of the digits that train for a minute each. The time is from the first training's beginning to
the last one's end.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kdcli import cores


def train(runs: Path, trainings: int, epochs: int, *words: str) -> tuple[float, dict[str, bytes]]:
    """Seconds that so many trainings take together, and their weights."""
    call = [sys.executable, "-m", "kdcli", "train-teacher", "digits", "--seeds", f"0-{trainings - 1}", "--quiet"]
    at_once = ["--jobs", str(cores()), "--epochs", str(epochs), "--runs-dir", str(runs)]
    subprocess.run([*call, *at_once, *words], check=True, stdout=subprocess.DEVNULL)
    began = min(path.stat().st_mtime for path in runs.glob("*/*/*/config.yaml"))
    ended = max(path.stat().st_mtime for path in runs.glob("*/*/*/result.json"))
    return ended - began, {path.parent.name: path.read_bytes() for path in runs.glob("*/*/*/weights.safetensors")}


def main() -> None:
    trainings, seconds = (int(word) for word in (sys.argv[1:] + ["20", "60"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder / "short", 1, 50)
        (short,) = (folder / "short").glob("*/*/*/result.json")
        epochs = max(round(50 * seconds / json.loads(short.read_text())["seconds"]), 2)
        local, weights = train(folder / "processes", trainings, epochs)
        ray, same = train(folder / "ray", trainings, epochs, "--on", "ray")
    print(f"{trainings} trainings of {epochs} epochs, {cores()} at once")
    print(f"processes {local:.1f} s, Ray {ray:.1f} s: {100 * (ray / local - 1):+.1f} %")
    print(f"weights {'equal' if weights == same else 'DIFFER'}, bit for bit")


if __name__ == "__main__":
    main()
