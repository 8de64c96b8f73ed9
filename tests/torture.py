"""`make torture`: kill real trainings with SIGKILL at instants drawn at random, continue each, and compare the bits.

    python tests/torture.py [KILLS]

The training saves its state after every epoch, so that many kills fall into a save. A training that ends is compared
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

from conftest import Shell
from test_resume import finish, outcome, start

EPOCHS = 150


def main(kills: int) -> None:
    draws, found, compared = random.Random(0), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, shell = Shell(Path(folder, "whole")), Shell(Path(folder, "killed"))
        began = time.monotonic()
        finish(whole, EPOCHS)
        wanted, longest = outcome(whole.folder), time.monotonic() - began
        while sum(found.values()) < kills:
            with start(shell, EPOCHS) as process:
                time.sleep(draws.uniform(0.4, 1) * longest)
                process.kill()
                process.communicate()
            results = [json.loads(path.read_text()) for path in shell.folder.rglob("result.json")]
            if results and results[0]["status"] == "completed":  # it was quicker than the kill
                compared += compare(shell, wanted)
                continue
            epochs = sum(len(path.read_bytes().splitlines()) for path in shell.folder.rglob("metrics.jsonl"))
            writing = list(shell.folder.rglob("*.tmp"))
            found["while a file was written" if writing else "in training" if epochs else "before its first epoch"] += 1
        finish(shell, EPOCHS)
        compared += compare(shell, wanted)
    print(f"{kills} kills ({', '.join(f'{n} {what}' for what, n in found.items())}): {compared} endings, the same bits")


def compare(shell: Shell, wanted: dict[str, Any]) -> int:
    """Check an ending and clear it away."""
    found = outcome(shell.folder)
    unlike = [key for key in wanted if found[key] != wanted[key]]
    assert not unlike, f"the training that was killed ended differently: {unlike}, {found['files']}"
    shutil.rmtree(shell.folder / "runs")
    return 1


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
