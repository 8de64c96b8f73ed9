"""Where runs are trained: one after another in this process, several at once in single-threaded processes, or on Ray.

Two single-threaded processes finish more work than one process with two threads. A worker is told specs and tells how
they go through a pipe of its own, so that a `print` in somebody's code is no message; all else is in the run
directories.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from kdcli import BadInput, Failed, Note, cores, failure
from kdcli.machine import distributed
from kdcli.machine.cluster import Cluster
from kdcli.runs.directory import Places
from kdcli.runs.spec import Spec
from kdcli.training.train import Tell
from kdcli.training.worker import Ended, attempt, task

Ready = Callable[[], Spec | None]
Hear = Callable[[Any], None]  # a line to note, or an epoch to tell


def share(missing: Iterable[Spec], places: Places, threads: int | None, at_once: int | None) -> tuple[Places, int]:
    """How some runs are trained: with what each, and how many at once; on a GPU one, unless more are asked for."""
    at_once = at_once or (cores() if places.device == "cpu" else 1)
    if sum(spec.train is not None for spec in missing) < 2 or distributed.WORLD > 1:
        at_once = 1  # to combine members is not worth a process; of torchrun's processes all are at one run
    return (places if at_once == 1 else places._replace(threads=threads or 1)), at_once


def run_all(
    waiting: dict[str, Spec], places: Places, at_once: int, tell: Tell, note: Note, cluster: Cluster | None = None
) -> None:
    """Train specs, each after those among them that it is made from, and take them out. One that fails takes no other
    down but those that need it: when all have ended, raises what went wrong, BadInput where the input was wrong for
    each, else Failed."""
    unfinished, problems = set(waiting), list[Ended]()

    def ready() -> Spec | None:
        """Take out a spec that nothing it is made from holds up."""
        found = next((spec for spec in waiting.values() if unfinished.isdisjoint(spec.parents)), None)
        return waiting.pop(found.name) if found else None

    def hear(message: Any) -> None:
        note(message) if isinstance(message, str) else tell(*message)

    here = (attempt(spec, places, tell, note) for spec in iter(ready, None))
    several = _in_processes(ready, places, at_once, hear) if at_once > 1 else here
    for ended in _on_ray(ready, places, at_once, hear, cluster) if cluster else several:
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
        same = f"import sys; sys.path[:] = {sys.path!r}; from kdcli.training.worker import main; main()"
        command = [sys.executable, "-P", "-c", same, str(theirs.fileno())]
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": 2}  # 2: what somebody's code prints
        # a group of its own: a Ctrl-C is for this process, which ends them
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0, **quiet)
        theirs.close()
        self.connection.send((sys.argv, places))

    def give(self, spec: Spec) -> None:
        self.spec = spec
        with suppress(OSError):  # it died while it was idle: whoever reads its answer finds out
            self.connection.send(spec)

    def receive(self) -> Any:
        """The next message, or how the run ended, also of a process that died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            name = self.spec.name
            return Ended(name, (f"{name}: its process ended with exit code {self.process.wait()}",))


def _in_processes(ready: Ready, places: Places, at_once: int, hear: Hear) -> Iterator[Ended]:
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
                else:
                    hear(message)
    finally:
        for worker in (*idle, *busy.values()):
            worker.process.terminate()
            worker.process.wait()
            worker.connection.close()


def _on_ray(ready: Ready, places: Places, at_once: int, hear: Hear, cluster: Cluster) -> Iterator[Ended]:
    """Train up to so many runs at once as tasks of a Ray cluster; one whose node is lost goes on elsewhere."""
    with cluster.connected() as (ray, messages):
        ours = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "max_retries": 0}  # those of code that crashes too
        job, tasks, lost = ray.remote(task).options(**ours), dict[Any, Spec](), list[Spec]()
        if line := cluster.lacking(ray):
            hear(line)
        try:
            while True:
                while len(tasks) < at_once and (spec := lost.pop() if (again := bool(lost)) else ready()):
                    tasks[job.remote(spec, places, messages, sys.argv, os.getcwd(), again)] = spec
                if not tasks:
                    return
                ended, _ = ray.wait(list(tasks), timeout=1)
                for message in messages.get_nowait_batch(messages.qsize()):
                    hear(message)
                for one in ended:
                    spec = tasks.pop(one)
                    try:
                        yield ray.get(one)
                    except ray.exceptions.NodeDiedError:
                        hear(f"{spec.name}: its node is lost: it goes on elsewhere")
                        lost.append(spec)
                    except ray.exceptions.RayError as error:
                        yield Ended(spec.name, (f"{spec.name}: {failure(error)}",))
        finally:
            for one in tasks:
                ray.cancel(one, force=True)
