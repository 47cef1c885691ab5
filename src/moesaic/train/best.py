"""The best measurement of a run: kept in its checkpoints, so that a resumed run decides as the uninterrupted one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Best:
    """Which step was measured best so far. Lower scores are better."""

    score: float | None = None
    step: int = 0
    """0: nothing was measured yet."""
    misses: int = 0
    """How many measurements came since that were no better."""

    def note(self, score: float, step: int) -> bool:
        """Take note of a measurement. Whether it is better than all before it."""
        if self.score is None or score < self.score:
            self.score, self.step, self.misses = score, step, 0
            return True
        self.misses += 1
        return False
