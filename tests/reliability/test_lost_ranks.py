"""A rank that is killed or stopped does not hold the others: they end soon, and one line says what happened."""

import dataclasses
import os
import signal
import threading
import time

import pytest

from moesaic.checkpoint import checkpoints
from moesaic.testing.pool import RankError
from moesaic.train import loop
from moesaic.train.errors import TrainingError
from tests.train.test_resume import _fit

pytestmark = pytest.mark.slow


def _fit_beside(config, cache, victim, number):
    """Train while rank `victim` gets a signal after step 3; what the others raise, and how long after that."""
    if int(os.environ["RANK"]) == victim:
        original, calls = loop.reset_expert_load, iter(range(2))

        def deadly(model):
            if next(calls, None) is None:
                os.kill(os.getpid(), number)
            original(model)

        loop.reset_expert_load = deadly
        # So that the test ends, once the others have.
        pid = os.fork() if number == signal.SIGSTOP else 1
        if pid == 0:
            time.sleep(30)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
    try:
        _fit(config, cache)
    except TrainingError as error:
        # A result would be lost with that of the victim.
        if error.told:
            (config.out / "said").write_text(str(error))


@pytest.mark.parametrize(
    ("number", "victim"), [(signal.SIGKILL, 0), pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.long)], ids=str
)
def test_one_line_says_who_is_lost(tiny, cache, ranks, number, victim):
    config = dataclasses.replace(tiny, ep=2, save_every=2, timeout=5)
    with pytest.raises(RankError, match="exit code -9"):
        ranks(_fit_beside, 2, config, cache, victim, number)
    said = (config.out / "said").read_text()
    assert "\n" not in said
    assert f"rank {victim} was lost after step 3: killed, stopped or cut off" in said
    newest = checkpoints(config.out / "checkpoints")[-1]
    assert newest.name == "step-00000002"
    assert f"The last checkpoint is {newest}. To continue from it: torchrun" in said
    assert said.endswith(f"-m moesaic train --resume --out {config.out}")
    assert "Traceback" in (config.out / "failures" / f"rank-{1 - victim}.log").read_text()


def _fit_slowly(config, cache):
    """Each thing that may take long takes longer than the timeout on rank 1, and a step in the middle does not."""

    def slow(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            if int(os.environ["RANK"]) == 1:
                time.sleep(1.5)
            return original(*args, **kwargs)

        setattr(module, name, call)

    original, calls = loop.train_step, iter(range(1))

    def first_is_slow(*args, **kwargs):
        if next(calls, None) is not None and int(os.environ["RANK"]) == 1:
            time.sleep(1.5)
        return original(*args, **kwargs)

    loop.train_step = first_is_slow
    slow(loop, "save")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    measured = []
    from moesaic.train.run import set_up
    from moesaic.train.runtime import started

    with started("cpu", 1) as runtime:
        run = set_up(config, runtime, lambda text: None)

        def measure():
            measured.append(time.sleep(1.5) if runtime.rank else None)
            return {}

        finished = loop.fit(run, loop.open_screen(False), measure)
        run.close()
    return finished, len(measured), threading.active_count()


def test_what_may_take_long_does_not_trip_the_timeout(tiny, cache, ranks):
    config = dataclasses.replace(tiny, ep=2, steps=3, eval_every=2, timeout=1)
    for finished, measured, _ in ranks(_fit_slowly, 2, config, cache):
        assert finished
        assert measured == 1
