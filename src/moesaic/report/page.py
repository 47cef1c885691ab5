"""The page: one file of HTML with the data, the style and plotly.js in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

from moesaic.report import charts, tables
from moesaic.report.record import Record


def render(runs: Sequence[Record]) -> str:
    """The page about some runs."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    assets = resources.files("moesaic.report").joinpath("assets")
    read = {name: assets.joinpath(name).read_text() for name in ("page.html", "page.css", "page.js")}
    differing, same = tables.settings(runs)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(read["page.html"])
    data = {
        "runs": [run.name for run in runs],
        "charts": charts.curves(runs),
        "heatmaps": [charts.heatmap(run) for run in runs],
    }
    return page.render(
        runs=runs,
        version=metadata.version("moesaic"),
        summary=tables.summary(runs),
        charts=data["charts"],
        heatmaps=data["heatmaps"],
        dead=[tables.dead(run) for run in runs],
        differing=differing,
        same=same,
        samples=[(run.result or {}).get("sample") for run in runs],
        css=Markup(read["page.css"]),
        js=Markup(read["page.js"]),
        plotly=Markup(get_plotlyjs()),
        data=Markup(_json(data)),
    )


def _json(value: Any) -> str:
    """JSON within a script: nothing in it can end the script."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
