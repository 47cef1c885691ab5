"""Every example runs, and so does the Python of the README and of the documents."""

import os
import re
import sys
from pathlib import Path

import pytest

from moesaic.cli import main
from moesaic.train.tokenizer import train_bpe
from tests.forked import run_forked, run_forked_ranks
from tests.integrations.families import make_model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: Path) -> str:
    """Run a script, on four ranks if it makes a process group; give back what they printed."""
    ranks = run_forked_ranks(script, 4) if "init_process_group" in script.read_text() else [run_forked(script)]
    failed = [f"rank {rank}\n{done.stdout}\n{done.stderr}" for rank, done in enumerate(ranks) if done.returncode != 0]
    assert not failed, "\n".join(failed)
    return "".join(done.stdout for done in ranks)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script):
    assert run(script)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def python_of(page: str) -> list[str]:
    """The blocks of a page, each with its lines where they are in the page. Those marked as fragments are left out."""
    text = (ROOT / page).read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


LAYER, OPERATOR = python_of("README.md")
ON_RANKS = ["docs/checkpoints.md", "docs/transformers.md", "docs/pipelines.md", "docs/routing.md"]


def test_readme_trains_a_layer_on_ranks(tmp_path):
    script = tmp_path / "layer.py"
    script.write_text(LAYER)
    assert "(Shard(dim=0), Shard(dim=2))" in run(script)


@pytest.mark.usefixtures("unchecked")
def test_readme_proves_an_operator(tmp_path, monkeypatch, capsys):
    [command] = re.findall(r"^moesaic (prove .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "mylib.py").write_text(OPERATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Fewer ranks than by default, to save time.
    assert main([*command.split(), "--axes", "2", "--meshes"]) == 0
    assert "nothing wrong, nothing missing" in capsys.readouterr().out


def test_the_tutorial_runs(forked_python, tmp_path):
    script = tmp_path / "tutorial.py"
    script.write_text("".join(python_of("docs/sharding_rules.md")))
    printed = forked_python(script).stdout
    assert "proof of mylib::linear" in printed
    assert "nothing wrong, nothing missing" in printed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["to be or not to be"], 257)
    for path in ("path/to/model",):
        make_model("Qwen3-MoE").save_pretrained(folder / path)
        tokenizer.save_pretrained(folder / path)
    return folder


def run_pages(folder, pages):
    os.chdir(folder)
    for page in pages:
        names = {"__name__": page}
        for block in python_of(page):
            exec(compile(block, ROOT / page, "exec"), names)


def test_pages_run_on_ranks(ranks, models):
    ranks(run_pages, 4, models, ON_RANKS)
    assert (models / "out" / "model.safetensors.index.json").is_file()


def test_no_page_is_forgotten():
    run_elsewhere = ["README.md", "docs/sharding_rules.md", "docs/check.md"]
    pages = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
    assert {page for page in pages if python_of(page)} == {*run_elsewhere, *ON_RANKS}
