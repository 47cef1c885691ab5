"""Benchmarks leave what they have when they are stopped, and each has a quick form."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [file for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text()]

ENDLESS = """
import sys, time
from pathlib import Path
from as_they_come import Results

def merge(rows):
    return [{"n": -1}, *rows]

with Results(Path(sys.argv[1]), {"what": "numbers"}, lambda row: f"row {row['n']}", merge=merge) as results:
    for n in range(3):
        results.add({"n": n})
    if "fail" in sys.argv:
        raise ValueError("broken")
    while "end" not in sys.argv:
        time.sleep(1)
print("table of", len(results.rows))
results.done()
"""


def start(*arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", ENDLESS, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets the programs that it starts in the background ignore it, and theirs too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read(file: Path) -> tuple[list[int], bool]:
    record = json.loads(file.read_text())
    assert record["what"] == "numbers"
    return [row["n"] for row in record["rows"]], record.get("stopped", False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_writes_and_shows_what_it_has(tmp_path, number):
    file = tmp_path / "new" / "rows.json"
    process = start(file)
    assert [process.stdout.readline() for _ in range(3)] == ["row 0\n", "row 1\n", "row 2\n"], "as they come"
    process.send_signal(number)
    said, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == f"table of 3\nwritten: {file}\n"
    assert errors == "stopped; this is what was measured:\n"
    assert read(file) == ([-1, 0, 1, 2], True)
    assert os.listdir(file.parent) == ["rows.json"]


def test_a_run_that_nobody_could_stop_has_written_all_the_same(tmp_path):
    file = tmp_path / "rows.json"
    process = start(file)
    while process.stdout.readline() != "row 2\n":
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert read(file)[0][:3] == [-1, 0, 1]


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("fail", 1)])
def test_a_run_that_ends_or_fails(tmp_path, how, status):
    file = tmp_path / "rows.json"
    process = start(file, how)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert ("ValueError: broken" in errors) == bool(status)
    assert read(file) == ([-1, 0, 1, 2], False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_each_has_a_quick_form_and_writes_rows_as_they_come(script):
    text = script.read_text()
    assert "quick: " in text
    assert "as_they_come import" in text
