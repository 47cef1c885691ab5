"""Help texts: every line fits the terminal and is as full as it can be, and the flags of a group stand together."""

import contextlib
import io
import itertools
import re
from dataclasses import dataclass

import pytest

from moesaic.cli import COMMANDS, main
from moesaic.options import docstrings, parse
from moesaic.train.config import TrainConfig


def _help(monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if command == "info":
            assert main([command, "--help"]) == 0
        else:
            with pytest.raises(SystemExit, match="0"):
                main([command, "--help"])
    return printed.getvalue()


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_and_breaks_no_sentence(monkeypatch, command, width):
    lines = _help(monkeypatch, command, width).splitlines()
    assert [line for line in lines if len(line) > width] == []
    # A line ends within a sentence only where the next word would not have fitted.
    lines = [line.strip("│").rstrip() for line in lines]
    for line, following in itertools.pairwise(lines):
        if re.search(r"[a-z,]$", line) and re.match(r" *[a-z]", following):
            assert len(line) + len(following.split()[0]) > width - 6, (line, following)


def test_flags_of_training_stand_in_groups(monkeypatch):
    text = _help(monkeypatch, "train", 100)
    titles = re.findall(r"(\w+) options", text)
    assert titles == ["text", "model", "adapter", "layout", "optimisation", "run", "measuring"]
    assert (
        text.index("layout options") < text.index("--etp ") < text.index("optimisation options") < text.index("--lr ")
    )


def test_values_of_flags_and_of_a_default():
    assert parse(TrainConfig, "train", []) == TrainConfig()
    default = TrainConfig(lr=1e-2, steps=7, betas=(0.5, 0.6), packing=False)
    expected = TrainConfig(lr=1e-2, steps=9, betas=(0.5, 0.6), packing=False, dp_shard=2)
    assert parse(TrainConfig, "train", ["--steps", "9", "--dp-shard", "2"], default=default) == expected


@dataclass(frozen=True)
class _Options:
    """A thing."""

    one: int
    """The first
    line."""
    two: str = ""
    three: int = 3
    """Three."""


def test_docstrings_of_fields():
    assert docstrings(_Options) == {"one": "The first line.", "three": "Three."}


def test_mistakes_in_flags_end_with_status_2(capsys):
    for arguments in (["--one", "x"], ["--four", "4"], []):
        with pytest.raises(SystemExit) as leaving:
            parse(_Options, "thing", arguments)
        assert leaving.value.code == 2
        assert "moesaic thing" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            parse(_Options, "thing", arguments, speak=False)
        assert capsys.readouterr() == ("", "")
