"""One training on all cores: by one process with a thread a core, and by as many processes of torchrun with one each.

`python tools/bench_ddp.py` prints images a second of both, medians over rounds in which they take turns: of the paper's
net B, and of resnet8 (BatchNorm over all processes) on 3 x 32 x 32.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise

import torch

from kdcli import cores
from kdcli.config import Model, Train
from kdcli.data.dataset import Split
from kdcli.machine import distributed
from kdcli.machine.device import place, seeded
from kdcli.nets.models import build
from kdcli.runs.spec import Facts
from kdcli.training.fit import fit

CORES, ROUNDS, EPOCHS, STEPS, BATCH = cores(), 3, 4, 4, 128
CASES = {
    "net B": (Model(hidden=[1200, 1200], dropout=0.5, input_dropout=0.2), [1, 28, 28]),
    "resnet8": (Model(name="resnet8"), [3, 32, 32]),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(CORES)]


def images_per_s(model: Model, shape: list[int]) -> float:
    """Of the median epoch but the first."""
    n = BATCH * STEPS
    facts = Facts(fingerprint="", classes=[str(c) for c in range(10)], shape=shape, white=255, mean=[0.5], std=[0.25])
    images = Split(torch.randint(256, (n, *shape), dtype=torch.uint8), torch.randint(10, (n,)), 255)
    train = Train.model_validate({"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.01})
    with seeded(0, "init"):
        net = place(build(model, facts), torch.device("cpu"))
    times = [time.perf_counter()]
    for _ in fit(net, images, train, 0):
        times.append(time.perf_counter())
    return n / statistics.median(b - a for a, b in pairwise(times[1:]))


def arm() -> None:
    """In each process: the speed of every case, as JSON."""
    torch.set_num_threads(1 if distributed.WORLD > 1 else CORES)
    torch.manual_seed(0)
    distributed.same(lambda: None)
    found = {name: images_per_s(*case) for name, case in CASES.items()}
    if distributed.RANK == 0:
        print(json.dumps(found))


def main() -> None:
    """Let the arms take turns, and print their medians."""
    threads = {f"one process, {CORES} threads": (CORES, []), f"{CORES} processes, one thread each": (1, TORCHRUN)}
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in threads}
    for _ in range(ROUNDS):
        for name, (n, launcher) in threads.items():
            command = [sys.executable, *launcher, __file__, "arm"]
            environment = os.environ | {"OMP_NUM_THREADS": str(n)}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            speeds[name].append(json.loads(done.stdout.splitlines()[-1]))
    for case in CASES:
        for name, found in speeds.items():
            print(f"{case}: {name}: {statistics.median(one[case] for one in found):,.0f} images/s")


if __name__ == "__main__":
    arm() if "arm" in sys.argv else main()
