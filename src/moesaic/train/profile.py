"""Traces of some steps, by torch.profiler: one file for each process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moesaic import ranks


class StepProfiler:
    """Records the steps that are asked for. Call :meth:`before` and :meth:`after` each step.

    Args:
        steps: which.
        folder: for the traces.
        device: that computes.
        notify: shows a text.
    """

    def __init__(self, steps: range, folder: Path, device: torch.device, notify: Callable[[str], None]):
        self._steps, self._folder, self._device, self._notify = steps, folder, device, notify
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Step `step` (from 1) begins. A run that starts in the middle records what is left."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._first = step
            self._profile.start()

    def after(self, step: int) -> None:
        """Step `step` is over."""
        if step + 1 not in self._steps:
            self.close(step)

    def close(self, step: int) -> None:
        """Stop, and write what has been recorded up to `step`. Where it cannot be written, training goes on."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        if step < self._first:
            return
        path = self._folder / f"steps-{self._first}-{step}-rank-{ranks.rank()}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self._notify(f"warning: cannot write {path}: {error}; training continues")
        else:
            self._notify(f"trace of steps {self._first} to {step}: {path}")
