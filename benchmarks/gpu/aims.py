"""What is aimed at, and the worst that was measured. A row without numbers misses its aim; none measured says so."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu.products import FORWARD, WEIGHT_GRADIENT
from benchmarks.gpu.shapes import SHAPES, TOKENS

Row = dict[str, Any]


class Aim(NamedTuple):
    """``figure`` of each row that ``of`` takes has to be at least ``aim``, or at most."""

    what: str
    aim: float
    of: Callable[[Row], bool]
    figure: Callable[[Row, Row], float]
    is_least: bool = True


_KIND = {shape.name: shape.kind for shape in SHAPES}
_FEW, _MANY = min(TOKENS), max(TOKENS)


def _layer(kind: str | None, tokens: int = _MANY) -> Callable[[Row], bool]:
    return lambda r: (
        (r["what"], r["T"], r["routing"]) == ("layer", tokens, "balanced")
        and (kind is None or _KIND[r["shape"]] == kind)
    )


def _peak(name: str) -> Callable[[Row, Row], float]:
    return lambda row, ceilings: row[name] / ceilings["matmul TFLOP/s"]


def _plain(name: str) -> Callable[[Row, Row], float]:
    return lambda row, ceilings: row[name]


AIMS = (
    Aim("fine-grained forward, of the peak", 0.45, _layer("fine"), _peak("fwd TFLOP/s")),
    Aim("fine-grained forward, x the fair path", 1.4, _layer("fine"), _plain("fwd x fair")),
    Aim("fine-grained both passes, of the peak", 0.45, _layer("fine"), _peak("fwd+bwd TFLOP/s")),
    Aim("fine-grained both passes, x the fair path", 1.4, _layer("fine"), _plain("fwd+bwd x fair")),
    Aim("wide forward, of the peak", 0.6, _layer("wide"), _peak("fwd TFLOP/s")),
    Aim("wide forward, x the fair path", 1.0, _layer("wide"), _plain("fwd x fair")),
    Aim("wide both passes, of the peak", 0.6, _layer("wide"), _peak("fwd+bwd TFLOP/s")),
    Aim("wide both passes, x the fair path", 1.0, _layer("wide"), _plain("fwd+bwd x fair")),
    Aim(
        "weight gradient alone, 2,000 rows a group, of the peak",
        0.6,
        lambda r: r["what"] == "products" and r["T"] == _MANY and _KIND[r["shape"]] == "fine",
        _peak(f"{WEIGHT_GRADIENT} TFLOP/s"),
    ),
    Aim(
        "grouped_mm, groups of <= 64 rows, x torch",
        1.3,
        lambda r: r["what"] == "products" and r["T"] == _FEW,
        _plain(f"{FORWARD} x torch"),
    ),
    Aim(
        "decode by replay, of the copy's bandwidth",
        0.7,
        _layer(None, _FEW),
        lambda row, ceilings: row["weights GB/s"] / ceilings["copy GB/s"],
    ),
    Aim(
        "saved for the backward pass, of the pre-activations",
        1.02,
        _layer(None),
        lambda row, _: row["saved bytes"] / row["saved bytes, least"],
        is_least=False,
    ),
)
_ZIPF = "zipf against balanced, both passes"
_MOST_ZIPF = 1.15


def verdicts(rows: list[Row]) -> list[Row]:
    """A row for each aim."""
    ceilings = next((r for r in rows if r["what"] == "ceilings" and "failed" not in r), {})
    found = []
    for aim in AIMS:
        figures = []
        for row in filter(aim.of, (r for r in rows if "shape" in r)):
            try:
                figures.append(aim.figure(row, ceilings))
            except KeyError:  # it failed before that
                figures.append(float("nan"))
        found.append(_verdict(aim.what, aim.aim, figures, aim.is_least))
    return [*found, _verdict(_ZIPF, _MOST_ZIPF, _against_balanced(rows), False)]


def _against_balanced(rows: list[Row]) -> list[float]:
    layers = {(r["shape"], r["T"], r["routing"]): r for r in rows if r["what"] == "layer"}
    name = "fwd+bwd triton ms"
    return [
        zipf.get(name, float("nan")) / layers[shape, tokens, "balanced"].get(name, float("nan"))
        for (shape, tokens, routing), zipf in layers.items()
        if routing == "zipf" and tokens == _MANY and (shape, tokens, "balanced") in layers
    ]


def _verdict(what: str, aim: float, figures: list[float], is_least: bool) -> Row:
    row: Row = {"what": what, "aim": f"{'>=' if is_least else '<='} {aim:g}", "rows": len(figures)}
    if not figures:
        return row | {"met": "not measured"}
    if any(f != f for f in figures):
        return row | {"met": "no: a row failed"}
    worst = min(figures) if is_least else max(figures)
    return row | {"worst": worst, "met": "yes" if (worst >= aim if is_least else worst <= aim) else "no"}
