"""Several runs at once: single-threaded processes, each training one run after another.

Two single-threaded processes finish more work than one process with two threads. A worker reads from stdin what to
train and tells on stdout how it goes, a JSON document a line; all else is in the run directories, as always.
"""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

from kdcli import BadInput, Failed, failure
from kdcli.config import Experiment
from kdcli.runs import Document, Run, Spec

if TYPE_CHECKING:
    from kdcli.recipes import Session

Child = subprocess.Popen[str]


def train_all(session: "Session", runs: Sequence[Run]) -> None:
    """Train runs in up to `session.jobs` processes at once. One that fails takes no other down: when all have ended,
    raises what went wrong."""
    waiting, children, failures, lock = deque(runs), list[Child](), list[Exception](), Lock()

    def feed(child: Child) -> None:
        """Give one process run after run; start another in its place if it dies."""
        while waiting:
            try:
                run = waiting.popleft()
            except IndexError:  # another thread was quicker
                break
            if child.poll() is not None:
                children.append(child := _start(session))
            if error := _train(session, child, run, lock):
                failures.append(error)
        child.communicate()

    with ThreadPoolExecutor(session.jobs) as pool:
        try:
            children += [_start(session) for _ in range(min(session.jobs, len(runs)))]
            _ = session.dataset  # met here first, while they start: a download, or a damaged file
            for done in [pool.submit(feed, child) for child in tuple(children)]:
                done.result()
        except BaseException:
            waiting.clear()
            for child in children:
                child.terminate()
            raise
    raise_all(failures)


def raise_all(failures: Sequence[Exception]) -> None:
    """Raise what ended some runs, if anything did, as one: BadInput where the input was wrong for each, else Failed."""
    if failures:
        kind = BadInput if all(isinstance(error, BadInput) for error in failures) else Failed
        raise kind(*dict.fromkeys(line for error in failures for line in str(error).splitlines()))


def _start(session: "Session") -> Child:
    child = subprocess.Popen(
        [sys.executable, "-m", "kdcli.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # a Ctrl-C is for this process, which ends them
    )
    _send(
        child,
        {
            "arguments": sys.argv[1:],
            "experiment": session.experiment.model_dump(),
            "runs_dir": str(session.runs_dir),
            "data_dir": session.data_dir and str(session.data_dir),
        },
    )
    return child


def _send(child: Child, document: Document) -> None:
    assert child.stdin
    with suppress(BrokenPipeError):  # it died: whoever reads its answer finds out
        print(json.dumps(document), file=child.stdin, flush=True)


def _train(session: "Session", child: Child, run: Run, lock: Lock) -> Exception | None:
    """Have a worker train a run and pass its progress on; returns what went wrong, if anything did."""
    _send(child, asdict(run.spec))
    assert child.stdout
    for line in child.stdout:
        message = json.loads(line)
        if "done" in message:
            return None
        if "error" in message:
            return BadInput(message["error"]) if message["bad_input"] else Failed(f"{run.name}: {message['error']}")
        with lock:
            if "note" in message:
                session.note(message["note"])
            else:
                session.progress(run.name, message["epochs"], message["metrics"])
    return Failed(f"{run.name}: its process ended with exit code {child.wait()}")


def _say(document: Document) -> None:
    try:
        print(json.dumps(document), flush=True)
    except BrokenPipeError:  # nobody listens any more
        os._exit(1)


def _end_with(parent: int) -> None:
    """Let no worker train on when the process that started it was killed, and hold its run."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> None:
    """The worker process."""
    import torch

    from kdcli.recipes import Session, train

    def tell(run: str, epochs: int, metrics: Document) -> None:
        _say({"epochs": epochs, "metrics": metrics})

    def note(line: str) -> None:
        _say({"note": line})

    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    start = json.loads(sys.stdin.readline())
    sys.argv[1:] = start["arguments"]  # for the environment record
    experiment = Experiment.model_validate(start["experiment"])
    torch.set_num_threads(experiment.threads or 1)
    data_dir = start["data_dir"] and Path(start["data_dir"])
    session = Session(experiment, Path(start["runs_dir"]), torch.device("cpu"), data_dir, progress=tell, note=note)
    for line in sys.stdin:
        spec = json.loads(line)
        try:
            train(session, [session.run(Spec(**spec | {"parents": tuple(spec["parents"])}))])
        except Exception as problem:  # the next run may do better
            bad = isinstance(problem, BadInput)
            _say({"error": str(problem) if bad else failure(problem), "bad_input": bad})
        else:
            _say({"done": True})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
