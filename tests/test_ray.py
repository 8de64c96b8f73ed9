"""Trainings on a Ray cluster of two nodes on this machine, and what becomes of them where something is lost."""

import contextlib
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from conftest import Done, Shell, kd_here
from test_engine import NETS, models, results, statuses, weights, without_report
from test_resume import Forked, eager, nothing, wait_until

ray = pytest.importorskip("ray")
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
LONG = ["train-teacher", "tiny.yaml", "--seeds", "0-1", "--epochs", "60"]
# A net whose process dies in its second epoch.
DYING = """

class Dying(Failing):
    def forward(self, x):
        try:
            return super().forward(x)
        except KeyError:
            import os

            os._exit(7)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The variables with which a real S3 server on this machine is reached, in which s3://bucket is."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        pytest.importorskip("s3fs").S3FileSystem().mkdir("bucket")
        yield variables
    server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: dict[str, str]) -> Iterator[Any]:
    """A node, to which tests add another; what is told of Ray's use goes nowhere."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    yield cluster
    cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """A second node, gone after the test if it is not before."""
    node = cluster.add_node(**NODE)
    yield node
    with contextlib.suppress(ValueError):
        cluster.remove_node(node)


def fast(patch: pytest.MonkeyPatch) -> None:
    """Save after every epoch, and leave out the report."""
    eager(patch)
    without_report(patch)


def with_variables(variables: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    fast(patch)
    for key, value in variables.items():
        patch.setenv(key, value)


def under_way(folder: Path, count: int) -> list[Path]:
    """So many runs that have saved a state."""
    wait_until(lambda: len(list(folder.glob("runs/*/*/*/state"))) >= count)
    return [state.parent for state in folder.glob("runs/*/*/*/state")]


def finish(process: Forked) -> Done:
    out, err = process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out, err)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the long trainings, which nothing interrupted."""
    shell = Shell(tmp_path_factory.mktemp("alone"))
    done = kd_here(shell.folder, *LONG, "--jobs", "1")
    assert done.code == 0, done.err
    return weights(shell.folder / "runs")


def holders(folder: Path) -> dict[int, Path]:
    """The processes that write a run, and its directory."""
    found = dict[int, Path]()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if (file := descriptor.readlink()).name == "lock" and file.is_relative_to(folder):
                found[int(descriptor.parts[2])] = file.parent
    return found


def workers(node: Any) -> set[int]:
    """The processes that a node has started."""
    (raylet,) = node.all_processes["raylet"]
    files = Path(f"/proc/{raylet.process.pid}/task").glob("*/children")
    return {int(pid) for file in files for pid in file.read_text().split()}


def held(folder: Path, node: Any) -> list[Path]:
    """The directories of the runs that a node's processes write."""
    return [run for pid, run in holders(folder).items() if pid in workers(node)]


