"""Where runs are trained: one after another in this process, or several at once in single-threaded processes.

Two single-threaded processes finish more work than one process with two threads. A worker is told specs and tells how
they go through a pipe of its own, so that a `print` in somebody's code is no message; all else is in the run
directories.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from kdcli import BadInput, Failed, distributed, failure
from kdcli.plan import Job, distinct, unfinished, usable
from kdcli.runs import Diverged, Places, Spec
from kdcli.train import Note, Tell, train


class Ended(NamedTuple):
    """A run that is finished, or what went wrong: lines, which name the run unless the input was bad."""

    run: str
    problem: tuple[str, ...] = ()
    bad_input: bool = False


def attempt(spec: Spec, places: Places, tell: Tell, note: Note) -> Ended:
    """Train one run; what goes wrong is told, not raised."""
    try:
        train(spec, places, tell, note)
    except Exception as error:  # somebody's own code may raise anything; the next run may do better
        if distributed.WORLD > 1 and not isinstance(error, Diverged):
            raise  # the others may be waiting for this process in the middle of a step
        if isinstance(error, BadInput):
            return Ended(spec.name, error.lines, bad_input=True)
        return Ended(spec.name, (f"{spec.name}: {failure(error)}",))
    return Ended(spec.name)


def obtain(
    jobs: Sequence[Job], places: Places, threads: int | None, at_once: int | None, tell: Tell, note: Note
) -> None:
    """Train the jobs that are not finished; of those that are, check that they can be used, and say so.

    A run alone works with `places`, several at once with a thread each, or `threads`."""
    missing = {run.name: run.spec for run in unfinished(jobs, places)}
    finished = [job.spec for job in distinct(jobs) if job.spec.name not in missing]
    for spec in finished:
        usable(places.open(spec.name), spec, "shown")
    if finished:
        more = f" and {len(finished) - 1} more" if len(finished) > 1 else ""
        note(f"{finished[0].name}{more}: finished before")
    run_all(missing, *share(missing.values(), places, threads, at_once), tell, note)


def share(missing: Iterable[Spec], places: Places, threads: int | None, at_once: int | None) -> tuple[Places, int]:
    """How some runs are trained: with what each, and how many at once; on a GPU one, unless more are asked for."""
    at_once = at_once or (os.cpu_count() or 1 if places.device == "cpu" else 1)
    if sum(spec.train is not None for spec in missing) < 2 or distributed.WORLD > 1:
        at_once = 1  # to combine members is not worth a process; of torchrun's processes all are at one run
    return (places if at_once == 1 else places._replace(threads=threads or 1)), at_once


def run_all(waiting: dict[str, Spec], places: Places, at_once: int, tell: Tell, note: Note) -> None:
    """Train specs, each after those among them that it is made from, and take them out. One that fails takes no other
    down but those that need it: when all have ended, raises what went wrong, BadInput where the input was wrong for
    each, else Failed."""
    unfinished, problems = set(waiting), list[Ended]()

    def ready() -> Spec | None:
        """Take out a spec that nothing it is made from holds up."""
        found = next((spec for spec in waiting.values() if unfinished.isdisjoint(spec.parents)), None)
        return waiting.pop(found.name) if found else None

    here = (attempt(spec, places, tell, note) for spec in iter(ready, None))
    for ended in _in_processes(ready, places, at_once, tell, note) if at_once > 1 else here:
        if ended.problem:
            problems.append(ended)  # never finished: what is made from it never gets ready
        else:
            unfinished.remove(ended.run)
    if problems:
        lines, failed = [line for ended in problems for line in ended.problem], {p.run: [p.run] for p in problems}
        for name, spec in waiting.items():  # in the order of the plan: what it is made from comes before it
            failed[name] = list(dict.fromkeys(run for parent in spec.parents for run in failed.get(parent, [])))
            lines.append(f"{name}: not trained: it is made from what failed ({', '.join(failed[name])})")
        raise (BadInput if all(ended.bad_input for ended in problems) else Failed)(*dict.fromkeys(lines))


class _Worker:
    """A process, and the run that it is at."""

    def __init__(self, places: Places) -> None:
        self.connection, theirs = Pipe()
        # -P and our own path: a file in the user's folder may be called random.py, or that folder hold another kd
        same = f"import sys; sys.path[:] = {sys.path!r}; from kdcli.engine import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", same, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what somebody's code prints
            process_group=0,  # a Ctrl-C is for this process, which ends them
        )
        theirs.close()
        self.connection.send((sys.argv, places))

    def give(self, spec: Spec) -> None:
        self.spec = spec
        with suppress(OSError):  # it died while it was idle: whoever reads its answer finds out
            self.connection.send(spec)

    def receive(self) -> Any:
        """The next message: a line to note, an epoch to tell, or how the run ended, also of a process that died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            name = self.spec.name
            return Ended(name, (f"{name}: its process ended with exit code {self.process.wait()}",))


def _in_processes(
    ready: Callable[[], Spec | None], places: Places, at_once: int, tell: Tell, note: Note
) -> Iterator[Ended]:
    """Train up to so many runs at once, each as soon as it is ready."""
    idle, busy = list[_Worker](), dict[Any, _Worker]()
    try:
        while True:
            while len(busy) < at_once and (spec := ready()):
                worker = idle.pop() if idle else _Worker(places)
                busy[worker.connection] = worker
                worker.give(spec)
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]
                message = worker.receive()
                if isinstance(message, Ended):
                    del busy[connection]
                    idle += [worker] if worker.process.poll() is None else []
                    yield message
                elif isinstance(message, str):
                    note(message)
                else:
                    tell(*message)
    finally:
        for worker in (*idle, *busy.values()):
            worker.process.terminate()
            worker.process.wait()
            worker.connection.close()


def main() -> None:
    """A worker: trains what it is told until the process that started it closes the pipe, or dies."""
    connection, specs = Connection(int(sys.argv[1])), SimpleQueue[Spec]()
    sys.argv, places = connection.recv()  # for the record of where a run was made

    def listen() -> None:
        while True:
            try:
                specs.put(connection.recv())
            except (EOFError, OSError):
                os._exit(1)

    def send(message: Any) -> None:
        try:
            connection.send(message)
        except OSError:  # who started it died: its run is interrupted, it has not failed
            os._exit(1)

    Thread(target=listen, daemon=True).start()
    while True:
        send(attempt(specs.get(), places, lambda *epoch: send(epoch), send))
