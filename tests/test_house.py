"""Rules of the house that no linter holds."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moesaic.sharding import internals

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_LINES = 400
MAX_ARGUMENTS = 10
# Joined at run time, so that this file doesn't hold what it forbids.
MACHINE_PATHS = ["/".join(["", part, ""]) for part in ("work", "root")]


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def test_files_stay_small():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_functions_within_kernels_take_few_arguments():
    # A kernel itself is launched with all that it needs. What it hands on by position goes into records.
    many = {}
    for file in (ROOT / "src" / "moesaic" / "ops" / "triton").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.endswith("_kernel"):
                continue
            if any(ast.unparse(d) == "triton.jit" for d in node.decorator_list) and len(node.args.args) > MAX_ARGUMENTS:
                many[f"{file.name}: {node.name}"] = len(node.args.args)
    assert many == {}


@pytest.mark.parametrize("room", ["ops", "layers"])
def test_operators_and_layers_know_nothing_of_ranks(room):
    package = ROOT / "src" / "moesaic" / room
    offenders = {
        str(file.relative_to(ROOT)): sorted(names)
        for file in sorted(package.rglob("*.py"))
        if (names := {name for name in _imports(file) if name.startswith(("torch.distributed", "moesaic.ranks"))})
    }
    assert offenders == {}


def _private_parts_of_torch_distributed(source: str) -> set[str]:
    """Imports of its private modules and names, private attributes of its classes, private keyword arguments."""
    classes = (DTensor, DeviceMesh, internals.DTensorSpec, internals.LocalTensorMode, Tensor, nn.Module)
    *theirs, of_tensor, of_module = [{*dir(c), *getattr(c, "__annotations__", {})} for c in classes]
    attributes = {n for n in set().union(*theirs) - of_tensor - of_module if n.startswith("_") and n[1] != "_"}
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases):
                names = [f"{module}.{alias.name}" for alias in aliases]
            case ast.Attribute(value=value, attr=attr) if attr in attributes and ast.unparse(value) != "self":
                found.add(ast.unparse(node))
                continue
            case ast.Call(keywords=keywords):
                found |= {f"{k.arg}=" for k in keywords if k.arg in ("_init_backend", "_rank")}
                continue
            case ast.Attribute() | ast.Constant(value=str()):
                names = [ast.unparse(node).strip("'")]
            case _:
                continue
        found |= {n for n in names if re.match(r"torch\.distributed\b.*\._", n)}
    return found


def test_one_file_touches_private_parts_of_torch_distributed():
    offenders = {
        str(file.relative_to(ROOT)): sorted(found)
        for file in SOURCES
        if file != ROOT / "src" / "moesaic" / "sharding" / "internals.py"
        if (found := _private_parts_of_torch_distributed(file.read_text()))
    }
    assert offenders == {}


@pytest.mark.parametrize(
    "violation",
    [
        "from torch.distributed.tensor._dtensor_spec import DTensorSpec",
        "from torch.distributed import _local_tensor",
        "import torch.distributed.tensor._ops.utils as utils",
        "torch.distributed.tensor._api.DTensor",
        "spec = t._spec",
        "local = weight.grad._local_tensor",
        "DTensor._op_dispatcher.sharding_propagator",
        "mesh._flatten('all')",
        "DeviceMesh('cpu', ranks, _init_backend=False)",
        "logging.getLogger('torch.distributed.tensor._redistribute')",
    ],
)
def test_a_private_part_of_torch_distributed_is_found(violation):
    assert _private_parts_of_torch_distributed(violation)


def test_no_file_names_a_path_of_some_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    offenders = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in files
        if file.is_file()
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if any(path in line for path in MACHINE_PATHS)
    ]
    assert offenders == []


def test_every_public_name_has_a_docstring():
    import moesaic

    # A dataclass without one gets its signature as docstring.
    missing = [
        name for name in moesaic.__all__ if not (doc := getattr(moesaic, name).__doc__) or doc.startswith(f"{name}(")
    ]
    assert missing == []


def _public_names(package: Path) -> list[str]:
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_a_page_lists_all_public_names():
    text = (ROOT / "docs" / "api.md").read_text()
    _, *sections = re.split(r"^## `([\w.]+)`$", text, flags=re.MULTILINE)
    listed = {
        module: re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
        for module, section in zip(sections[::2], sections[1::2], strict=True)
    }
    source = ROOT / "src"
    packages = [source / "moesaic", *(file.parent for file in (source / "moesaic").glob("*/__init__.py"))]
    packages += sorted(file.parent for file in (source / "moesaic" / "integrations").glob("*/__init__.py"))
    public = {".".join(package.relative_to(source).parts): _public_names(package) for package in packages}
    assert listed == {module: names for module, names in public.items() if names}