def lose(node: Any) -> None:
    """Kill all of a node at once: its workers would outlive Ray's own process for seconds, and finish short runs."""
    left = workers(node)
    node.kill_raylet()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_an_experiment_on_ray_is_bit_for_bit_the_local_one(
    kd: Shell, cluster: Any, second: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the user's folder has a module called like one that workers import."""
    without_report(monkeypatch)
    local = kd_here(kd.folder, "run", "tiny.yaml", "--json", "--jobs", "1", "--runs-dir", "local")
    (kd.folder / "random.py").write_text("raise SystemExit('a file of the user was run')\n")
    address = partial(with_variables, {"RAY_ADDRESS": cluster.address})
    with Forked(kd.folder, ["run", "tiny.yaml", "--json", "--on", "ray"], address) as process:
        done = finish(process)
    assert done.code == 0, done.err
    assert weights(kd.folder / "runs") == weights(kd.folder / "local")
    assert done.json["points"][0]["table"] == local.json["points"][0]["table"]
    assert done.err.count(": epoch 6/6, ") == 7


def test_a_lost_node_costs_nothing_but_the_epochs_since_the_last_state(
    kd: Shell, cluster: Any, second: Any, alone: dict[str, bytes]
) -> None:
    with Forked(kd.folder, [*LONG, "--on", cluster.address], fast) as process:
        wait_until(lambda: any((run / "state").exists() for run in held(kd.folder, second)))
        lose(second)
        done = finish(process)
    assert done.code == 0, done.err
    assert weights(kd.folder / "runs") == alone
    assert (
        len(re.findall(r"^tiny/train-teacher/\d-\w+: its node is lost: it goes on elsewhere$", done.err, re.MULTILINE))
        == 1
    )
    (epoch,) = re.findall(r": continued after epoch (\d+)$", done.err, re.MULTILINE)
    assert int(epoch) >= 1
    assert "restarted" not in done.err
    assert "raylet" not in done.out + done.err


def test_a_driver_that_is_killed_goes_on_where_it_was_beside_another(
    kd: Shell, cluster: Any, second: Any, alone: dict[str, bytes]
) -> None:
    """Two of them in one folder, of which one may have to wait for the other."""
    words = [*LONG, "--on", cluster.address]
    with Forked(kd.folder, words, fast) as process:
        under_way(kd.folder, 2)
        process.kill()
        process.communicate()
        wait_until(lambda: statuses(kd.folder) == ["interrupted"] * 2)
    other = Shell(kd.folder / "other").folder
    with Forked(kd.folder, words, fast) as one, Forked(other, [*words, "--runs-dir", "../runs"], fast) as two:
        both = [finish(one), finish(two)]
    for done in both:
        assert done.code == (2 if "by another kd" in done.err else 0), done.err  # it is told as without Ray
        assert "restarted" not in done.err
    assert sum(len(re.findall(r": continued after epoch \d+$", done.err, re.MULTILINE)) for done in both) == 2
    assert weights(kd.folder / "runs") == alone


def test_ctrl_c_ends_the_tasks_which_go_on_anywhere(
    kd: Shell, cluster: Any, second: Any, alone: dict[str, bytes]
) -> None:
    with Forked(kd.folder, [*LONG, "--on", cluster.address], fast) as process:
        under_way(kd.folder, 2)
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    wait_until(lambda: not holders(kd.folder))
    assert statuses(kd.folder) == ["interrupted"] * 2
    goes_on_here(kd.folder, 2, alone)


def test_a_disk_that_is_full_on_one_node_takes_no_other_down(
    kd: Shell, cluster: Any, second: Any, alone: dict[str, bytes]
) -> None:
    """A limit on the size of a worker's files stands in for it."""
    with Forked(kd.folder, [*LONG, "--on", cluster.address], fast) as process:
        under_way(kd.folder, 2)
        worker, path = next(iter(holders(kd.folder).items()))
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        done = finish(process)
    assert done.code == 1, done.err
    said = f"{path.relative_to(kd.folder / 'runs')}: {path}/state: File too large"
    assert re.findall("^kd: failed: (.*)", done.err, re.MULTILINE) == [said]
    assert sorted(statuses(kd.folder)) == ["completed", "failed"]
    goes_on_here(kd.folder, 1, alone)


def goes_on_here(folder: Path, count: int, alone: dict[str, bytes]) -> None:
    """Without Ray so many runs go on where they were, and end as if nothing had happened."""
    done = kd_here(folder, *LONG, "--jobs", "1")
    assert done.code == 0, done.err
    assert len(re.findall(r": continued after epoch \d+$", done.err, re.MULTILINE)) == count
    assert weights(folder / "runs") == alone


def test_a_net_that_fails_and_a_process_that_dies_take_no_other_down(kd: Shell) -> None:
    """On a Ray of kd's own, which ends with it."""
    (kd.folder / "nets.py").write_text(NETS + DYING)
    words = ["ensemble", "own.yaml", "--on", "ray", *models("Failing", "Dying", "Net"), "--members", "3"]
    with Forked(kd.folder, words, fast) as process:
        done = finish(process)
    assert done.code == 1, done.err
    assert "KeyError: 'head'" in done.err
    assert re.search(r"^kd: failed: own/train-teacher/1-\w+: .*died", done.err, re.MULTILINE), done.err
    assert done.err.count(": not trained: it is made from ") == 1
    assert "Traceback" not in done.err
    assert [result["status"] for result in results(kd.folder)] == ["failed", "running", "completed"]
    assert statuses(kd.folder) == ["failed", "interrupted", "completed"]


def test_a_training_takes_what_the_file_says(kd: Shell, cluster: Any) -> None:
    """More CPUs than a node has are waited for; a GPU that only the cluster claims to have is asked for by name."""
    words = ["train-teacher", "tiny.yaml", "--on", cluster.address, "--set"]
    with Forked(kd.folder, [*words, "resources.cpus=2"], nothing) as process:
        wait_until(lambda: process.err.exists() and "waiting: " in process.err.read_text())
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done.code == 130
    assert done.err.splitlines()[0] == "waiting: no node of the Ray cluster has 2 CPUs for a job (resources)"
    node = cluster.add_node(**NODE, num_gpus=1)
    with Forked(kd.folder, [*words, "resources.gpus=0.5", "--seeds", "0-1"], nothing) as process:
        done = finish(process)
    cluster.remove_node(node)
    assert (done.code, done.err) == (
        2,
        "--device cuda: this machine has no usable CUDA device; use --device cpu or auto\n",
    )
    more = ["--dry-run", "--json"]
    plain = kd_here(kd.folder, "train-teacher", "tiny.yaml", *more).json["runs"]
    assert kd_here(kd.folder, *words, "resources={cpus: 3, gpus: 2}", *more).json["runs"] == plain
    done = kd_here(kd.folder, *words, "resources.gpus=1.5")
    assert (
        done.err == "--set resources.gpus=1.5: resources.gpus: must be a fraction of one, or a whole number, not 1.5\n"
    )


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("slurm", "--on slurm: must be ray, or the address of a Ray cluster: HOST:PORT or ray://HOST:PORT"),
        ("127.0.0.1:1", "--on 127.0.0.1:1: no Ray cluster answers there: Connection refused"),
        ("ray://127.0.0.1:1", "--on ray://127.0.0.1:1: no Ray cluster answers there: Connection refused"),
    ],
)
def test_what_is_no_cluster_is_told_in_a_line(kd: Shell, on: str, said: str) -> None:
    done = kd_here(kd.folder, "train-teacher", "tiny.yaml", "--on", on)
    assert (done.code, done.err.splitlines()) == (2, [said])


