"""Learning rates at the corners of their schedules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.train.config import TrainConfig
from moesaic.train.schedule import learning_rate


def _config(**changes):
    return TrainConfig(**{"lr": 1.0, "steps": 101, "warmup_steps": 20, "min_lr_ratio": 0.1, **changes})


def test_cosine():
    config = _config()
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 21)
    assert rates[20] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half-way down
    assert rates[100] == pytest.approx(0.1)
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)


def test_wsd():
    config = _config(schedule="wsd")
    assert {learning_rate(step, config) for step in range(20, 81)} == {1.0}
    assert learning_rate(90, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["cosine", "wsd"]), st.floats(0, 1), st.integers(0, 200))
def test_rates_stay_in_bounds_even_past_the_end(steps, warmup, schedule, ratio, step):
    config = _config(steps=steps, warmup_steps=warmup, schedule=schedule, min_lr_ratio=ratio)
    assert 0 <= learning_rate(step, config) <= 1
    if step < steps:
        assert learning_rate(step, config) >= min(ratio, 1 / (warmup + 1)) - 1e-12
