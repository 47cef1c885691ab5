"""Fixtures of every test. Shapes and types of the public functions are checked here and only here."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

# Has to come before anything imports moesaic. A checked function breaks torch.compile(fullgraph=True): tests
# that compile run in `fresh_python`, where the hook is off.
if not os.environ.get("MOESAIC_NO_TYPECHECK"):
    assert "moesaic" not in sys.modules, "moesaic was imported before its run-time checks were installed"
    install_import_hook("moesaic", "beartype.beartype")

from moesaic.testing.fixtures import equal_gradients  # noqa: E402, F401
from moesaic.testing.pool import Ranks, preload, run_ranks  # noqa: E402
from tests.forked import run_forked  # noqa: E402

# What many tests need on ranks.
preload("hypothesis", "pytest", "transformers.models.qwen3_moe.modeling_qwen3_moe")

# What somebody has measured on this machine is not to choose what tests run.
os.environ.setdefault("MOESAIC_TUNED", "none")

# The same examples in every run. HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """All durations go to a file, longest first; the screen shows ten."""
    reports = [r for group in terminalreporter.stats.values() for r in group if isinstance(r, pytest.TestReport)]
    reports.sort(key=lambda r: -r.duration)
    file = ROOT / "build" / "durations.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{r.duration:8.2f} {r.when:8} {r.nodeid}\n" for r in reports))


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list]:
    """`ranks(fn, world_size, *args, **kwargs)`: results of a module-level `fn` on new gloo ranks."""
    return run_ranks


@pytest.fixture(scope="module")
def same_ranks() -> Iterator[Callable[..., list]]:
    """As `ranks`, but the tests of a module that ask for the same number of ranks get the same processes."""
    by_size: dict[int, Ranks] = {}

    def run(fn: Callable[..., object], world_size: int, *args: object, **kwargs: object) -> list:
        return by_size.setdefault(world_size, Ranks(world_size))(fn, *args, **kwargs)

    yield run
    for ranks in by_size.values():
        ranks.stop()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without run-time checks, which would otherwise raise before the library's own errors can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fresh_python(code_or_path, *args)` in a new interpreter without run-time checks; it has to succeed."""

    def run(code_or_path: str | Path, *args: object) -> subprocess.CompletedProcess[str]:
        program = [str(code_or_path)] if isinstance(code_or_path, Path) else ["-c", code_or_path]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, *program, *map(str, args)],
            env=os.environ | {"MOESAIC_NO_TYPECHECK": "1", "PYTHONPATH": path},
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=300,
        )
        return _succeeded(done)

    return run


@pytest.fixture(scope="session")
def forked_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `fresh_python`, from a process that has imported torch and moesaic: for what does not test imports."""

    def run(code_or_path: str | Path, *args: object) -> subprocess.CompletedProcess[str]:
        return _succeeded(run_forked(code_or_path, *map(str, args)))

    return run


def _succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done
