"""Run a program in processes forked from the server of `moesaic.testing.pool`, which has imported torch and moesaic.

That saves the seconds which a new interpreter takes to import them.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

from moesaic.testing.pool import start_server

TIMEOUT_S = 300.0


def run_forked(program: str | Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code, or a file, as `__main__`.

    Args:
        program: the code, or the path of a file.
        args: what the program finds in `sys.argv`.

    Returns:
        Its exit status and what it printed. A program that takes longer than `TIMEOUT_S` is killed.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        process = _start(program, args, os.environ, Path(folder))
        return _finish(process, program, args, Path(folder), time.monotonic() + TIMEOUT_S)


def run_forked_ranks(program: str | Path, world_size: int, *args: str) -> list[subprocess.CompletedProcess[str]]:
    """As `run_forked`, on ranks with the environment that torchrun gives them; results in rank order."""
    # Of a free port, which nobody else can take before the ranks use it: they are all clients of this store.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    deadline = time.monotonic() + TIMEOUT_S
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        folders = [Path(folder, str(rank)) for rank in range(world_size)]
        processes = []
        for rank, own in enumerate(folders):
            own.mkdir()
            environment = os.environ | where | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(_start(program, args, environment, own))
        done = zip(processes, folders, strict=True)
        return [_finish(process, program, args, own, deadline) for process, own in done]


def _start(program: str | Path, args: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> BaseProcess:
    start_server()
    process = multiprocessing.get_context("forkserver").Process(
        target=_main, args=(program, args, dict(environment), folder)
    )
    process.start()
    return process


def _finish(
    process: BaseProcess, program: str | Path, args: tuple[str, ...], folder: Path, deadline: float
) -> subprocess.CompletedProcess[str]:
    process.join(max(0.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    said = [file.read_text() if file.exists() else "" for file in (folder / "out", folder / "err")]
    return subprocess.CompletedProcess([str(program), *args], process.exitcode, *said)


def _main(program: str | Path, args: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        stream.flush()
        with Path(folder, name).open("wb") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    os.environ.update(environment)
    sys.argv = [str(program) if isinstance(program, Path) else "-c", *args]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
