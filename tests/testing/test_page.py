"""docs/check.md does what it says: the check in it runs, and prints the report in it."""

import re
import sys
from pathlib import Path

import pytest

from moesaic.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "check.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def without_numbers_of_this_run(report: str) -> list[str]:
    """Without seconds and multiples of noise, which differ from machine to machine."""
    report = re.sub(r"[\d.]+ s\b", "N s", re.sub(r"[\d.e+]+ x noise", "N x noise", report))
    return [" ".join(line.split()) for line in report.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_page_prints_what_it_says(tmp_path, monkeypatch, capsys):
    [program], [command], [report] = blocks("python mycheck.py"), blocks("bash"), blocks("text")
    (tmp_path / "mycheck.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name, layouts = re.fullmatch(r'moesaic check (\S+) --layouts "(.*)"\n', command).groups()
    assert main(["check", name, "--layouts", layouts]) == 1
    assert without_numbers_of_this_run(capsys.readouterr().out) == without_numbers_of_this_run(report)
    fixed = re.sub(r"    for p in model.experts.*\n.*\n", "", program)
    assert fixed != program
    (tmp_path / "fixed.py").write_text(fixed)
    assert main(["check", "fixed:tiny", "--layouts", "ep=2"]) == 0
