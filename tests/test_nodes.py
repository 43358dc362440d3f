"""One command on two nodes, which here are two commands on one machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from src import nodes, records
from src.errors import UserError
from tests.conftest import ROOT, Outcome, two_cores
from tests.test_pipeline import SMALL, figures
from tests.test_wrong_input import refused

TWO = ("trainer=ddp_cpu", "trainer.num_nodes=2", "trainer.devices=1")
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "of the test"}
SAID_BY = ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_LOCALID")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of nodes, and is as it was after the test; a meeting point of its own."""
    for name in SAID_BY:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(HERE, "MASTER_PORT", str(free_pair()))


def free_pair() -> int:
    """A port that is free, as the next one is: tests of several workers run at once."""
    while True:
        with socket.create_server((HERE["MASTER_ADDR"], 0)) as one, suppress(OSError, OverflowError):
            port: int = one.getsockname()[1]
            with socket.create_server((HERE["MASTER_ADDR"], port + 1)):
                return port


def start(node: int, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Python as node ``node``, in a folder of its own; its words go to a file beside that."""
    (folder / str(node)).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **HERE, "NODE_RANK": str(node), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{node}.txt", "wb") as words:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=folder / str(node), env=environment, stdout=words, stderr=words
        )


def words(folder: Path, node: int) -> str:
    return (folder / f"{node}.txt").read_text()


def both(folder: Path, *works: str) -> list[subprocess.Popen[bytes]]:
    """Two nodes that do pieces of code one after another, whatever becomes of each."""
    script = f"""
import sys
from functools import partial
from src import nodes
from src.errors import UserError
try:
    if nodes.join(["trainer.num_nodes=2"]):
        sys.exit()
    for work in {works!r}:
        try:
            nodes.together(partial(exec, work), 2)
        except Exception as error:
            print("failed:", error, flush=True)
except UserError as error:
    sys.exit(f"error: {{error}}")
"""
    return [start(node, folder, "-c", script) for node in (0, 1)]


WAITS = """
import multiprocessing, os, time
node = os.environ["NODE_RANK"]
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(90,))
process.start()
print(node, "waits", flush=True)
process.join()
raise RuntimeError(f"child {process.exitcode}")
"""


def test_every_node_does_what_node_0_asks_for_until_it_is_dismissed(tmp_path: Path) -> None:
    done = both(tmp_path, "print('first')", "print('second')")
    assert [process.wait(60) for process in done] == [0, 0]
    for node in (0, 1):
        assert words(tmp_path, node).splitlines()[1:] == ["first", "second"]


def test_a_node_that_fails_is_named_and_the_next_work_is_done(tmp_path: Path) -> None:
    """Node 0 waits in a process of its own, as Lightning does; it must not wait for one that will not come."""
    fails = "import os\nif os.environ['NODE_RANK'] == '1': raise ValueError('out of memory')\n" + WAITS
    started = time.monotonic()
    done = both(tmp_path, fails, "print('second')")
    assert [process.wait(60) for process in done] == [0, 0]
    assert time.monotonic() - started < 60
    assert words(tmp_path, 0).splitlines()[1:] == ["0 waits", "failed: node 1: ValueError: out of memory", "second"]
    assert words(tmp_path, 1).splitlines()[1:] == ["node 1: out of memory", "second"]


def test_a_node_0_that_fails_frees_the_others(tmp_path: Path) -> None:
    fails = "import os\nif os.environ['NODE_RANK'] == '0': raise ValueError('out of memory')\n" + WAITS
    done = both(tmp_path, fails, "print('second')")
    assert [process.wait(60) for process in done] == [0, 0]
    assert words(tmp_path, 0).splitlines()[1:] == ["failed: out of memory", "second"]
    assert "node 1: node 0: ValueError: out of memory" in words(tmp_path, 1)
    assert words(tmp_path, 1).splitlines()[-1] == "second"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_that_is_killed_is_noticed(tmp_path: Path, killed: int) -> None:
    """Although its child lives on, which was forked with its connection."""
    done = both(tmp_path, WAITS)
    while any(f"{node} waits" not in words(tmp_path, node) for node in (0, 1)):
        time.sleep(0.1)
    done[killed].send_signal(signal.SIGKILL)
    assert done[1 - killed].wait(60) == (1 if killed == 0 else 0)
    assert f"node {killed}: has gone" in words(tmp_path, 1 - killed).splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["trainer.num_nodes=2", "NODE_RANK", "MASTER_ADDR"]),
        ({"NODE_RANK": "2"}, ["NODE_RANK", "0 to 1", "number 2"]),
        ({"NODE_RANK": "0"}, ["MASTER_ADDR=None"]),
        ({"GROUP_RANK": "1", **HERE, "MASTER_PORT": "any"}, ["MASTER_PORT=any"]),
        ({"SLURM_NODEID": "0", "SLURM_LOCALID": "1", **HERE}, ["several times on one node", "--ntasks-per-node=1"]),
        ({"NODE_RANK": "0", **HERE, "MASTER_ADDR": "192.0.2.1"}, ["MASTER_ADDR=192.0.2.1", "cannot listen"]),
        ({"NODE_RANK": "0", **HERE}, ["no word", "nodes [1]"]),
        ({"NODE_RANK": "1", **HERE}, ["NODE_RANK=1", "no answer from 127.0.0.1:NEXT"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_nodes_that_cannot_meet(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: list[str]
) -> None:
    monkeypatch.setattr(nodes, "PATIENCE", 0.0)
    for name, value in environment.items():
        monkeypatch.setenv(name, HERE[name] if value == "of the test" else value)
    outcome = command(*SMALL, *TWO)
    following = str(int(HERE["MASTER_PORT"]) + 1)
    refused(outcome, *(part.replace("NEXT", following) for part in expected))
    assert list(outcome.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("trainer", "mends"), [("cpu", "trainer=ddp_cpu"), pytest.param("ddp_cpu", "on its command line", marks=two_cores)]
)
def test_nodes_that_the_command_line_does_not_name(
    command: Callable[..., Outcome], tmp_path: Path, trainer: str, mends: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  num_nodes: 2\n")
    mine = (f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")
    refused(command(*SMALL, f"trainer={trainer}", *mine), "trainer.num_nodes=2", mends)


def test_slurm_says_who_is_where(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"NODEID": "1", "LOCALID": "0", "NODELIST": "gpu[07-08]", "JOB_ID": "91234", "NTASKS": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    assert nodes._meeting(2) == ("gpu07", 15000 + 1234 + 1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="ntasks-per-node"):
        nodes._meeting(2)


def test_somebody_else_at_the_port_is_not_a_node(tmp_path: Path) -> None:
    first = start(0, tmp_path, "-c", "from src import nodes; nodes.join(['trainer.num_nodes=2']); print('all here')")
    while "waits" not in words(tmp_path, 0):
        time.sleep(0.1)
    with socket.create_connection((HERE["MASTER_ADDR"], int(HERE["MASTER_PORT"]) + 1)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    other = start(1, tmp_path, "-c", "from src import nodes; nodes.join(['trainer.num_nodes=2'])")
    assert (first.wait(60), other.wait(60)) == (0, 0)
    assert "all here" in words(tmp_path, 0)


@two_cores
@pytest.mark.slow
def test_two_nodes_measure_what_two_processes_of_one_do(tmp_path: Path) -> None:
    """Training included: the same records to the last digit, each once, each image once; node 1 writes nothing."""
    sweep = ("-m", "src.train", "-m", *SMALL, "threat.eps=0.15", "limit.test_images=101", "defense=none,autoencoder")
    together = [start(node, tmp_path, *sweep, f"paths.artifacts={tmp_path / 'two'}", *TWO) for node in (0, 1)]
    assert [process.wait(900) for process in together] == [0, 0], words(tmp_path, 0) + words(tmp_path, 1)
    assert list((tmp_path / "1").iterdir()) == []
    one = start(2, tmp_path, *sweep, f"paths.artifacts={tmp_path / 'one'}", "trainer=ddp_cpu", "trainer.devices=2")
    assert one.wait(900) == 0, words(tmp_path, 2)

    found = [records.find([tmp_path / name / "records"]) for name in ("two", "one")]
    assert len(list((tmp_path / "two" / "records").glob("*.json"))) == len(found[0]) == 4
    assert [figures(record) for record in found[0]] == [figures(record) for record in found[1]]
    for record in found[0]:
        with np.load(tmp_path / "two" / "records" / f"{record.key}.npz") as arrays:
            assert arrays["index"].tolist() == list(range(101))
