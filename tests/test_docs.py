"""Documents say what is so: links lead somewhere; commands, flags, files and names exist; numbers agree."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest

from moesaic.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
# How code names files: from the root of the repository, or from that of the package.
FILE = re.compile(
    r"(?:src|docs|tests|benchmarks|examples|csrc|ops|sharding|layers|parallel|checkpoint|train)/[\w./-]*\w"
)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and text of every block of code."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """Code within lines."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def command_lines(text: str) -> list[str]:
    """Lines of shell blocks and code within lines, without comments, long lines in one piece."""
    blocks = "\n".join(code for language, code in fenced(text) if not language.startswith("python"))
    lines = [*blocks.replace("\\\n", " ").splitlines(), *spans(text)]
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


def flags_in(text: str) -> set[str]:
    # A dot follows those of torchtitan: `--override.imports`.
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*+(?!\.\w)", text))


@functools.cache
def flags_of(*command: str) -> set[str]:
    """What a command's --help names; without a command, that of moesaic itself."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            status = main([*command, "--help"])
        except SystemExit as leaving:
            status = leaving.code
    assert status == 0
    return flags_in(printed.getvalue())


@each_document
def test_links_lead_to_files_and_headings(document):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            dead.append(link)
    assert dead == []


def anchors(document: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_commands_and_their_flags_exist(document):
    wrong = []
    for line in command_lines(document.read_text()):
        for command, rest in re.findall(r"(?:^|[\s;])(?:-m )?moesaic ([a-z]+)\b(.*)", line):
            if command not in COMMANDS or not flags_in(rest) <= flags_of(command):
                wrong.append(line)
        for arguments in re.findall(r"(?:ARGS|LAYOUT)=([\"'])(.*?)\1", line):
            if not flags_in(arguments[1]) <= flags_of("train"):
                wrong.append(line)
    assert wrong == []


@each_document
def test_flags_in_running_text_exist(document):
    known = set.union(flags_of(), *map(flags_of, COMMANDS), *map(flags_in, map(Path.read_text, BENCHMARKS)), OTHERS)
    known |= {"--" + name.replace("_", "-") for path in BENCHMARKS for name in fields(path)}
    assert {flag for span in spans(document.read_text()) for flag in flags_in(span)} - known == set()


BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))
# Of torchrun, sbatch and pip.
OTHERS = {"--nnodes", "--rdzv-id", "--signal", "--standalone", "--nproc-per-node", "--help", "--pid"}


def fields(script: Path) -> set[str]:
    """Fields of the dataclasses of a script, which are its options."""
    classes = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ClassDef)]
    return {node.target.id for c in classes for node in c.body if isinstance(node, ast.AnnAssign)}


@each_document
def test_targets_and_variables_of_make_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    wrong = []
    for line in command_lines(document.read_text()):
        for words in re.findall(r"^make ([^&|]*)", line):
            for word in re.sub(r"([\"']).*?\1", "", words).split():
                name, equals, _ = word.partition("=")
                found = re.search(rf"^{name}\b *\?=" if equals else rf"^{name}:", makefile, re.MULTILINE)
                wrong += [] if found else [line]
    assert wrong == []


@each_document
def test_files_and_modules_exist(document):
    package = ROOT / "src" / "moesaic"
    text = document.read_text()
    words = [word for line in command_lines(text) for word in line.split()]
    paths = [word.partition("::")[0] for word in words if FILE.fullmatch(word.partition("::")[0])]
    assert [path for path in paths if not any((folder / path).exists() for folder in (ROOT, package))] == []
    modules = [word for word in words if re.fullmatch(r"benchmarks(\.\w+)+", word)]
    places = [ROOT / module.replace(".", "/") for module in modules]
    assert [str(place) for place in places if not (place.with_suffix(".py").exists() or place.is_dir())] == []


@each_document
def test_names_of_the_package_exist(document):
    import moesaic

    missing = []
    for span in spans(document.read_text()):
        for name in re.findall(r"^moesaic((?:\.(?!sbatch)\w+)+)", span):
            if name.startswith(".integrations.torchtitan") and importlib.util.find_spec("torchtitan") is None:
                continue  # it cannot be imported; `make test-torchtitan` uses its names
            found = moesaic
            for part in name.split(".")[1:]:
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{found.__name__}.{part}")
                missing += [] if hasattr(found, part) else [span]
                found = getattr(found, part, moesaic)
    assert missing == []


@each_document
def test_variables_and_extras_exist(document):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = document.read_text()
    named = {extra for group in re.findall(r"(?:moesaic|\.)\[([\w,]+)\]", text) for extra in group.split(",")}
    assert named - extras.keys() == set()
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("csrc/*pp"), ROOT / "csrc" / "CMakeLists.txt", ROOT / "Makefile"]
    read = "\n".join(source.read_text() for source in sources) + "\n".join(path.read_text() for path in BENCHMARKS)
    assert {name for name in re.findall(r"\bMOESAIC_[A-Z_]+", text) if name not in read} == set()


@each_document
def test_python_and_shell_blocks_parse(document):
    for language, code in fenced(document.read_text()):
        if language.startswith("python"):
            # A decorator alone is a fragment that shows a rule.
            ast.parse(code if not re.fullmatch(r"@.*\n", code) else code + "def f(): ...")
        elif language in ("bash", "sh"):
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_the_plan_of_the_experts_is_read_from_the_rules():
    from moesaic.parallel.placements import PLACES
    from moesaic.sharding.rule import short

    said = {name: f"[{', '.join(map(short, placements))}]" for name, placements in PLACES.items()}
    text = (ROOT / "docs" / "design.md").read_text().split("<!-- places -->")[1]
    rows = re.findall(r"^\| (?:result )?`(\w+)` \| `(.*)` \| `(.*)` \|$", text, re.MULTILINE)
    gradients = {"z": said["grad"], **{n.removeprefix("grad_"): p for n, p in said.items() if n.startswith("grad_")}}
    assert rows == [(name, said[name], gradients[name]) for name, *_ in rows]
    assert {name for name, *_ in rows} == {*gradients}


def test_the_plan_of_adapters_is_read_from_the_rules():
    from moesaic.parallel.placements import FACTORS, GRADIENTS
    from moesaic.sharding.rule import short

    table = (ROOT / "docs" / "design.md").read_text().split("<!-- factors -->")[1].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.*)` \| `(.*)` \|$", table, re.MULTILINE)
    expected = [
        tuple(f"[{', '.join(map(short, places[name]))}]" for places in (FACTORS, GRADIENTS)) for name in FACTORS
    ]
    assert rows == [(name, *places) for name, places in zip(FACTORS, expected, strict=True)]


def test_the_tables_are_those_of_the_rules():
    import torch

    from moesaic.sharding import rule_of

    document = (ROOT / "docs" / "sharding_rules.md").read_text()
    rule = rule_of(torch.ops.moesaic.grouped_mm)
    tables = "\n\n".join(str(rule.placements(line)) for line in rule.lines)
    assert f"```\n{tables}\n```" in document
    assert f"`{rule_of(torch.ops.moesaic.grouped_mm_weight_grad).lines[1]}`" in document


def test_the_error_is_that_of_the_operator():
    import torch
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import moesaic
    from moesaic.sharding.simulated import simulated_ranks

    S, R = Shard, Replicate()
    values = torch.randn(24, 5), torch.randn(8, 5, 7), torch.ones(4, 2, dtype=torch.int64)
    with simulated_ranks(2, 2, names=("ep", "etp")) as ranks:
        places = [S(0), R], [S(0), S(2)], [R, R]
        operands = [distribute_tensor(t, ranks.mesh, p) for t, p in zip(values, places, strict=True)]
        with pytest.raises(moesaic.ShardingError) as refused:
            moesaic.grouped_mm(*operands)
    assert f"```\n{refused.value}\n```" in (ROOT / "docs" / "sharding_rules.md").read_text()


def test_quoted_errors_are_those_of_the_program():
    document = (ROOT / "docs" / "multi_node.md").read_text()
    rows = re.findall(r"^\|(.*?)\|", document.partition("## When something is wrong")[2], re.MULTILINE)
    quoted = set(re.findall(r"`([^`]{12,})`", "".join(rows))) - {"address already in use"}  # torch says that
    sources = "".join(path.read_text() for path in ROOT.glob("src/moesaic/train/*.py"))
    assert len(quoted) >= 4
    # What an error fills in is an ellipsis or N.
    pieces = [piece.strip() for error in quoted for piece in re.split(r"\.\.\.|\bN\b", error)]
    assert [piece for piece in pieces if piece not in sources] == []


def test_layouts_that_are_advised_are_legal():
    from moesaic.parallel.mesh import resolve_layout

    table = re.findall(
        r"^\| (\d+) × (\d+) \|.*?`(.*?)`(.*)", (ROOT / "docs" / "multi_node.md").read_text(), re.MULTILINE
    )
    assert len(table) >= 5
    for machines, gpus, flags, note in table:
        sizes = {name.replace("-", "_"): int(size) for name, size in re.findall(r"--([a-z-]+) (\d+)", flags)}
        layout = resolve_layout(int(machines) * int(gpus), **sizes)
        assert [int(edp) for edp in re.findall(r"edp (\d+)", note)] in ([], [layout.edp])


def test_defaults_in_tables_are_those_of_the_program():
    from moesaic.train.config import TrainConfig

    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    table = re.findall(r"^\| `--([a-z-]+)` \| (\d+) \|", (ROOT / "docs" / "multi_node.md").read_text(), re.MULTILINE)
    assert len(table) >= 4
    assert [name for name, value in table if defaults[name.replace("-", "_")] != int(value)] == []


def test_the_run_folder_is_described():
    from moesaic.checkpoint import run_folder

    [line] = re.findall(r"^In the run folder: (.*)$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    names = {value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)}
    assert {name.strip("`/.") for name in re.findall(r"`.*?`", line)} == {name.strip("`/.") for name in names}


def test_the_readme_says_what_the_program_prints():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "training.md").read_text()
    log = page.partition("## What it prints")[2]
    [bigram, ours] = re.findall(r"bigram bytes ([\d.]+) +this model ([\d.]+)", log)[0]
    assert f"({float(ours):.2f}; a bigram model has {float(bigram):.2f})" in readme
    [millions] = re.findall(r"^([\d.]+) M parameters on 4 cpu processes", log, re.MULTILINE)
    assert f"{float(millions):.0f} M parameter" in readme


def test_the_readme_says_what_was_measured():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "benchmarks.md").read_text()
    layer = page.partition("## MoE layer on CPU")[2]
    rows = [row.split(" | ") for row in re.findall(r"^\| \d+ \w+: (.*) \|$", layer, re.MULTILINE)][:12]
    ratios, saved = [float(row[6].rstrip("x")) for row in rows], [float(row[8]) for row in rows]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times the tokens" in readme
    assert f"{min(saved):.2f} to {max(saved):.2f} of transformers'" in readme
    wire = page.partition("### Bytes on the wire")[2].partition("\n#")[0]
    times = [float(value) for value in re.findall(r"^\| \d.* ([\d.]+)x \|$", wire, re.MULTILINE)]
    assert f"{min(times):.2f} to {max(times):.2f} times as many" in readme
    kills = re.findall(r"(\d+) kills", (ROOT / "docs" / "reliability.md").read_text())
    assert f"| {sum(map(int, kills))}, and nothing lost |" in readme


def test_the_site_has_all_pages():
    """An error of `make docs`, found before."""
    trees = re.findall(r"^```{toctree}\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    listed = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    pages = {page for page in (ROOT / "docs").iterdir() if page.suffix in (".md", ".ipynb") and page.stem != "index"}
    assert listed == {page.stem for page in pages}
    linked = set(re.findall(r"\]\(docs/(\w+\.\w+)\)", (ROOT / "README.md").read_text()))
    assert {page.name for page in pages} - linked == set()


def test_pictures_are_those_of_their_scripts():
    for script in (ROOT / "docs" / "pictures").glob("*.py"):
        assert runpy.run_path(str(script))["draw"]() == script.with_suffix(".svg").read_text()


def test_the_number_of_families_is_that_of_the_table():
    words = {13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen"}
    page = (ROOT / "docs" / "transformers.md").read_text().partition("### All folders of transformers")
    tables = [re.findall(r"^\| [^|]+ \| `\w+` \|(.*)\|$", part, re.MULTILINE) for part in (page[0], page[2])]
    readme, changes = (ROOT / "README.md").read_text(), (ROOT / "CHANGELOG.md").read_text()
    depths, in_folders = [
        [
            sum(not cell.strip().startswith("no") for cell in column)
            for column in zip(*(r.split("|") for r in rows), strict=True)
        ]
        for rows in tables
    ]
    rows = tables[0]
    assert f"{in_folders[0]} folders of transformers run at depth 1, {in_folders[1]} at depth 2" in readme
    assert f"[{words[len(rows)].capitalize()} model families" in readme
    assert f"transformers models of {words[depths[2]]} families" in readme
    assert f"MoE blocks of {words[depths[1]]} families" in changes
    assert f"whole models of {words[depths[2]]} families" in changes
