"""Draws experts tiled over a mesh of ranks: `python docs/pictures/tiling.py` writes tiling.svg beside this file."""

from itertools import product
from pathlib import Path

EXPERTS, EP, ETP = 8, 2, 2
W, H, GAP = 54, 34, 8  # of one expert's matrix
SHADES = [["#4c9be8", "#a5cdf5"], ["#e8893c", "#f6c79c"]]  # by ep rank, then by etp rank
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  .rank { fill: #f3f5f8; stroke: #b4bcc6 }
  text { fill: #1f2328; font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
  .small { font-size: 12px }
  .bold { font-weight: 600 }
  .number { fill: #10151b; font-size: 12px; text-anchor: middle }
  .line { stroke: #57606a; stroke-width: 1.5; fill: none }
  .head { fill: #57606a }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #3d444d }
    .rank { fill: #21262d; stroke: #545d68 }
    text { fill: #e6edf3 }
    .number { fill: #10151b }
    .line { stroke: #9198a1 }
    .head { fill: #9198a1 }
  }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, w: float, h: float, fill: str = "", kind: str = "", r: float = 3) -> str:
    look = f'fill="{fill}"' if fill else f'class="{kind}"'
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" {look}/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="line" marker-end="url(#head)" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"/>'


def whole() -> list[str]:
    """All experts, as one process has them: each matrix in the colours of the ranks that will hold its columns."""
    shapes = [text(40, 46, "one process", "bold"), text(40, 66, "w1 of 8 experts: [8, D, F]", "small")]
    for expert in range(EXPERTS):
        row, column = divmod(expert, 2)
        x, y = 56 + column * (W + 24), 90 + row * (H + GAP) + (row >= 2) * 20
        for etp in range(ETP):
            shapes.append(box(x + etp * W / ETP, y, W / ETP, H, SHADES[expert // (EXPERTS // EP)][etp], r=0))
        shapes.append(text(x + W / 2, y + 22, str(expert), "number", "middle"))
    return shapes


def tiled() -> list[str]:
    """The same experts on four ranks."""
    x0, y0, width, height = 390, 82, 168, 108
    shapes = [text(x0, 24, "four ranks, the mesh ep 2 × etp 2", "bold")]
    shapes += [text(x0 + 6, 48, "etp cuts the columns of each matrix", "small"), arrow(x0, 62, x0 + 2 * width + 12, 62)]
    shapes += [arrow(x0 - 20, y0, x0 - 20, y0 + 2 * height + 12)]
    middle = y0 + height + 6
    words = text(x0 - 30, middle, "ep deals out the experts", "small", "middle")
    shapes.append(words.replace("<text ", f'<text transform="rotate(-90 {x0 - 30} {middle:g})" '))
    for ep, etp in product(range(EP), range(ETP)):
        x, y = x0 + etp * (width + 12), y0 + ep * (height + 12)
        shapes.append(box(x, y, width, height, kind="rank", r=8))
        shapes.append(text(x + 12, y + 22, f"rank {ep * ETP + etp}", "small"))
        for i in range(EXPERTS // EP):
            left, top = x + 14 + i * (W / ETP + 11), y + 34
            shapes.append(box(left, top, W / ETP, H, SHADES[ep][etp], r=0))
            shapes.append(text(left + W / 4, top + 22, str(ep * EXPERTS // EP + i), "number", "middle"))
        half = "left half" if etp == 0 else "right half"
        shapes.append(text(x + 12, y + 92, f"{half} of {EXPERTS // EP} experts", "small"))
    return shapes


def draw() -> str:
    title = "Eight experts on one process, and tiled over four ranks: ep deals out experts, etp cuts their columns"
    marker = (
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    )
    caption = text(
        380, 344, "w1 is one DTensor: placements [Shard(0), Shard(2)] on (ep, etp). No rank has it all.", "", "middle"
    )
    shapes = [marker, box(1, 1, 758, 364, kind="card", r=12), *whole(), arrow(240, 190, 310, 190), *tiled(), caption]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 366" role="img" aria-label="{title}">'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", *shapes, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
