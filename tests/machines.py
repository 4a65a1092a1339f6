"""Simulates two machines that train together: each has its own torchrun, clock and address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MODULE = ("-m", "lightning_gradnorm.experiments.cli.train")
ZONES = ("UTC-9", "UTC+5")  # clocks that no time stamp survives


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """What a process is started with; nothing of another launcher."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {**ours, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "GLOO_SOCKET_IFNAME": "lo", **more}


class Machine:
    """One of two: a launcher with a worker, in its own session."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as out:
            self.launcher = subprocess.Popen(
                command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout: float) -> int:
        return self.launcher.wait(timeout)

    def said(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        """Processes that the launcher has started; torchrun gives each its own session."""
        listed = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []

    def kill(self) -> None:
        """Kill everything at once, so no process can notify the others: the launcher first, then its workers."""
        workers = self.workers()
        for pid in (self.launcher.pid, *workers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait(30)


@contextmanager
def started(
    folder: Path, commands: Mapping[str, Sequence[str]], environments: Mapping[str, dict[str, str]]
) -> Iterator[list[Machine]]:
    """Start a machine for each command, by name; kill whatever still runs at the end."""
    machines: list[Machine] = []
    try:
        for name, command in commands.items():
            machines.append(Machine(command, folder, folder / f"machine_{name}.log", environments[name]))
        yield machines
    finally:
        for machine in machines:
            if machine.launcher.poll() is None:
                machine.kill()


@contextmanager
def two_machines(
    folder: Path, *options: str, program: Sequence[str] = MODULE, of_second: Sequence[str] = ()
) -> Iterator[list[Machine]]:
    """Start two machines' torchrun with these options, and more for the second."""
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    common += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    commands = {}
    for node, more in (("0", ()), ("1", of_second)):
        own = ["--node-rank", node, "--local-addr", f"127.0.0.{int(node) + 1}"]
        commands[node] = [*common, *own, *program, *options, *more]
    own_clocks = {node: environment(TZ=zone) for node, zone in zip(commands, ZONES, strict=True)}
    with started(folder, commands, own_clocks) as machines:
        yield machines


def train_on_two(folder: Path, *options: str, program: Sequence[str] = MODULE) -> list[str]:
    """Train to the end, and return what each machine has printed."""
    with two_machines(folder, *options, program=program) as machines:
        for machine in machines:
            assert machine.wait(timeout=300) == 0, machine.said()
        return [machine.said() for machine in machines]


def wait_until(condition: Callable[[], bool], machines: Sequence[Machine], seconds: float = 240) -> None:
    """Wait until the condition, a function, holds; all machines are to run all the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        for machine in machines:
            assert machine.launcher.poll() is None, machine.said()
        assert time.monotonic() < deadline
        time.sleep(0.02)
