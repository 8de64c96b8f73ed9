"""One training by two processes of torchrun: what comes out is what one process trains, also after one was killed.

torchrun starts this file (`process`), once for all tests.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import OWN, TINY, Shell, kd_here
from safetensors.torch import load_file
from test_resume import LIMIT, after_two_states, eager
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from kdcli import __main__
from kdcli.machine import distributed
from kdcli.machine.device import place
from kdcli.nets.models import MLP
from kdcli.training.fit import _Loop

EPOCHS, CPU = 4, torch.device("cpu")
TINY_FILE = TINY.replace("epochs: 6", f"epochs: {EPOCHS}").replace("max_norm: 3", "max_norm: 3, ema: 0.9")
# SGD: in front of BatchNorm a bias has no gradient but noise, of which Adam would make steps of full size.
OWN_FILE = OWN.replace("epochs: 8", f"epochs: {EPOCHS}").replace(
    "optimizer: adamw, lr: 1e-2", "optimizer: adam, lr: 1e-2"
)
OWN_FILE = OWN_FILE.replace("optimizer: adam, lr: 1e-2", "optimizer: sgd, momentum: 0.9, lr: 0.02")
OWN_FILE = OWN_FILE.replace("clip: 5,", "clip: 5, flip: true, mixup: 0.2,").replace("T: 4,", "T: 4, loss: dist,")
COMMANDS = [
    ["train-teacher", "tiny.yaml"],  # in which a process is killed
    ["train-teacher", "own.yaml"],  # begun in one process
    ["distill", "tiny.yaml"],  # cached logits; and its baseline
    ["distill", "own.yaml"],  # a live teacher, and a loss that is no mean over samples
]


def process() -> None:
    """A process of torchrun: runs the commands, then computes the gradients of some nets."""
    patch, rank = pytest.MonkeyPatch(), distributed.RANK
    eager(patch)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if rank == 1:
            killed_in_the_third_epoch(patch)
    elif rank == 0:
        shutil.copytree("runs", "left")
    for words in COMMANDS:
        sys.argv = ["kd", *words]
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert not ended.value.code, words
    torch.save(passes(), f"passes-{rank}.pt")


def killed_in_the_third_epoch(patch: pytest.MonkeyPatch) -> None:
    step, steps = _Loop.step, list[int]()

    def then_killed(loop: _Loop, *batch: object) -> object:
        steps.append(1)
        if len(steps) == 60:  # of 26 an epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return step(loop, *batch)  # type: ignore[arg-type]

    patch.setattr(_Loop, "step", then_killed)


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Nets, and a batch for each."""
    torch.manual_seed(1)
    conv = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.Dropout(0.4),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    paths = nn.Sequential(StochasticDepth(0.5, "row"), nn.Flatten(), nn.AlphaDropout(0.2), nn.Linear(32, 4))
    plain = nn.BatchNorm1d(32, affine=False, track_running_stats=False)
    return {
        "convolutions, seven images": (conv, torch.rand(7, 2, 4, 4)),
        "the mean of all batches": (
            nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, momentum=None), nn.Flatten()),
            torch.rand(4, 2, 4, 4),
        ),
        "paths": (paths, torch.rand(9, 2, 4, 4)),
        "no weights": (nn.Sequential(nn.Flatten(), nn.Linear(32, 32, bias=False), plain), torch.rand(5, 2, 4, 4)),
        "a perceptron": (MLP(32, [8], 4, dropout=0.5, input_dropout=0.2), torch.rand(6, 2, 4, 4)),
        "an image for two processes": (MLP(32, [8], 4, dropout=0.5), torch.rand(1, 2, 4, 4)),
        "an idle layer": (Idle(), torch.rand(4, 2, 4, 4)),
    }


def passes() -> dict[str, dict[str, Tensor]]:
    """Of those nets the logits, the gradients of a loss that is no sum over samples, and the buffers."""
    found = {}
    for name, (net, x) in cases().items():
        torch.manual_seed(2)
        forward = distributed.wrapped(place(net, CPU))
        for _ in range(2):
            net.zero_grad()
            logits = distributed.whole(forward, x[distributed.OWN].clone(), len(x))
            (logits.softmax(1) * torch.arange(len(x))[:, None]).sum(0).square().prod().log().backward()
        gradients = {f"d {key}": p.grad for key, p in net.named_parameters() if p.grad is not None}
        found[name] = {"logits": logits.detach()} | gradients | dict(net.named_buffers())
    return found


