"""A Ray cluster (`--on`): where it is, what of it a job takes, and how to reach it."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from kdcli import BadInput, failure
from kdcli.code import library


class Cluster(NamedTuple):
    """Of Ray: its address, or local; and what of it each job takes."""

    address: str
    cpus: int = 1
    gpus: float = 0

    @contextmanager
    def connected(self) -> Iterator[tuple[Any, Any]]:
        """Ray's module, connected, and a queue for what tasks tell. Raises BadInput where no cluster answers."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # of its own Ray's workers: as kd's processes have it
        ray = library("ray", "ray")
        here, handler = Path(__file__).parents[2], signal.getsignal(signal.SIGTERM)
        variables = {"PYTHONPATH": str(here)} | {key: os.environ[key] for key in ("KD_DATA",) if key in os.environ}
        # Small, since no data go through it; a cluster that is there has its own.
        local = {"include_dashboard": False, "object_store_memory": 80_000_000} if self.address == "local" else {}
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray prints on stdout what befalls a node
            try:
                if self.address != "local":  # where nothing listens Ray would try for minutes
                    host, _, port = self.address.removeprefix("ray://").rpartition(":")
                    socket.create_connection((host, int(port)), 5).close()
                with chdir(here):  # Ray lets workers import from here: not from the user's folder, with a random.py
                    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
                    ray.init(self.address, runtime_env={"env_vars": variables}, **quiet, **local)
            except Exception as error:  # Ray has many
                raise BadInput(f"--on {self.address}: no Ray cluster answers there: {failure(error)}") from None
            try:
                signal.signal(signal.SIGTERM, handler)  # Ray has set its own
                from ray.util.queue import Queue
                from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

                node = ray.get_runtime_context().get_node_id()  # the queue must not be lost with another one
                pinned = NodeAffinitySchedulingStrategy(node, soft=False)
                yield ray, Queue(actor_options={"num_cpus": 0, "scheduling_strategy": pinned})
            finally:
                ray.shutdown()

    def lacking(self, ray: Any) -> str:
        """What to say where no node is large enough for a job; else empty."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            return ""
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"waiting: no node of the Ray cluster has {self.cpus} CPUs{gpus} for a job (resources)"


def address(on: str) -> str:
    """The address that `--on` names: ray is $RAY_ADDRESS or a Ray of our own. Raises BadInput for what is none."""
    found = os.environ.get("RAY_ADDRESS") or "local" if on == "ray" else on
    if found != "local" and not re.fullmatch(r"(ray://)?[^\s:/]+:\d{1,5}", found):
        said = f"--on ray: RAY_ADDRESS is {found}: must be" if on == "ray" else f"--on {on}: must be ray, or"
        raise BadInput(f"{said} the address of a Ray cluster: HOST:PORT or ray://HOST:PORT")
    return found
