"""`make torture`: kill real trainings with SIGKILL at instants drawn at random, continue each, and compare the bits.

    python tools/torture.py [KILLS]

So many kills for the teachers of two experiments: a perceptron, and a net of somebody's own with BatchNorm and
nn.Dropout. A training saves its state after every epoch, so that many kills fall into a save. One that ends is compared
with one that was never interrupted, and another is begun; so is the last.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import Shell
from test_resume import WHOLE, finish, outcome, start

EPOCHS = 150


def torture(folder: Path, experiment: str, kills: int) -> str:
    """Kill trainings of an experiment's teacher until there were so many; says how many fell where."""
    draws, found, compared = random.Random(0), Counter[str](), 0
    whole, shell = Shell(folder / "whole"), Shell(folder / "killed")
    start(whole, 1, experiment).communicate()  # what only the first one pays, such as to start the server of forks
    shutil.rmtree(whole.folder / "runs")
    began = time.monotonic()
    start(whole, EPOCHS, experiment).communicate()
    wanted, longest = outcome(whole.folder), time.monotonic() - began
    while found.total() < kills:
        with start(shell, EPOCHS, experiment) as process:
            time.sleep(draws.uniform(0, 1) * longest)
            process.kill()
            process.communicate()
        results = [json.loads(path.read_text()) for path in shell.folder.rglob("result.json")]
        if results and results[0]["status"] == "completed":  # it was quicker than the kill
            compared += compare(shell, wanted)
            continue
        epochs = sum(len(path.read_bytes().splitlines()) for path in shell.folder.rglob("metrics.jsonl"))
        writing = list(shell.folder.rglob("*.tmp"))
        found["while a file was written" if writing else "in training" if epochs else "before its first epoch"] += 1
    finish(shell, EPOCHS, experiment)
    compared += compare(shell, wanted)
    fell = ", ".join(f"{count} {where}" for where, count in found.items())
    return f"{kills} kills ({fell}): {compared} endings, the same bits"


def compare(shell: Shell, wanted: dict[str, Any]) -> int:
    """Check an ending and clear it away."""
    found = outcome(shell.folder)
    unlike = [key for key in wanted if found[key] != wanted[key]]
    assert not unlike, f"the training that was killed ended differently: {unlike}, {found['files']}"
    shutil.rmtree(shell.folder / "runs")
    return 1


if __name__ == "__main__":
    for experiment in WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            kills = int(sys.argv[1]) if len(sys.argv) > 1 else 60
            print(f"{experiment}: {torture(Path(folder), experiment, kills)}", flush=True)