class Idle(nn.Module):
    """A net with weights that no logit depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x.flatten(1))
        return logits


class Both(NamedTuple):
    """Folders in which the commands were run, by one process and by two; what those two said."""

    one: Path
    two: Path
    said: str


def files(folder: Path) -> Shell:
    shell = Shell(folder)
    (folder / "tiny.yaml").write_text(TINY_FILE)
    (folder / "own.yaml").write_text(OWN_FILE)
    return shell


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    one, two = (files(tmp_path_factory.mktemp(name)).folder for name in ("one", "two"))
    with pytest.MonkeyPatch.context() as patch:
        after_two_states(patch, interrupted)
        assert kd_here(two, *COMMANDS[1]).code == 130
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", __file__]
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=two,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as torchrun:
        try:
            for command in COMMANDS:
                done = kd_here(one, *command)
                assert done.code == 0, done.err
            said, _ = torchrun.communicate(timeout=LIMIT)
        finally:
            torchrun.terminate()
    assert torchrun.returncode == 0, said
    return Both(one, two, said)


def interrupted() -> None:
    raise KeyboardInterrupt


def same_runs(one: Path, two: Path) -> int:
    """Check that the runs are the same to what the order of sums does in float32: of two processes each sums over half
    of the samples. How many there are."""
    runs = [path.relative_to(one) for path in one.glob("*/*/*/")]
    for run in runs:
        for kind in ("weights", "logits"):
            found, wanted = (load_file(folder / run / f"{kind}.safetensors") for folder in (two, one))
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max())), name
        lines = [
            [json.loads(line) for line in (f / run / "metrics.jsonl").read_text().splitlines()] for f in (two, one)
        ]
        for found, wanted in zip(*lines, strict=True):  # a line an epoch: nobody else wrote one
            assert found["epoch"] == wanted["epoch"]
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            assert found["train_errors"] == pytest.approx(wanted["train_errors"], abs=1)
    return len(runs)


def test_two_processes_train_what_one_does(both: Both) -> None:
    assert same_runs(both.one / "runs", both.two / "runs") == 6


def test_after_a_process_was_killed_all_go_on_from_the_last_state(both: Both) -> None:
    assert "(exitcode: -9) local_rank: 1" in both.said
    assert re_lines(both.said, "tiny/train-teacher") == ["continued after epoch 2"]


def test_a_run_that_one_process_began_is_continued_by_two(both: Both) -> None:
    assert re_lines(both.said, "own/train-teacher") == ["continued after epoch 2"]


def test_a_run_that_two_processes_began_is_continued_by_one(both: Both, tmp_path: Path) -> None:
    files(tmp_path)
    shutil.copytree(both.two / "left", tmp_path / "runs")
    done = kd_here(tmp_path, *COMMANDS[0])
    assert done.code == 0, done.err
    assert re_lines(done.err, "tiny/train-teacher") == ["continued after epoch 2"]
    shutil.rmtree(tmp_path / "runs" / "own")
    assert same_runs(tmp_path / "runs", both.one / "runs") == 1


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [("distill", "is missing; train it: kd train-teacher", 2), ("train-teacher --dry-run", "about ", 0)],
)
def test_how_long_it_takes_is_told_of_one_process(words: str, said: str, code: int, tmp_path: Path) -> None:
    files(tmp_path)
    command, *more = words.split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "kdcli", command, "tiny.yaml", *more],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert said in done.stdout + done.stderr
    assert "Error: Default process group" not in done.stderr
    assert (f"exitcode  : {code}" in done.stderr) if code else not done.returncode


def re_lines(said: str, group: str) -> list[str]:
    """What was said of the continuation of a group's run."""
    lines = [line.partition(": ") for line in said.splitlines() if line.startswith(group)]
    return [after for _, _, after in lines if after.startswith("continued")]


@pytest.mark.parametrize("name", cases())
def test_gradients_and_statistics_are_those_of_the_whole_batch(name: str, both: Both) -> None:
    wanted = passes()[name]
    for rank in (0, 1):
        found = torch.load(both.two / f"passes-{rank}.pt")[name]
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max())), key


if __name__ == "__main__":
    process()
