"""Where runs are trained: one after another in this process, or several at once in single-threaded processes.

Two single-threaded processes finish more work than one process with two threads. A worker is told specs and tells how
they go through a pipe of its own, so that a `print` in somebody's code is no message; all else is in the run
directories.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from graphlib import TopologicalSorter
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from kdcli import BadInput, Failed, failure
from kdcli.plan import Job, distinct, usable
from kdcli.runs import Epoch, Places, Run, Spec, git_commit
from kdcli.train import Note, Tell, train


class Ended(NamedTuple):
    """A run that is finished, or what went wrong: lines, which name the run unless the input was bad."""

    run: str
    problem: tuple[str, ...] = ()
    bad_input: bool = False


class Progress(NamedTuple):
    """A finished epoch of a run."""

    run: str
    epochs: int
    epoch: Epoch


def attempt(spec: Spec, places: Places, tell: Tell, note: Note) -> Ended:
    """Train one run; what goes wrong is told, not raised."""
    try:
        train(spec, places, tell, note)
    except BadInput as error:
        return Ended(spec.name, error.lines, bad_input=True)
    except Exception as error:  # somebody's own code may raise anything; the next run may do better
        return Ended(spec.name, (f"{spec.name}: {failure(error)}",))
    return Ended(spec.name)


def obtain(jobs: Sequence[Job], places: Places, of_workers: Places, at_once: int, tell: Tell, note: Note) -> None:
    """Train the jobs that are not finished; of those that are, check that they can be used, and say so.

    A run alone works with `places`, several at once with `of_workers`."""
    missing, finished, commit = list[Spec](), dict[str, list[str]](), git_commit()
    for spec in distinct(jobs):
        if Run(places.runs_dir, spec).finished() is None:
            missing.append(spec)
            continue
        run = usable(places.open(spec.name), spec, "shown")
        made_by = run.environment().get("git_commit")
        finished.setdefault(f", by commit {made_by or 'unknown'}" if made_by != commit else "", []).append(run.name)
    for made_by, (first, *others) in finished.items():
        note(f"{first}{f' and {len(others)} more' if others else ''}: finished before{made_by}")
    trained = sum(spec.train is not None for spec in missing)  # to combine members is not worth a process
    alone = at_once == 1 or trained < 2 or places.device != "cpu"
    run_all(missing, places if alone else of_workers, 1 if alone else at_once, tell, note)


def run_all(specs: Sequence[Spec], places: Places, at_once: int, tell: Tell, note: Note) -> None:
    """Train specs, each after those among them that it is made from. One that fails takes no other down but those that
    need it: when all have ended, raises what went wrong, BadInput where the input was wrong for each, else Failed."""
    waiting = {spec.name: spec for spec in specs}
    order = TopologicalSorter({s.name: [p for p in s.parents if p in waiting] for s in specs})
    order.prepare()
    problems = list[Ended]()
    work = _in_processes(waiting, order, places, at_once, tell, note) if at_once > 1 else None
    for ended in work or _here(waiting, order, places, tell, note):
        if ended.problem:
            problems.append(ended)  # never done: what is made from it never gets ready
        else:
            order.done(ended.run)
    if problems:
        failed = ", ".join(ended.run for ended in problems)
        given_up = [f"{name}: not trained: it is made from what failed ({failed})" for name in waiting]
        kind = BadInput if all(ended.bad_input for ended in problems) else Failed
        raise kind(*dict.fromkeys([*(line for ended in problems for line in ended.problem), *given_up]))


def _here(
    waiting: dict[str, Spec], order: "TopologicalSorter[str]", places: Places, tell: Tell, note: Note
) -> Iterator[Ended]:
    """Train one run after another, taking each out of `waiting`."""
    ready = list[str]()
    while ready := [*ready, *order.get_ready()]:
        yield attempt(waiting.pop(ready.pop(0)), places, tell, note)


@dataclass
class _Worker:
    """A process, and the run that it is at."""

    process: subprocess.Popen[bytes]
    connection: Connection
    spec: Spec | None = None

    @classmethod
    def start(cls, places: Places) -> "_Worker":
        ours, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "kdcli.engine", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what somebody's code prints
            process_group=0,  # a Ctrl-C is for this process, which ends them
        )
        theirs.close()
        ours.send((sys.argv, places))
        return cls(process, ours)

    def give(self, spec: Spec) -> None:
        self.spec = spec
        with suppress(OSError):  # it died while it was idle: whoever reads its answer finds out
            self.connection.send(spec)

    def receive(self) -> Progress | Ended | str:
        """The next message; of a process that has died, how its run ended."""
        try:
            message: Progress | Ended | str = self.connection.recv()
        except (EOFError, OSError):
            assert self.spec
            name = self.spec.name
            return Ended(name, (f"{name}: its process ended with exit code {self.process.wait()}",))
        return message


def _in_processes(
    waiting: dict[str, Spec], order: "TopologicalSorter[str]", places: Places, at_once: int, tell: Tell, note: Note
) -> Iterator[Ended]:
    """Train up to so many runs at once, taking each out of `waiting`."""
    ready, idle, busy = list[str](), list[_Worker](), dict[Connection, _Worker]()
    try:
        while (ready := [*ready, *order.get_ready()]) or busy:
            while ready and len(busy) < at_once:
                worker = idle.pop() if idle else _Worker.start(places)
                busy[worker.connection] = worker
                worker.give(waiting.pop(ready.pop(0)))
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                message = worker.receive()
                if isinstance(message, Progress):
                    tell(*message)
                elif isinstance(message, str):
                    note(message)
                else:
                    del busy[connection]
                    idle += [worker] if worker.process.poll() is None else []
                    yield message
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

    Thread(target=listen, daemon=True).start()
    while True:
        ended = attempt(
            specs.get(),
            places,
            lambda run, epochs, epoch: connection.send(Progress(run, epochs, epoch)),
            connection.send,
        )
        connection.send(ended)


if __name__ == "__main__":
    # pickles of this module's classes name kdcli.engine, not __main__
    from kdcli.engine import main as worker

    worker()
