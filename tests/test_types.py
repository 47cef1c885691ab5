"""What a type checker sees of the public names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TYPES = """
from typing import assert_type

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import moesaic
from moesaic.layers import Routing

config = moesaic.MoEConfig(dim=8, hidden_dim=16, num_experts=4, top_k=2)
moe = moesaic.parallelize(moesaic.MoE(config), moesaic.build_meshes(ep=2))
x = torch.randn(3, 8)
assert_type(moe, moesaic.MoE)
assert_type(moe(x), Tensor)
assert_type(moe.router(x), Routing)
assert_type(moe.experts(x, *moe.router(x)), Tensor)
assert_type(moesaic.build_meshes().expert, DeviceMesh)


@moesaic.sharding_rule("m k -> m k")
def operator(x: Tensor) -> Tensor:
    return x


assert_type(operator(x), Tensor)
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, list[str]]:
    """What pyrefly finds in each file: README's snippets, types as they are, and one that is wrong."""
    pytest.importorskip("pyrefly", reason="the type checker comes with the extra 'dev'")
    snippets = re.findall(r"```python[^\n]*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    files = {f"readme_{number}.py": snippet for number, snippet in enumerate(snippets)}
    files |= {"public.py": TYPES, "wrong.py": TYPES.replace("assert_type(moe(x), Tensor)", "assert_type(moe(x), int)")}
    folder = tmp_path_factory.mktemp("typed")
    for name, text in files.items():
        (folder / name).write_text(text)
    options = ["--preset", "default", "--search-path", str(ROOT / "src"), "--python-interpreter-path", sys.executable]
    command = [sys.executable, "-m", "pyrefly", "check", "--output-format", "min-text", *options, *files]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    return {name: [line for line in printed.splitlines() if f"{name}:" in line] for name in files}


def test_snippets_of_the_readme(errors):
    found = {name: lines for name, lines in errors.items() if name.startswith("readme")}
    assert len(found) >= 2
    assert [line for lines in found.values() for line in lines] == []


def test_public_types(errors):
    assert errors["public.py"] == []


def test_a_wrong_type_is_found(errors):
    assert [line for line in errors["wrong.py"] if "[assert-type]" in line]
