"""Importing moesaic: what it needs, what it leaves alone, what it offers."""

import json

OPTIONAL = ["triton", "transformers", "datasets", "tensorboard", "tokenizers", "matplotlib", "torchtitan"]

_BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)

sys.meta_path.insert(0, Blocker())
"""

_DESCRIBE = f"""
import json, sys
import moesaic

missing = [name for name in moesaic.__all__ if not hasattr(moesaic, name)]
# torch imports triton itself, where it is installed.
loaded = sorted((set({OPTIONAL!r}) - {{"triton"}} | {{"moesaic.ops.triton.matmul"}}) & set(sys.modules))
print(json.dumps({{"all": moesaic.__all__, "missing": missing, "loaded": loaded}}))
"""


def test_works_without_any_optional_package(fresh_python):
    said = json.loads(fresh_python(_BLOCK + _DESCRIBE).stdout)
    assert said["missing"] == []
    assert 0 < len(said["all"]) <= 15
    assert len(set(said["all"])) == len(said["all"])


def test_the_blocker_blocks(fresh_python):
    fresh_python(_BLOCK + "try: import transformers\nexcept ModuleNotFoundError: pass\nelse: sys.exit(1)")


def test_does_not_import_optional_packages_that_are_there(fresh_python):
    said = json.loads(fresh_python(_DESCRIBE).stdout)
    assert said["loaded"] == []


_WHAT_IMPORT_LOADS = """
import sys
import torch
before = set(sys.modules)
import moesaic
loaded = set(sys.modules) - before
moesaic.grouped_mm, moesaic.ops.permute, torch.ops.moesaic.grouped_mm_input_grad
assert "torch.distributed.tensor" not in sys.modules
ours = {name for name in loaded if name.startswith("moesaic.") and not name.startswith("moesaic.ops")}
assert ours == {"moesaic.on_demand"}, ours
theirs = {name.partition(".")[0] for name in loaded} & {"triton", "transformers", "torch._dynamo", "torch._inductor"}
assert not theirs, theirs
assert moesaic.__version__[0].isdigit()
assert moesaic.debug_checks is moesaic.ops.debug_checks
assert moesaic.layers.MoE is moesaic.MoE
assert set(moesaic.__all__) <= set(dir(moesaic))
"""


def test_import_loads_the_operators_and_nothing_else(fresh_python):
    """So it takes little longer than torch's own import."""
    fresh_python(_WHAT_IMPORT_LOADS)


# Only an operator is touched, as a function of ours or as torch knows it; then forward and backward on DTensors.
_ON_A_MESH = """
import os, sys, tempfile
import torch
import torch.distributed as dist

def dtensor_first():
    import torch.distributed.tensor
    import moesaic
    return moesaic

def dtensor_later():
    import moesaic
    assert "torch.distributed.tensor" not in sys.modules
    return moesaic

def ours(moesaic):
    return moesaic.grouped_mm

def raw(moesaic):
    op = torch.ops.moesaic.grouped_mm.default
    automatic = 0 if isinstance(op._schema.arguments[3].type, torch.IntType) else None
    return lambda x, w, sizes: op(x, w, sizes, automatic)

def check(imports, product):
    product = product(imports())
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    assert "moesaic.sharding" not in sys.modules
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def leaf(*shape, placement):
        return DTensor.from_local(torch.randn(*shape), mesh, [placement]).requires_grad_()

    x, w = leaf(5, 4, placement=Shard(1)), leaf(3, 4, 6, placement=Shard(1))  # row-parallel
    sizes = DTensor.from_local(torch.tensor([2, 0, 3]), mesh, [Replicate()])
    y = product(x, w, sizes)
    assert y.placements == (Partial(),), y
    y.redistribute(placements=[Replicate()]).to_local().sum().backward()
    assert x.grad.placements == (Shard(1),), x.grad
    assert w.grad.placements == (Shard(1),), w.grad
    expected = torch.cat([rows @ m for rows, m in zip(x.to_local().split([2, 0, 3]), w.to_local())])
    assert torch.allclose(y.to_local(), expected, atol=1e-5)
    assert not any(type(finder).__module__.startswith("moesaic") for finder in sys.meta_path)

failed = []
for imports in (dtensor_first, dtensor_later):
    for product in (ours, raw):
        if (child := os.fork()) == 0:  # torch is there already, and nothing else
            status = 1
            try:
                check(imports, product)
                status = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            os._exit(status)
        if os.waitpid(child, 0)[1]:
            failed.append((imports.__name__, product.__name__))
sys.exit(f"failed: {failed}" if failed else 0)
"""


def test_operators_take_dtensors_though_only_they_are_touched(fresh_python):
    fresh_python(_ON_A_MESH)
