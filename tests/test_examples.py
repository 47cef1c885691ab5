"""Every example runs, and so does the Python of the README and of the documents."""

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moesaic.cli import main
from moesaic.train.tokenizer import train_bpe
from tests.forked import run_forked, run_forked_ranks
from tests.integrations.families import make_model

pytestmark = pytest.mark.slow

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


class Program(NamedTuple):
    """The Python of a page: all its blocks one after the other, or one block with the name of a file."""

    page: str
    file: str
    code: str

    @property
    def starts_ranks(self) -> bool:
        return re.search(r"^ *dist\.init_process_group\(", self.code, re.MULTILINE) is not None

    @property
    def needs_ranks(self) -> bool:
        return "build_meshes(" in self.code


def programs_of(page: Path) -> list[Program]:
    """The programs of a page, with their lines where they are in the page. Blocks marked as fragments are left out."""
    text, found = page.read_text(), {}
    for block in re.finditer(r"^```python *(.*)\n((?s:.*?))^```", text, re.MULTILINE):
        if block[1] != "fragment":
            lines = text.count("\n", 0, block.start(2))
            before = found.get(block[1], "")
            found[block[1]] = before + "\n" * (lines - before.count("\n")) + block[2]
    return [Program(page.relative_to(ROOT).as_posix(), file, code) for file, code in found.items()]


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PROGRAMS = [program for page in PAGES for program in programs_of(page)]
BY_FILE = {program.file: program for program in PROGRAMS if program.file}
# A program that makes no process group of its own runs on ranks that have one.
ON_RANKS = [p for p in PROGRAMS if p.needs_ranks and (not p.starts_ranks or "is_initialized" in p.code)]
ALONE = [program for program in PROGRAMS if program not in ON_RANKS]


@pytest.fixture(scope="module")
def run_again(tmp_path_factory):
    """Runs the program of a page, in a folder that it keeps. Tests that ask for a run that was done get its output."""
    folders: dict[Program, Path] = {}
    printed: dict[tuple[Program, int], str] = {}

    def run_it(program: Program, time: int = 1) -> str:
        if (program, time) not in printed:
            folder = folders.setdefault(program, tmp_path_factory.mktemp("page"))
            (folder / "program.py").write_text(program.code)
            with contextlib.chdir(folder):
                printed[program, time] = run(folder / "program.py")
        return printed[program, time]

    return run_it


@pytest.mark.parametrize("program", ALONE, ids=lambda program: f"{program.page}-{program.file}")
def test_program_of_a_page(program, run_again):
    run_again(program)


def test_programs_are_found():
    assert {"one_process.py", "four_ranks.py", "mylib.py", "loop.py"} <= BY_FILE.keys()
    assert len(PROGRAMS) >= 8
    assert len(ON_RANKS) >= 4


def test_four_ranks_get_the_result_of_one_process(run_again):
    """The README says so, and which."""
    printed = [run_again(BY_FILE[name]) for name in ("one_process.py", "four_ranks.py")]
    losses = [float(text.split()[0]) for text in printed]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert printed[0].split()[1:] == printed[1].split()[1:]
    assert f"the same loss, {losses[0]:.4f}," in (ROOT / "README.md").read_text()


def test_a_loop_goes_on(run_again):
    steps = [re.findall(r"^step (\d+) ", run_again(BY_FILE["loop.py"], time), re.MULTILINE) for time in (1, 2)]
    assert steps[0] + steps[1] == [str(step) for step in range(1, 13)]


@pytest.mark.usefixtures("unchecked")
def test_a_page_proves_an_operator(tmp_path, monkeypatch, capsys):
    [command] = re.findall(r"^moesaic (prove .*)$", (ROOT / "docs" / "own_kernel.md").read_text(), re.MULTILINE)
    (tmp_path / "mylib.py").write_text(BY_FILE["mylib.py"].code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Fewer ranks than by default, to save time.
    assert main([*command.split(), "--axes", "2", "--meshes"]) == 0
    assert "nothing wrong, nothing missing" in capsys.readouterr().out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["to be or not to be"], 257)
    for path in ("path/to/model",):
        make_model("Qwen3-MoE").save_pretrained(folder / path)
        tokenizer.save_pretrained(folder / path)
    return folder


def run_programs(folder, programs):
    os.chdir(folder)
    for program in programs:
        exec(compile(program.code, ROOT / program.page, "exec"), {"__name__": program.page})


def test_programs_of_pages_run_on_ranks(ranks, models):
    ranks(run_programs, 4, models, ON_RANKS)
    assert (models / "out" / "model.safetensors.index.json").is_file()
