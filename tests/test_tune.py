"""``moesaic tune``: what it measures, keeps and says."""

import pytest
import torch

from moesaic import cli, info
from moesaic.ops import fastest, native, tuned
from moesaic.ops.choices import CASES, Case
from moesaic.ops.processor import processor
from moesaic.tune import command, measure
from tests.ops.cpu_isa import needs_kernels

CASE = Case("experts_mlp", torch.float32, "few")
TINY = (measure.Sizes(2, 8, 8), measure.Sizes(3, 4, 8))

pytestmark = needs_kernels


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("MOESAIC_TUNED", str(path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fastest._own.cache_clear()
    yield path
    fastest._own.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """The command without its measurement, which finds that the kernels are twice as fast."""

    def found(dtype, rounds):
        return (measure.Timed(case, [{"cpu": 1.0, "torch": 2.0}] * 2, 2.0) for case in CASES if case.dtype == dtype)

    monkeypatch.setattr(command, "measure", found)


def _run(capsys, *arguments):
    status = cli.main(["tune", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_it_measures_every_case_keeps_it_shows_it_and_forgets_it(file, capsys, monkeypatch):
    monkeypatch.setattr(command, "SIZES", TINY)
    monkeypatch.setattr(command, "measure", lambda dtype, rounds: measure.measure(dtype, rounds, TINY))
    status, out, _ = _run(capsys, "--rounds", "1", "--threads", "1")
    assert status == 0
    assert out.count("experts_mlp_backward_into") == 2
    assert f"kept in {file}" in out
    (kept,) = tuned.read(file).values()
    assert kept.choices.keys() == set(CASES)
    assert set(kept.seconds["float32 grouped_mm one"][1]) == {"E", "D", "F", "cpu", "torch"}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    said = "\n".join(info.lines())
    assert "(measured here by moesaic tune, 20" in said
    assert f"moesaic tune: measured this machine, see {file}" in said
    torch.set_num_threads(threads)

    status, out, _ = _run(capsys, "--show", "--threads", "1")
    assert status == 0
    assert "bfloat16 experts_mlp_inference" in out
    assert "nothing is kept for this machine" in _run(capsys, "--show", "--threads", "9")[1]
    assert _run(capsys, "--forget", "--threads", "1")[:2] == (
        0,
        f"forgotten; {file} keeps nothing of this machine now\n",
    )
    assert tuned.read(file) == {}


def test_a_dry_run_keeps_nothing_and_a_damaged_file_is_written_anew(file, measured, capsys, monkeypatch):
    file.write_text("{")
    assert "nothing was kept (--dry-run)" in _run(capsys, "--dry-run")[1]
    assert file.read_text() == "{"
    status, _, err = _run(capsys, "--show")
    assert status == 2
    assert f"moesaic tune: the file of moesaic tune, {file}, cannot be used" in err
    assert "; it was written anew)" in _run(capsys)[1]
    assert len(tuned.read(file)) == 1
    file.write_text("{")
    assert "all that it had is forgotten" in _run(capsys, "--forget")[1]
    monkeypatch.setenv("MOESAIC_TUNED", "none")
    assert _run(capsys, "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--show", "--forget"], {}, "give one of --dry-run, --show and --forget"),
        (["--threads", "0"], {}, "--threads must be at least 1, not 0"),
        (["--rounds", "-1"], {}, "--rounds must be at least 1, not -1"),
        ([], {"WORLD_SIZE": "2"}, "run it without a launcher"),
        ([], {"MOESAIC_TUNED": "none"}, "MOESAIC_TUNED is none: name a file by MOESAIC_TUNED, or give --dry-run"),
    ],
)
def test_what_it_cannot_do(file, arguments, environment, said, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, out, err = _run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert not file.exists()


def test_it_says_what_it_cannot_write_and_that_there_are_no_kernels(file, measured, capsys, monkeypatch):
    file.mkdir()
    status, _, err = _run(capsys)
    assert status == 2
    assert f"cannot write {file}: " in err
    assert list(file.parent.iterdir()) == [file]
    monkeypatch.setattr(native, "kernels", lambda: "they were not built")
    assert _run(capsys)[2] == "moesaic tune: there are no CPU kernels here to choose, they were not built\n"


def test_a_close_call_changes_nothing():
    def timed(ratio):
        return measure.Timed(CASE, [], ratio)

    assert [timed(r).fastest("torch") for r in (0.5, 0.98, 1.0, 1.02, 1.5)] == ["torch"] * 4 + ["cpu"]
    assert [timed(r).fastest("cpu") for r in (0.5, 0.98, 1.0, 1.02, 1.5)] == ["torch"] + ["cpu"] * 4
    assert measure.chosen([timed(1.0)], {}) == {CASE: "cpu"}


def test_a_slow_one_is_timed_once(monkeypatch):
    runs = []
    seconds = {"cpu": 0.0, "torch": 0.0}

    def clock():
        return sum(seconds.values())

    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(measure.time, name, clock)

    def run(impl):
        runs.append(impl)
        seconds[impl] += 1.0 if impl == "torch" else 0.1

    assert measure.race(run, 5) == pytest.approx({"cpu": 0.1, "torch": 1.0})
    assert runs.count("torch") == 2


@pytest.mark.parametrize("dtype", list(native.DTYPES))
def test_both_implementations_compute_the_same(dtype):
    for operator, call in measure.calls(measure.Sizes(3, 8, 16), 5, dtype).items():
        if operator.endswith(("grad", "mlp", "mm", "inference", "backward")) and "accumulate" not in operator:
            ours, theirs = (call(impl) for impl in ("cpu", "torch"))
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_info_says_for_which_dtypes_the_kernels_run():
    all_run = dict.fromkeys(CASES, "cpu")
    assert info._where_they_run("avx2", all_run) == "avx2"
    assert info._where_they_run("avx2", all_run | {CASE: "torch"}) == "avx2, for float32 in part and bfloat16"
    only_fp32 = {case: "cpu" if case.dtype == torch.float32 else "torch" for case in CASES}
    assert info._where_they_run("avx2", only_fp32) == "avx2, for float32"


def test_info_offers_it_where_nobody_measured(monkeypatch):
    machine = processor()._replace(vendor="Other")
    monkeypatch.setenv("MOESAIC_TUNED", "/nowhere/tuned.json")
    for module in (fastest, info):
        monkeypatch.setattr(module, "processor", lambda: machine)
    fastest._own.cache_clear()
    said = info.lines()
    fastest._own.cache_clear()
    assert any(line.startswith("moesaic tune: measures what is the fastest here") for line in said)
    (kernels,) = (line for line in said if line.startswith("CPU kernels: "))
    assert kernels == f'CPU kernels: none without impl="cpu"; {machine.kernels} with it'
    assert sum("nobody measured" in line for line in said) == 2
