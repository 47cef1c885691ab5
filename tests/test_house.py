"""Rules of the house that no linter holds."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_LINES = 400
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


@pytest.mark.parametrize("room", ["ops", "layers"])
def test_operators_and_layers_know_nothing_of_ranks(room):
    package = ROOT / "src" / "moesaic" / room
    offenders = {
        str(file.relative_to(ROOT)): sorted(names)
        for file in sorted(package.rglob("*.py"))
        if (names := {name for name in _imports(file) if name.startswith(("torch.distributed", "moesaic.ranks"))})
    }
    assert offenders == {}


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
