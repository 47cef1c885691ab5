"""Run a function on real gloo ranks: `run_ranks(fn, world_size, *args, **kwargs) -> [rank 0's result, ...]`.

Each call forks its ranks from a server process that imported torch once. So a call costs a fraction of a
second, and yet no rank inherits anything from an earlier test: DTensor caches results by mesh *equality*, and
in a reused process a new mesh would be handed an old one whose process groups are gone.

`Ranks` runs many functions on the same ranks, which is faster where much of the time goes to what DTensor and FSDP do
the first time. Its process groups live as long as it does, so that an old mesh that equals a new one still works.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from moesaic.testing.hangs import where

MAX_WORLD_SIZE = 8
TIMEOUT_S = 300.0
# After one rank has failed, its peers get this long to fail too (their errors often tell more) or to finish.
GRACE_S = 10.0

_STOP = b"all ranks are done"

_preloaded: list[str] = []


class RankError(AssertionError):
    """One or more ranks failed; `failures` maps rank to traceback, the first to fail first."""

    def __init__(self, fn: str, failures: Mapping[int, str]):
        self.failures = dict(failures)
        ranks_of: dict[str, list[int]] = {}
        for rank, text in failures.items():
            ranks_of.setdefault(text, []).append(rank)
        parts = [f"{fn} failed on rank {', '.join(map(str, failures))}"]
        parts += [f"--- rank {', '.join(map(str, ranks))} ---\n{text}" for text, ranks in ranks_of.items()]
        super().__init__("\n".join(parts))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
    """`fn(*args, **kwargs)` on `world_size` new gloo ranks; results in rank order, or one `RankError`.

    `fn` is a module-level function. Arguments and results travel as pickle bytes, so tensors go by value.
    """
    with Ranks(world_size) as ranks:
        return ranks(fn, *args, **kwargs)


class Ranks:
    """`world_size` gloo ranks, which run one function after another: `ranks(fn, *args, **kwargs)`.

    After a failure they are stopped, and the next call starts new ones. A call that takes more than ``timeout_s``
    seconds fails, and says where each rank was.
    """

    def __init__(self, world_size: int, timeout_s: float | None = None):
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size must be in 1..{MAX_WORLD_SIZE}, got {world_size}")
        self._world_size = world_size
        self.timeout_s = timeout_s
        self._processes: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        module, name = fn.__module__, fn.__qualname__
        if "<" in name or module == "__main__":
            raise ValueError(f"a rank cannot import {module}:{name}; pass a module-level function")
        payload = pickle.dumps((module, name, args, kwargs))
        folder = self._start()
        try:
            for pipe in self._pipes:
                # A rank that died says so when its answer is read.
                with contextlib.suppress(BrokenPipeError):
                    pipe.send_bytes(payload)
            results, failures = _collect(self._processes, self._pipes, folder, self.timeout_s or TIMEOUT_S)
        except BaseException:
            self._kill()
            raise
        if failures:
            self._kill()
            raise RankError(f"{module}:{name}", failures)
        return [results[rank] for rank in range(self._world_size)]

    def stop(self) -> None:
        """End the ranks in good order; a later call starts new ones."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(_STOP)
        for process in self._processes:
            process.join(GRACE_S)
        self._kill()

    def _start(self) -> Path:
        if self._folder is None:
            context = multiprocessing.get_context("forkserver")
            start_server()
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
            for rank in range(self._world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main,
                    args=(theirs, rank, self._world_size, self._folder.name, sys.path),
                    name=f"rank{rank}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        return Path(self._folder.name)

    def _kill(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def preload(*modules: str) -> None:
    """Have the server import modules, so that ranks need not. Says nothing to a server that runs already."""
    _preloaded.extend(m for m in modules if m not in _preloaded)


def start_server() -> None:
    """Start the fork server if it isn't running, with everything the ranks inherit from it."""
    if getattr(forkserver._forkserver, "_forkserver_pid", None) is not None:
        return
    settings = {
        # Set before torch and numpy are imported: without threads in the server, forking it is safe.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MOESAIC_PRELOAD": ",".join(_preloaded),
        # Asking CUDA itself whether it is there would make it unusable in every forked child.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Before Python 3.12.4 the server does not get our sys.path, and skips what it can't import.
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        forkserver.set_forkserver_preload(["moesaic.testing.preload"])
        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _collect(
    processes: list[BaseProcess], pipes: list[connection.Connection], folder: Path, timeout_s: float
) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(GRACE_S)
                ok, value = False, f"the process died, exit code {processes[rank].exitcode}"
            except Exception:
                ok, value = False, f"its result cannot be unpickled\n{traceback.format_exc()}"
            (results if ok else failures)[rank] = value
            if not ok:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank in waiting.values():
        limit = f"{GRACE_S:g} s after another rank failed" if failures else f"after {timeout_s:g} s"
        stack = _stack(processes[rank], folder / f"stack{rank}")
        failures[rank] = f"still running {limit}, {where(stack)}, at\n{stack}"
    return results, failures


def _stack(process: BaseProcess, file: Path) -> str:
    """Where a running rank is: its fault handler writes that on a signal, even from within a collective."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGUSR1)
    for _ in range(20):
        time.sleep(0.05)
        if file.exists() and (text := file.read_text()):
            return text
    return "(it did not say)"


def _rank_main(pipe: connection.Connection, rank: int, world_size: int, folder: str, path: list[str]) -> None:
    # What this process can import, its ranks can.
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    with open(Path(folder, f"stack{rank}"), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        for key, value in {"RANK": rank, "WORLD_SIZE": world_size}.items():
            os.environ[key] = os.environ[f"LOCAL_{key}"] = str(value)
        torch.set_num_threads(1)
        seed = torch.initial_seed()
        share_gloo_device()
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=TIMEOUT_S),
            )
            # Stopped once all peers are done: to close sockets earlier could cut off bytes on their way to a peer.
            while (payload := _receive(pipe)) != _STOP:
                # Each function finds random numbers as in a new process.
                torch.manual_seed(seed)
                pipe.send_bytes(_answer(payload))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            # Leaving closes this rank's sockets, and peers that sit in a collective with it get an error.
            _leave()
        dist.destroy_process_group()


def share_gloo_device() -> None:
    """Let all process groups of this process use one gloo device.

    Each would have a device of its own, whose thread wakes a hundred times a second. Hundreds of groups on eight ranks
    kept two cores half busy with nothing else.
    """
    from torch.distributed import distributed_c10d

    original: Any = distributed_c10d.ProcessGroupGloo
    device = original.create_device(hostname="127.0.0.1")

    class ProcessGroupGloo(original):
        # torch 2.15 asks for more, which ranks in tests have no use for.
        def __init__(self, store: Any, rank: int, size: int, *, timeout: timedelta, **others: object):
            options = original._Options()
            options._devices = [device]
            options._threads = 2
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    vars(distributed_c10d)["ProcessGroupGloo"] = ProcessGroupGloo


def _receive(pipe: connection.Connection) -> bytes:
    try:
        return pipe.recv_bytes()
    except EOFError:
        _leave()


def _answer(payload: bytes) -> bytes:
    module, name, args, kwargs = pickle.loads(payload)
    fn: Any = importlib.import_module(module)
    for part in name.split("."):
        fn = getattr(fn, part)
    return pickle.dumps((True, fn(*args, **kwargs)))


def _leave() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
