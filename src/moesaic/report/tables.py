"""The tables of the page: what came out of each run, and the settings that differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from moesaic.parallel.mesh import axis_names
from moesaic.report.charts import dead_experts
from moesaic.report.record import Record
from moesaic.train.config import TrainConfig, to_json
from moesaic.train.metrics import TIME

_SCORES = {"bits_per_byte": "bits a byte", "held_out_loss": "nats a token"}
_NAMES = {
    "unigram": "unigram bytes",
    "bigram": "bigram bytes",
    "before": "before fine-tuning",
    "model": "this model",
}
# Experts of a layer that are listed.
_LISTED = 24


def summary(runs: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Rows of a name and a cell for each run; those that no run has anything for are left out."""
    rows: list[tuple[str, list[str]]] = [
        ("state", [_state(run) for run in runs]),
        ("last training loss", [_last(run, "loss", "{:.4f}") for run in runs]),
    ]
    for name, unit in _SCORES.items():
        scores = [_scores(run, name) for run in runs]
        keys = dict.fromkeys(key for found in scores for key in found)
        rows += [
            (f"held out: {_NAMES.get(key, key)}, {unit}", [_number(found.get(key)) for found in scores]) for key in keys
        ]
        names = dict.fromkeys(key for run in runs for key in (run.result or {}) if key.startswith(f"{name}/"))
        rows += [
            (f"{key.partition('/')[2]}, {unit}", [_number((run.result or {}).get(key)) for run in runs])
            for key in names
        ]
    rows += [
        ("exported, of step", [str((run.result or {}).get("best_step", "")) for run in runs]),
        ("tokens a second, median", [_median(run, "tokens_per_second") for run in runs]),
        ("most memory of a process", [_most(run, "memory_gib", "{:.2f} GiB") for run in runs]),
        ("time", [_time(run) for run in runs]),
        ("parameters", [f"{n:,}" if isinstance(n := run.about.get("parameters"), int) else "" for run in runs]),
        ("processes", [str(run.about.get("world_size", "")) for run in runs]),
        ("layout", [_layout(run.settings) for run in runs]),
        ("busiest expert, over the mean", [_last(run, "balance", "{:.2f}") for run in runs]),
        ("experts without a token", [_last(run, "dead_experts", "{:.0f}") for run in runs]),
    ]
    return [(name, cells) for name, cells in rows if any(cells)]


def settings(runs: Sequence[Record]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """The settings that differ between runs (of one run: from the defaults), and all others."""
    names = [field.name for field in fields(TrainConfig)] + ["processes", "moesaic", "torch", "transformers", "python"]
    known = dict.fromkeys([*names, *(name for run in runs for name in run.settings)])
    defaults = to_json(TrainConfig())
    differing, same = [], []
    for name in known:
        values = [_setting(run, name) for run in runs]
        if all(value is _NONE for value in values):
            continue
        cells = [_shown(value) for value in values]
        compared = [*values, defaults[name]] if len(runs) == 1 and name in defaults else values
        (differing if any(value != compared[0] for value in compared) else same).append((name, cells))
    return differing, same


def dead(run: Record) -> tuple[int, list[tuple[str, str]]]:
    """How many steps were looked at, and of each layer with dead experts which ones."""
    steps, found = dead_experts(run)
    return steps, [(layer, _listed(experts)) for layer, experts in found.items()]


_NONE = object()


def _setting(run: Record, name: str) -> Any:
    versions = run.about.get("versions")
    more = {"processes": run.about.get("world_size", _NONE), **(versions if isinstance(versions, dict) else {})}
    return run.settings.get(name, more.get(name, _NONE))


def _shown(value: Any) -> str:
    return "" if value is _NONE else "none" if value is None else str(value)


def _state(run: Record) -> str:
    steps = run.settings.get("steps")
    return f"{'finished' if run.result else 'not finished'}, step {run.step} of {steps}"


def _scores(run: Record, name: str) -> dict[str, Any]:
    found = (run.result or {}).get(name)
    if isinstance(found, dict):
        return found
    _, values = run.series(name)
    return {"model": values[-1]} if values else {}


def _last(run: Record, name: str, form: str) -> str:
    values = run.series(name)[1]
    return form.format(values[-1]) if values else ""


def _most(run: Record, name: str, form: str) -> str:
    values = run.series(name)[1]
    return form.format(max(values)) if values else ""


def _median(run: Record, name: str) -> str:
    # The first steps warm up.
    values = run.series(name)[1]
    return f"{statistics.median(values[len(values) // 4 :]):,.0f}" if values else ""


def _time(run: Record) -> str:
    times = run.series(TIME)[1]
    if len(times) < 2:
        return ""
    minutes, seconds = divmod(round(times[-1] - times[0]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _layout(settings: dict[str, Any]) -> str:
    sizes = {name: settings.get(name) for name in axis_names()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size not in (None, 1))


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _listed(experts: list[int]) -> str:
    more = f" and {len(experts) - _LISTED} more" if len(experts) > _LISTED else ""
    return ", ".join(map(str, experts[:_LISTED])) + more
