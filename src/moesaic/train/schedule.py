"""The learning rate, as a pure function of the step: nothing to save, nothing to restore."""

import math

from moesaic.train.config import TrainConfig

# Part of a WSD schedule that is warm-up and plateau; the rest is decay.
_WSD_DECAY_FROM = 0.8


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0).

    Warm-up is linear and ends at the peak in step `warmup_steps`; the last step has `min_lr_ratio` of the peak.
    """
    assert config.lr is not None  # with_defaults has seen to both
    assert config.warmup_steps is not None
    warmup = min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    last = config.steps - 1
    if config.schedule == "wsd":
        start = max(warmup, math.floor(last * _WSD_DECAY_FROM))
        done = (step - start) / max(1, last - start)
        part = 1 - min(max(done, 0.0), 1.0)
    else:
        done = (step - warmup) / max(1, last - warmup)
        part = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * part)
