"""All that is measured on a GPU, in one command: memory errors, the MoE layer, the grouped products, the aims.

First one pass of each kernel, under compute-sanitizer's memcheck where that is installed; then ``experts`` and
``grouped_mm``, each of which compares before it times and writes a JSON file to ``benchmarks/results/``. Ends with one
table of what was aimed at, and fails if a value is wrong; not if an aim is missed.

    python -m benchmarks.gpu [--dry-run]
"""

import os
import shutil
import subprocess
import sys

import tyro
from benchmarks.gpu import common, experts, grouped_mm
from benchmarks.gpu.shapes import Options


def check_memory() -> None:
    """Run ``one_pass`` in a process of its own; raises where it, or memcheck, finds something."""
    program = [sys.executable, "-m", "benchmarks.gpu.one_pass"]
    tool = None if common.DRY_RUN else shutil.which("compute-sanitizer")
    if tool:
        program = [tool, "--tool", "memcheck", "--error-exitcode", "1", *program]
    elif common.DRY_RUN:
        program.append("--dry-run")
    # Without torch's cache of memory a tensor ends where its memory does.
    subprocess.run(program, check=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    print("memcheck: no errors" if tool else "memcheck: left out, for there is no compute-sanitizer, or no GPU")


def main(options: Options) -> None:
    common.require_gpu()
    check_memory()
    aims = experts.main(options) + grouped_mm.main(options)
    common.show("All aims", aims)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
