"""Documents say what is so: links lead somewhere, and flags that they name exist."""

import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@each_document
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    relative = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in relative if not (document.parent / link).exists()] == []


@each_document
def test_flags_of_the_programs_exist(document):
    from moesaic.integrations.transformers.command import ConvertOptions, UpcycleOptions
    from moesaic.train.config import TrainConfig

    options = (TrainConfig, ConvertOptions, UpcycleOptions)
    fields = (field for option in options for field in dataclasses.fields(option))
    known = {"--" + field.name.replace("_", "-") for field in fields} | {"--help"}
    text = document.read_text().replace("\\\n", " ")
    commands = re.findall(r"moesaic train\b([^\n`]*)|ARGS='([^']*)'|LAYOUT=[\"']([^\"']*)", text)
    named = {flag for parts in commands for flag in re.findall(r"--[a-z][a-z-]*", " ".join(parts))}
    # A flag in a table or in running text; those of other programs stand there with their program's name.
    named |= set(re.findall(r"`(--[a-z][a-z-]*)(?: [^`]*)?`", text)) - FLAGS_OF_OTHERS
    assert {flag.replace("--no-", "--", 1) for flag in named} - known == set()


FLAGS_OF_OTHERS = {"--nnodes", "--rdzv-id", "--signal"}


RULES = ROOT / "docs" / "sharding_rules.md"


def test_the_tutorial_runs(fresh_python, tmp_path):
    script = tmp_path / "tutorial.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", RULES.read_text(), re.DOTALL)))
    printed = fresh_python(script).stdout
    assert "proof of mylib::linear" in printed
    assert "nothing wrong, nothing missing" in printed


def test_the_plan_of_the_experts_is_read_from_the_rules():
    from moesaic.parallel.placements import PLACES
    from moesaic.sharding.rule import short

    said = {name: f"[{', '.join(map(short, placements))}]" for name, placements in PLACES.items()}
    text = (ROOT / "docs" / "design.md").read_text().split("<!-- places -->")[1]
    rows = re.findall(r"^\| (?:result )?`(\w+)` \| `(.*)` \| `(.*)` \|$", text, re.MULTILINE)
    gradients = {"z": said["grad"], **{n.removeprefix("grad_"): p for n, p in said.items() if n.startswith("grad_")}}
    assert rows == [(name, said[name], gradients[name]) for name, *_ in rows]
    assert {name for name, *_ in rows} == {*gradients}


def test_the_tables_are_those_of_the_rules():
    import torch

    from moesaic.sharding import rule_of

    rule = rule_of(torch.ops.moesaic.grouped_mm)
    tables = "\n\n".join(str(rule.placements(line)) for line in rule.lines)
    assert f"```\n{tables}\n```" in RULES.read_text()
    assert f"`{rule_of(torch.ops.moesaic.grouped_mm_weight_grad).lines[1]}`" in RULES.read_text()
