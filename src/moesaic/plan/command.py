"""``moesaic plan``: options, what is printed, exit status."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from moesaic.ops.processor import cpuinfo
from moesaic.options import parse
from moesaic.plan.advice import ep_or_etp, what_would_fit
from moesaic.plan.calibrate import calibrated
from moesaic.plan.choice import Job
from moesaic.plan.hardware import as_toml, read_hardware
from moesaic.plan.model import Planned, read_model
from moesaic.plan.search import Machines, search
from moesaic.plan.show import record, tables
from moesaic.train.config import flag
from moesaic.train.errors import UserError


@dataclass(frozen=True)
class Options:
    """Find the layouts of a model that fit into memory and are fast, before you start a run.

    Tries all possible layouts over pp, dp_replicate, dp_shard, cp, tp, ep and etp, with and without recomputation.
    Prints the fastest that fit: what a rank holds and sends, and how long a step takes. Weights, gradients, optimizer
    states and bytes sent are exact for an even routing. Times are estimates: use them to compare layouts.

    Pipelines are planned with the schedule 1f1b, and the optimizer is AdamW. Muon, other schedules, adapters and
    --no-reshard-after-forward are not planned.

    Needs moesaic[transformers], and no device: nothing is computed.

    Exit status: 0 done; 1 nothing fits; 2 the call cannot work.
    """

    model: str | None = None
    """A config.json, a folder with one, or a name on the hub."""
    gpus: int = 8
    """The number of devices. Each has one rank."""
    per_node: int = 8
    """The number of devices in a node (machine). Links within a node are fast. tp and etp stay within a node."""
    hardware: str = "H100"
    """H100, H200, B200 or CPU; or a file of your own in TOML or JSON, such as --calibrate writes."""
    memory: float | None = None
    """GB (1e9 bytes) that may be used on each device. By default all that the hardware has."""
    seq_len: int = 4096
    """Tokens in a sequence."""
    batch: int = 1024
    """Sequences in a step, over all ranks."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """The dtype of the computation, as in moesaic train."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """The dtype of weights, gradients and optimizer states. moesaic train has fp32."""
    capacity: int | None = None
    """As in moesaic train: room for so many copies of tokens from each rank to each other."""
    top: int = 10
    """How many layouts to print."""
    json: bool = False
    """Print JSON: bytes and seconds."""
    calibrate: Path | None = None
    """Measure this machine, and write a file for --hardware. Under torchrun links are measured too. Without --model
    nothing else is done."""


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic plan`` and return its exit status."""
    options = parse(Options, "plan", arguments)
    try:
        _check(options)
        if options.calibrate is not None:
            _calibrate(options)
        if options.model is None:
            return 0
        return _plan(options, _read(options))
    except (UserError, OSError, ValueError, ImportError, NotImplementedError) as error:
        print(f"moesaic plan: {error}", file=sys.stderr)
        return 2


def _check(options: Options) -> None:
    for name in ("gpus", "per_node", "seq_len", "batch", "top", "capacity"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")
    if options.memory is not None and not options.memory > 0:
        raise UserError(f"--memory must be more than 0 GB, not {options.memory}")
    if options.gpus > options.per_node and options.gpus % options.per_node:
        raise UserError(
            f"--gpus {options.gpus} are no whole nodes of --per-node {options.per_node}; give a multiple of it"
        )
    if options.model is None and options.calibrate is None:
        raise UserError("--model is missing: a config.json, a folder with one, or a name on the hub")
    if options.weights == "bf16" and options.dtype == "fp32":
        raise UserError("--weights bf16 computes in bf16; leave --dtype out")


def _calibrate(options: Options) -> None:
    assert options.calibrate is not None
    base, folder = read_hardware(options.hardware), options.calibrate.expanduser().resolve().parent
    if not folder.is_dir():
        raise UserError(f"--calibrate {options.calibrate}: there is no folder {folder}")
    measured = calibrated(base)
    if measured is None:
        return  # the first rank speaks for all
    what = (
        f"Measured on {_machine()} by {os.environ.get('WORLD_SIZE', '1')} process(es); the rest is that of {base.name}."
    )
    options.calibrate.expanduser().write_text(f"# {what}\n{as_toml(measured)}")
    print(f"{what}\n\n{as_toml(measured)}\nwritten to {options.calibrate}: --hardware {options.calibrate} takes it")


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = cpuinfo()
    return f"{known.get('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _read(options: Options) -> Planned:
    assert options.model is not None
    dtype = torch.bfloat16 if options.weights == "bf16" else torch.float32
    return read_model(options.model, dtype)


def _plan(options: Options, planned: Planned) -> int:
    hardware = read_hardware(options.hardware)
    memory = hardware.memory if options.memory is None else options.memory * 1e9
    machines = Machines(options.gpus, options.per_node, memory, hardware, options.dtype)
    autocast = options.dtype == "bf16" and options.weights == "fp32"
    job = Job(options.seq_len, options.batch, autocast, options.capacity)
    found = search(planned, job, machines, options.top)
    shapes = planned.shapes
    if not found.plans:
        said = what_would_fit(planned, found, job, machines)
        if options.json:
            print(json.dumps({"plans": [], "tried": found.tried, "said": said}, indent=2))
        print(f"moesaic plan: {said}", file=sys.stderr)
        return 1
    advice = ep_or_etp(planned, found.plans[0], job, machines)
    if options.json:
        records: list[dict[str, Any]] = [record(plan, job) for plan in found.plans]
        about = {"model": shapes.name, "parameters": shapes.parameters, "active": shapes.active_parameters}
        about |= {"flops_a_token": shapes.flops(job.seq_len), "hardware": hardware.name, "tried": found.tried}
        print(json.dumps({**about, "said": advice, "plans": records}, indent=2))
        return 0
    console = Console(width=max(140, Console().width)) if not sys.stdout.isatty() else Console()
    of_model = f"{shapes.parameters / 1e9:.2f} B parameters, {shapes.active_parameters / 1e9:.2f} B for a token"
    of_machines = f"{options.gpus} x {hardware.name}, {memory / 1e9:.0f} GB, {options.per_node} a node"
    print(f"{shapes.name}: {of_model}; {of_machines}; {found.tried} legal ways")
    for table in tables(found.plans, job):
        console.print(table)
    print(advice)
    return 0
