"""Compile what the benchmarks launch, many processes at once, before anything is measured.

They compile for the GPU that is here without using it, into triton's cache, where the measuring process finds them.
"""

import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu import launches
from benchmarks.gpu.launches import Form, Sizes

from moesaic.ops.triton.configs import Config, using

PARTS = ("forward", "backward", "main gradients", "products")


@dataclass(frozen=True)
class Piece:
    """A part of what is launched, for one process; with a kernel in a configuration other than its default."""

    capability: str
    sizes: Sizes
    part: str
    kernel: str = ""
    config: Config | None = None


def compile_piece(piece: Piece) -> int:
    """How many kernels it launches."""
    found: set[int] = set()
    with launches.compiled_only(piece.capability, lambda name, kernel, options: found.add(id(kernel))):
        if piece.config is None:
            _launch(piece)
        else:
            with using(piece.kernel, piece.config):
                _launch(piece)
    return len(found)


def _launch(piece: Piece) -> None:
    problem = launches.problem(piece.sizes, torch.bfloat16, Form("silu"))
    match piece.part:
        case "forward":
            launches.experts_forward(problem)
        case "backward":
            launches.experts_backward(problem, main_gradients=False)
        case "main gradients":
            launches.experts_backward(problem, main_gradients=True)
        case "products":
            launches.products(piece.sizes, torch.bfloat16)


def compile_all(pieces: Iterable[Piece], jobs: int, seconds: float) -> dict[str, Any]:
    """Compile them in order, for so many seconds at most; what is not compiled then is compiled when it is launched."""
    start = time.monotonic()
    before = os.environ.pop("TRITON_INTERPRET", None)  # nothing is compiled for the interpreter
    # Spawned, since torch has threads.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        futures: list[Future[int]] = [pool.submit(compile_piece, piece) for piece in pieces]
        kernels, failures, done = 0, [], 0
        try:
            for future in as_completed(futures, seconds):
                done += 1
                if error := future.exception():
                    failures.append(f"{type(error).__name__}: {error}"[:200])
                else:
                    kernels += future.result()
        except TimeoutError:
            pass
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
    row: dict[str, Any] = {"launches": kernels, "pieces": f"{done} of {len(futures)}", "jobs": jobs}
    row["seconds"] = time.monotonic() - start
    return row | ({"failed": failures[0]} if failures else {})
