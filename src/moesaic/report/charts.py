"""What the charts of the page show, as JSON values: curves over steps, and the load of experts over steps and layers.

Long runs are thinned, so that the page stays small: a curve keeps the extremes of each stretch, a heatmap some steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moesaic.report.record import Record

# Points of a curve, and cells of all heatmaps of a run.
_POINTS = 1000
_CELLS = 1_000_000
_COLUMNS = 150
# An expert is dead that got no token in as many logged steps as these, the last ones.
LAST = 10


class Chart(NamedTuple):
    """A metric, and what it is called."""

    name: str
    title: str
    unit: str


_CHARTS = (
    Chart("loss", "Training loss", "nats a token"),
    Chart("bits_per_byte", "Held-out text", "bits a byte"),
    Chart("held_out_loss", "Held-out conversations", "nats a token"),
    Chart("tokens_per_second", "Throughput", "tokens a second"),
    Chart("balance", "Busiest expert, over the mean of its layer", "times the mean"),
    Chart("dead_experts", "Experts without a token", "experts of all layers"),
    Chart("router_entropy", "Entropy of the routers' scores, over that of equal scores", "mean of all layers"),
    Chart("mfu", "Part of the peak that the model uses (MFU)", ""),
    Chart("tflops", "Arithmetic of the model", "10^12 operations a second and process"),
    Chart("sent_mib", "Sent to other processes in the exchange of tokens", "MiB a step"),
    Chart("capacity_used", "Copies sent to one process at most, over the capacity", ""),
    Chart("memory_gib", "Memory of the largest process", "GiB"),
    Chart("grad_norm", "Norm of the gradient", "before clipping"),
    Chart("lr", "Learning rate", ""),
    Chart("balance_loss", "Balance loss", "as added to the loss"),
)


def curves(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """A chart for each metric that some run has: its title, and a series for each run."""
    found = []
    for chart in _CHARTS:
        series = [
            {"run": index, "label": label, "x": steps, "y": values}
            for index, run in enumerate(runs)
            for label, name in _names_of(run, chart.name)
            for steps, values in [_thinned(*run.series(name))]
            if steps
        ]
        if any(any(one["y"]) for one in series):
            found.append({"id": chart.name.replace("_", "-"), **chart._asdict(), "series": series})
    return found


def _names_of(run: Record, name: str) -> list[tuple[str, str]]:
    """The metric itself, and that of each further evaluation set, `name/set`, with what is added to the run's name."""
    further = sorted({key for row in run.rows for key in row if key.startswith(f"{name}/")})
    return [("", name), *((key.partition("/")[2], key) for key in further)]


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Both, with at most `_POINTS` points: of each stretch the smallest and the largest value, and the last point."""
    if len(steps) <= _POINTS:
        return steps, values
    stretch = -(-2 * len(steps) // (_POINTS - 1))
    kept = {len(steps) - 1}
    for start in range(0, len(steps), stretch):
        part = range(start, min(start + stretch, len(steps)))
        kept |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def heatmap(run: Record) -> dict[str, Any] | None:
    """The layers of a run, the steps that are shown, and of each layer the tokens by expert and step."""
    loads = run.loads
    if not loads:
        return None
    layers = list(loads[-1][1])
    sizes = {layer: len(loads[-1][1][layer]) for layer in layers}
    # Another model in the same folder, or a damaged line.
    loads = [(step, load) for step, load in loads if {name: len(counts) for name, counts in load.items()} == sizes]
    columns = max(2, min(_COLUMNS, _CELLS // sum(sizes.values())))
    if len(loads) > columns:
        loads = [loads[round(place * (len(loads) - 1) / (columns - 1))] for place in range(columns)]
    return {
        "layers": layers,
        "steps": [step for step, _ in loads],
        "tokens": [[[load[layer][e] for _, load in loads] for e in range(sizes[layer])] for layer in layers],
    }


def dead_experts(run: Record) -> tuple[int, dict[str, list[int]]]:
    """How many logged steps were looked at, and of each layer the experts that got no token in any of them."""
    last = run.loads[-LAST:]
    layers = last[-1][1] if last else {}
    sums = {
        name: [sum(load[name][e] for _, load in last if len(load.get(name, ())) > e) for e in range(len(counts))]
        for name, counts in layers.items()
    }
    dead = {name: [e for e, total in enumerate(totals) if not total] for name, totals in sums.items()}
    return len(last), {name: experts for name, experts in dead.items() if experts}
