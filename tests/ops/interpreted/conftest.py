"""Tests of the Triton kernels in Triton's interpreter. They run where ``TRITON_INTERPRET=1`` was set at the start.

It is read when triton is imported and belongs to the whole process: ``tests/ops/test_triton_kernels.py`` runs these
files in a process of their own. The run-time checks of types stay off there, for a checked function cannot be a kernel.
"""

import os
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def on(monkeypatch) -> Callable[[str], None]:
    """`on("9.0")`: launches are those of a GPU of that compute capability with few multiprocessors."""
    from moesaic.ops.triton import device

    def use(capability: str) -> None:
        major, minor = map(int, capability.split("."))
        monkeypatch.setattr(device, "describe", lambda _: device.nvidia((major, minor), 3))

    return use
