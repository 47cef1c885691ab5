"""The GPU benchmarks run: at tiny sizes, on the CPU, their kernels in the interpreter, with all of their own checks.

And they end within their budget, whatever happens to the process that measures.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


# The kernels have tests of their own in the interpreter.
@pytest.mark.long
def test_dry_run_of_all(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", tmp_path, "--jobs", "1"],
        env=os.environ | {"MOESAIC_NO_TYPECHECK": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert record["dry run, times mean nothing"]
    assert record["no time was left for"] == []
    rows = record["rows"]
    assert {"warm", "ceilings", "layer", "products", "profile", "sweep", "others", "checks", "one pass"} <= {
        row["what"] for row in rows
    }
    assert [row for row in rows if "failed" in row] == []
    layers = [row for row in rows if row["what"] == "layer"]
    assert {(row["T"], row["routing"]) for row in layers} == {(t, r) for t in (6, 20) for r in ("balanced", "zipf")}
    assert all(row["checked"] == "fp64, bits, no sync" for row in layers)
    assert all(row["saved bytes"] >= row["saved bytes, least"] for row in layers)
    assert "fine-grained both passes, x the fair path" in {aim["what"] for aim in record["aims"]}
    assert "not measured" in {aim["met"] for aim in record["aims"]}


def test_without_a_gpu_it_says_so_and_needs_no_installation(fresh_python):
    # As in a checkout that is not installed: without the finder and the folder of an editable install.
    said = fresh_python(f"""
import sys
from pathlib import Path
sys.meta_path[:] = [f for f in sys.meta_path if "moesaic" not in type(f).__module__]
sys.path[:] = ["{ROOT}", *(p for p in sys.path if not Path(p, "moesaic").is_dir())]
class Without:
    def find_spec(self, name, path=None, target=None):
        if name in ("tyro", "beartype"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Without())
import torch
torch.cuda.is_available = lambda: False
import benchmarks.gpu.__main__ as everything, benchmarks.gpu.worker as worker, benchmarks.gpu.one_pass as one_pass
import moesaic
assert moesaic.__file__.startswith("{ROOT}"), moesaic.__file__
sys.argv[1:] = []
for main in (everything.main, worker.main, one_pass.main):
    try:
        main()
    except SystemExit as error:
        print(error)
""").stdout
    expected = "no GPU here: run on one, or with --dry-run to see that the script works"
    assert said.splitlines() == [expected] * 3


# Stands in for the process that measures: what it says for each task.
_WORKER = """
import json, sys, time
for number, task in json.loads(sys.argv[1])["tasks"]:
    print(f"\\x01begin {number}", flush=True)
    what = task[0]
    if what == "hangs":
        time.sleep(60)
    if what == "dies":
        print("a last word", flush=True)
        sys.exit(75)
    print("\\x01row " + json.dumps({"what": what, "shape": task[1], "T": task[2], "routing": task[3]}), flush=True)
    time.sleep(0.2 if what == "slow" else 0)
    print(f"\\x01end {number}", flush=True)
"""


@pytest.fixture
def command(monkeypatch):
    from benchmarks.gpu import __main__ as command

    def start(arguments: dict) -> subprocess.Popen:
        program = [sys.executable, "-c", _WORKER, json.dumps(arguments)]
        return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(command, "_start", start)
    monkeypatch.setattr(command, "DRY_RUN", True)
    monkeypatch.setattr(command, "_ROW", 0.3)
    monkeypatch.setattr(command, "_HANGS", 1.5)
    return command


def test_what_hangs_or_dies_costs_its_own_row(command, tmp_path, capfd):
    record = command.Record(tmp_path)
    tasks = [command.Task(what) for what in ("first", "dies", "second", "hangs", "third")]
    assert command.measure(tasks, record, time.monotonic() + 60) == []
    assert [(row["what"], row.get("failed")) for row in record.rows] == [
        ("first", None),
        ("dies", "the process ended with code 75"),
        ("second", None),
        ("hangs", "no answer in 1.5 s"),
        ("third", None),
    ]
    assert json.loads(record.file.read_text())["rows"] == record.rows
    assert "a last word" in capfd.readouterr().out


def test_it_ends_when_its_time_is_over(command, tmp_path):
    record = command.Record(tmp_path)
    tasks = [command.Task("slow", str(n)) for n in range(100)]
    start = time.monotonic()
    left = command.measure(tasks, record, start + 2)
    assert time.monotonic() - start < 3
    assert left
    assert [row["shape"] for row in record.rows] == [str(n) for n in range(100 - len(left))]
    hanging = command.measure([command.Task("hangs"), command.Task("never")], record, time.monotonic() + 1)
    assert hanging == [command.Task("never")]
    assert record.rows[-1]["failed"] == "no time was left"


def test_every_row_of_the_plan_counts_towards_an_aim_that_is_met_or_not():
    from benchmarks.gpu import aims

    ceilings = {"what": "ceilings", "matmul TFLOP/s": 800.0, "copy GB/s": 4000.0}
    row = {"what": "layer", "shape": "Qwen3-30B-A3B", "T": 32768, "routing": "balanced", "fwd TFLOP/s": 400.0}
    row |= {"fwd x fair": 1.5, "fwd+bwd x fair": 1.3, "saved bytes": 103, "saved bytes, least": 100}
    found = {aim["what"]: aim for aim in aims.verdicts([ceilings, row | {"fwd+bwd triton ms": 10.0}])}
    assert found["fine-grained forward, of the peak"]["met"] == "yes"
    assert found["fine-grained forward, of the peak"]["worst"] == 0.5
    assert found["fine-grained both passes, x the fair path"]["met"] == "no"
    assert found["fine-grained both passes, of the peak"]["met"] == "no: a row failed"
    assert found["saved for the backward pass, of the pre-activations"]["met"] == "no"
    assert found["wide forward, of the peak"]["met"] == "not measured"
    assert found["zipf against balanced, both passes"]["met"] == "not measured"
    skewed = row | {"routing": "zipf", "fwd+bwd triton ms": 11.0}
    last = aims.verdicts([ceilings, row | {"fwd+bwd triton ms": 10.0}, skewed])[-1]
    assert last["met"] == "yes"
    assert last["worst"] == pytest.approx(1.1)