def test_an_extra_that_is_missing_is_named(kd: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = kd_here(kd.folder, "train-teacher", "tiny.yaml", "--on", "ray")
    assert (done.code, done.err) == (2, "ray is not installed: pip install 'kdcli[ray]'\n")


def test_a_bucket_is_one_runs_folder_for_nodes_that_share_none(
    kd: Shell, bucket: dict[str, str], cluster: Any, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a cache of its own, the driver too; one of them is lost."""
    nodes = [cluster.add_node(**NODE, env_vars={"XDG_CACHE_HOME": str(kd.folder / name)}) for name in ("a", "b")]
    s3, folder = pytest.importorskip("s3fs").S3FileSystem(use_listings_cache=False), f"bucket/{token_hex(8)}/runs"
    there = ["--runs-dir", f"s3://{folder}"]
    here = partial(with_variables, bucket | {"XDG_CACHE_HOME": str(kd.folder / "driver")})
    try:
        with Forked(kd.folder, [*LONG, "--on", cluster.address, *there], here) as process:
            wait_until(lambda: len(s3.glob(f"{folder}/*/*/*/state")) == 2)
            for node in nodes:
                lose(node)
            done = finish(process)
    finally:
        for node in nodes:
            cluster.remove_node(node)
    assert done.code == 0, done.err
    assert ": continued after epoch " in done.err
    assert "restarted" not in done.err
    names = [name.rpartition("/")[0] for name in alone]
    kept = [
        "config.yaml",
        "environment.json",
        "logits.safetensors",
        "metrics.jsonl",
        "result.json",
        "weights.safetensors",
    ]
    for name in names:
        found = [path.rpartition("/")[2] for path in s3.find(f"{folder}/{name}")]
        assert [file for file in found if "tfevents" not in file] == kept
        assert s3.cat_file(f"{folder}/{name}/weights.safetensors") == alone[f"{name}/weights.safetensors"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(kd.folder / "another"))
    listed = kd_here(kd.folder, "runs", "--json", *there).json["runs"]
    assert sorted((run["run"], run["status"]) for run in listed) == sorted((name, "completed") for name in names)
    assert kd_here(kd.folder, "runs", "rm", "--yes", names[0], *there).code == 0
    with Forked(kd.folder, ["runs", "--json", *there], here) as process:  # which had it
        done = finish(process)
    assert [run["run"] for run in done.json["runs"]] == names[1:]


def test_a_run_that_was_sent_in_part_is_sent_again(kd: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network failed before its result was there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = tmp_path / "there"
    there.mkdir()
    words = ["--runs-dir", f"local://{there}"]
    assert kd_here(kd.folder, "train-teacher", "tiny.yaml", "--epochs", "1", *words).code == 0
    (result,) = there.rglob("result.json")
    whole = result.read_bytes()
    result.unlink()
    (listed,) = kd_here(kd.folder, "runs", "--json", *words).json["runs"]
    assert listed["status"] == "completed"
    assert result.read_bytes() == whole


def test_an_address_of_no_runs_folder_is_told_in_a_line(kd: Shell, bucket: dict[str, str]) -> None:
    """That of a folder here is the folder."""
    for address, said in (
        ("s3://nothing/runs", "there is no such bucket or folder"),
        ("s4://bucket", "Protocol not known: s4"),
    ):
        done = kd_here(kd.folder, "runs", "--runs-dir", address)
        assert (done.code, done.err.startswith(f"--runs-dir {address}: "), len(done.err.splitlines())) == (2, True, 1)
        assert said in done.err
    folder = f"file://{kd.folder}/some"
    assert kd_here(kd.folder, "train-teacher", "tiny.yaml", "--epochs", "1", "--runs-dir", folder).code == 0
    (listed,) = kd_here(kd.folder, "runs", "--json", "--runs-dir", str(kd.folder / "some")).json["runs"]
    assert listed["status"] == "completed"
