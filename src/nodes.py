"""One command on several machines: node 0 runs it, the others lend their devices.

It is started once on each node. Node 0 runs it as ever, and it alone reads the cache, holds locks and writes. The
others wait for what node 0 hands to Lightning, a training or a pass over the test images, and run that at the same
time; Lightning's processes then find one another.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from src.errors import UserError

PATIENCE = 300.0  # seconds that the nodes wait for one another at the start
_RANKS = ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID")  # by hand, by torchrun, by srun, in Lightning's order
_GONE = "has gone; it said why, or was killed"
_peers: dict[int, Connection] = {}  # by node: node 0 has all the others, another one has node 0


def join(arguments: Sequence[str]) -> bool:
    """Bring the nodes that a command line asks for together.

    Returns:
        False: this is node 0, or the only one, and has a job to do. True: this is another, and all is done.

    Raises:
        UserError: the environment does not say which node this is, or others do not come.
    """
    found = [re.fullmatch(r"\+{0,2}trainer\.num_nodes=(\d+)", argument) for argument in arguments]
    count = max((int(match[1]) for match in found if match), default=1)
    if count == 1 or {"+plan=true", "--cfg", "--help"} & set(arguments):
        return False
    mine = next((os.environ[name] for name in _RANKS if name in os.environ), "")
    if not mine.isdigit() or int(mine) >= count:
        raise UserError(
            f"trainer.num_nodes={count}: start the same command once on each node, by srun or torchrun, or with "
            f"NODE_RANK (0 to {count - 1}), MASTER_ADDR (of node 0) and MASTER_PORT in its environment; this node has "
            + (f"the number {mine}" if mine else "no number")
        )
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) > 0:
        raise UserError(
            f"trainer.num_nodes={count}: started several times on one node. Start it once (--ntasks-per-node=1, "
            "--nproc-per-node=1): trainer.devices says how many processes a node gets"
        )
    host, port = _meeting(count)
    os.environ.update(NODE_RANK=mine, MASTER_ADDR=host)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # Lightning's processes are not torchrun's
    os.register_at_fork(after_in_child=_close)
    if int(mine):
        _follow(int(mine), host, port)
        return True
    _assemble(host, port, count)
    atexit.register(_dismiss)
    return False


def together(work: Callable[[], None], count: int) -> None:
    """Do ``work``, which makes a Trainer of ``count`` nodes and runs it, on all of them at once. It has to pickle.

    Raises:
        UserError: another node failed first; or the nodes were not brought together.
    """
    if count == 1:
        return work()
    if len(_peers) != count - 1:
        raise UserError(f"trainer.num_nodes={count}: give it to python -m src.train itself, on its command line")
    with socket.create_server((os.environ["MASTER_ADDR"], 0)) as free:
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])  # for Lightning's processes, who meet anew each time
    order = pickle.dumps((os.environ["MASTER_PORT"], work))
    for node, peer in _peers.items():
        try:
            peer.send_bytes(order)
        except OSError:
            raise UserError(f"node {node}: {_GONE}") from None
    _beside(work)


def _beside(work: Callable[[], None]) -> None:
    """Do ``work`` while the peers do it. Who fails tells the others: theirs would wait for its processes."""
    over, heard = threading.Event(), list[str]()

    def listen(node: int, peer: Connection) -> None:
        try:
            said = peer.recv_bytes().decode()
        except (OSError, EOFError):
            said = _GONE
        if said:
            heard.append(f"node {node}: {said}")
            while not over.wait(0.5):
                for child in multiprocessing.active_children():
                    child.kill()

    ears = [threading.Thread(target=listen, args=item, daemon=True) for item in _peers.items()]
    for ear in ears:
        ear.start()
    said = "interrupted"
    try:
        work()
        said = ""
    except Exception as error:
        line = str(error).strip().rpartition("\n")[2]
        said = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
        if heard:
            raise UserError("; ".join(heard)) from error
        raise
    finally:
        over.set()
        for peer in _peers.values():
            with suppress(OSError):
                peer.send_bytes(said.encode())
        for ear in ears if said != "interrupted" else ():
            ear.join()  # what they say now belongs to this work, not to the next


def _follow(mine: int, host: str, port: int) -> None:
    """Do what node 0 asks for until it is done."""
    end = time.monotonic() + PATIENCE
    while not _peers:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.sendall(str(mine).encode())
            _peers[0] = _opened(connection)
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"NODE_RANK={mine}: no answer from {host}:{port} within {PATIENCE:.0f} s ({error}); does the same "
                    "command run there with NODE_RANK=0?"
                ) from None
            time.sleep(1)
    print(f"node {mine}: works for node 0, which writes everything", flush=True)
    try:
        while order := _peers[0].recv_bytes():

            def work(order: bytes = order) -> None:
                os.environ["MASTER_PORT"], todo = pickle.loads(order)
                todo()

            try:
                _beside(work)
            except Exception as error:  # node 0 knows, and may go on with another cell
                print(f"node {mine}: {error}", file=sys.stderr, flush=True)
    except (OSError, EOFError):
        raise UserError(f"node 0: {_GONE}") from None


def _meeting(count: int) -> tuple[str, int]:
    """Where node 0 listens. The port after MASTER_PORT: torchrun itself listens at that one."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (host and port) and "SLURM_NODEID" in os.environ:
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

        try:
            slurm = SLURMEnvironment()
        except RuntimeError as error:
            raise UserError(f"trainer.num_nodes={count}: {error}") from None
        host, port = slurm.main_address, str(slurm.main_port)
    if not host or not port or not port.isdigit():
        raise UserError(
            f"trainer.num_nodes={count}: MASTER_ADDR={host} MASTER_PORT={port} in the environment; expected the "
            "address of node 0, and a port that is free there, as the next one is"
        )
    return host, int(port) + 1


def _assemble(host: str, port: int, count: int) -> None:
    """Wait for the other nodes."""
    try:
        server = socket.create_server((host, port), backlog=count)
    except (OSError, OverflowError) as error:
        raise UserError(f"MASTER_ADDR={host}: node 0 cannot listen there at port {port} ({error})") from None
    print(f"node 0: waits at {host}:{port} for {count - 1} more", flush=True)
    end = time.monotonic() + PATIENCE
    with server:
        while absent := sorted(set(range(1, count)) - set(_peers)):
            if time.monotonic() > end:
                raise UserError(f"trainer.num_nodes={count}: no word within {PATIENCE:.0f} s from nodes {absent}")
            server.settimeout(1)
            with suppress(OSError, ValueError):  # nobody yet, or somebody else
                connection, _ = server.accept()
                connection.settimeout(10)
                if (came := int(connection.recv(8))) in absent:
                    _peers[came] = _opened(connection)


def _opened(connection: socket.socket) -> Connection:
    """From a host without power comes no end of a connection either: let the system ask whether it is there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connection.detach())


def _dismiss() -> None:
    for peer in _peers.values():
        with suppress(OSError):
            peer.send_bytes(b"")


def _close() -> None:
    """In a forked process: through it the connection would outlive this one."""
    for peer in _peers.values():
        with suppress(OSError):
            peer.close()
