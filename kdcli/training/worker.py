"""The other side of an engine: trains what it is told, in another process or on another machine, and tells how it
goes."""

import os
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from kdcli import BadInput, Note, failure
from kdcli.machine import distributed
from kdcli.runs import mirror
from kdcli.runs.directory import Diverged, Places, Run
from kdcli.runs.spec import Spec
from kdcli.training.train import Tell, train


class Ended(NamedTuple):
    """A run that is finished, or what went wrong: lines, which name the run unless the input was bad."""

    run: str
    problem: tuple[str, ...] = ()
    bad_input: bool = False


def attempt(spec: Spec, places: Places, tell: Tell, note: Note) -> Ended:
    """Train one run; what goes wrong is told, not raised."""
    try:
        with mirror.mirrored(spec, places, tell) as told:
            if not Run(places.runs_dir, spec).finished():  # on a node that was lost, or by another machine's kd
                train(spec, places, told, note)
    except Exception as error:  # somebody's own code may raise anything; the next run may do better
        if distributed.WORLD > 1 and not isinstance(error, Diverged):
            raise  # the others may be waiting for this process in the middle of a step
        if isinstance(error, BadInput):
            return Ended(spec.name, error.lines, bad_input=True)
        return Ended(spec.name, (f"{spec.name}: {failure(error)}",))
    return Ended(spec.name)


class _Post:
    """Sends what a task tells through Ray's queue, what is told within a second at once: to send a message takes as
    long as a short epoch."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.waiting, self.sent = queue, list[Any](), 0.0

    def tell(self, *epoch: Any) -> None:
        self.waiting.append(epoch)
        if time.monotonic() - self.sent > 1:
            self.send()

    def note(self, line: str) -> None:
        self.waiting.append(line)
        self.send()

    def send(self) -> None:
        if self.waiting:
            self.queue.put_nowait_batch(self.waiting)
        self.waiting, self.sent = [], time.monotonic()


def task(spec: Spec, places: Places, messages: Any, argv: list[str], folder: str, again: bool) -> Ended:
    """A task of Ray's; `messages` is its queue. `again`: after the loss of a node, whose process may outlive it for an
    instant and hold the run so long."""
    sys.argv = argv
    with suppress(OSError):  # a folder that this node lacks
        os.chdir(folder)
    if places.remote:
        places = places._replace(runs_dir=mirror.folder(places.remote))
    while again and Run(places.runs_dir, spec).status() == "running":
        time.sleep(0.5)
    post = _Post(messages)
    ended = attempt(spec, places, post.tell, post.note)
    post.send()
    return ended


def main() -> None:
    """A process: trains until the one that started it closes the pipe, or dies."""
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
