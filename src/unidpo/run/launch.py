"""One command on several processes of this machine. Several machines take torchrun, accelerate or a scheduler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from unidpo.errors import TrainingError

GRACE_SECONDS = 15.0
"""How long the others may take to end by themselves once one process has failed."""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `unidpo` with these arguments in several processes that train together.

    Process 0 speaks for all; what the others print is shown only if one of them fails on its own. SIGTERM and SIGINT
    are handed on, and no process outlives this one.

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        TrainingError: a process was killed, or failed where the first one did not.
    """
    with tempfile.TemporaryDirectory(prefix="unidpo-") as folder, contextlib.ExitStack() as files:
        outputs = [Path(folder) / f"process-{rank}.txt" for rank in range(processes)]
        port = str(free_port())
        running: list[subprocess.Popen[bytes]] = []
        for rank, output in enumerate(outputs):
            sink = None if rank == 0 else files.enter_context(output.open("wb"))
            running.append(
                start(
                    arguments,
                    when_parent_dies=signal.SIGKILL,
                    env=environment(rank, processes, port),
                    stdout=sink,
                    stderr=None if sink is None else subprocess.STDOUT,
                )
            )
        with signals_to(running) as handed_on:
            blamed = _wait(running)
        if blamed is None:
            return 0
        code = running[blamed].returncode
        if handed_on and code < 0:
            return 128 - code  # it had not begun yet
        if blamed == 0 and code > 0:
            return code
        raise TrainingError(_what_happened(blamed, code, outputs[blamed]))


def start(arguments: Sequence[str], *, when_parent_dies: signal.Signals, **options: Any) -> subprocess.Popen[bytes]:
    """`unidpo` with these arguments in a process of its own, which gets a signal when this one dies.

    Args:
        options: of `Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "unidpo", *arguments],
        # Signals of the terminal come to this process alone; with `signals_to` it hands them on once.
        start_new_session=True,
        preexec_fn=end_with_parent(when_parent_dies),
        **options,
    )


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; returns the process to blame, where one failed.

    That is one that was killed, or else the first of those that failed: these fail together, with one message.
    """
    deadline = float("inf")
    while True:
        failed = [rank for rank, process in enumerate(running) if process.poll()]
        if all(process.returncode is not None for process in running):
            break
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
                process.wait()
            break
        time.sleep(0.05)
    killed = [rank for rank in failed if running[rank].returncode < 0]
    return next(iter(killed or failed), None)


def _what_happened(rank: int, code: int, output: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", which the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"process {rank} was ended by {name}{hint}"
    lines = output.read_text("utf-8", errors="replace").rstrip().splitlines() if output.exists() else []
    return "\n".join([f"process {rank} failed with exit code {code}; its last lines:", *lines[-20:]])


def environment(rank: int, processes: int, port: str) -> dict[str, str]:
    """The environment here, and what torch.distributed reads of a process's place, as torchrun sets it."""
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


@contextlib.contextmanager
def signals_to(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Within it, SIGTERM and Ctrl-C go to these processes. Yields the signals handed on so far."""
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """What a new process calls first (`Popen`'s `preexec_fn`), so that it gets a signal when this one dies (Linux).

    One that continued alone would write into a run folder that somebody resumes.
    """
    parent = os.getpid()

    def tie() -> None:
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
            if os.getppid() != parent:  # it died before this was set
                os.kill(os.getpid(), number)

    return tie
