"""docs/start.md from its first command to its last, as a reader types them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_examples import BY_FILE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "start.md").read_text()


def commands() -> list[str]:
    """The blocks of the page after the installation."""
    return re.findall(r"^```sh\n(.*?)^```", PAGE.partition("## Train a model")[2], re.DOTALL | re.MULTILINE)


def test_the_page_goes_all_the_way():
    text = "".join(commands())
    for command in ("make train", "moesaic report", "moesaic generate", "examples/finetune_chat.py", "moesaic prove"):
        assert command in text


@pytest.mark.long
def test_a_first_hour(tmp_path):
    for name in ("Makefile", "examples", "constraints.txt", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "mylib.py").write_text(BY_FILE["mylib.py"].code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = []
    for block in commands():
        # The environment is there, and is not this test's to change.
        block = block.replace("make train", "make -o .venv/.moesaic-installed train")
        done = subprocess.run(
            ["bash", "-euc", block],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "MOESAIC_NO_TYPECHECK": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        said.append(done.stdout)
    printed = "\n".join(said)
    assert "this model" in printed
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 1 << 20
    assert "it is 42" in printed
    assert "nothing wrong, nothing missing" in printed
