"""The load of all experts as a picture: a row for each layer, a column for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

# The colours of the report's page: blue below the mean of the layer, white at it, orange above, black without a token.
_COLOURS = np.array([[33, 102, 172], [255, 255, 255], [230, 97, 1]], dtype=float)
_DEAD = (0, 0, 0)
# The load, in means, that has the last colour.
_MOST = 3.0
_SIDE, _MARGIN, _LEFT = 640, 18, 30


def relative(load: Sequence[int]) -> np.ndarray:
    """Tokens of each expert over the mean of the layer."""
    tokens = np.asarray(load, dtype=float)
    return tokens / max(float(tokens.mean()), 1e-30) if len(tokens) else tokens


def load_picture(loads: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The picture, ``[height, width, 3]`` uint8: layers from above, experts from the left, a legend below."""
    columns = max(map(len, loads.values()))
    cell = max(3, min(24, _SIDE // max(columns, len(loads), 1)))
    width = max(_LEFT + columns * cell + _MARGIN, 400)
    height = _MARGIN + len(loads) * cell + 3 * _MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((2, 2), "rows: layers, columns: experts", fill="black")
    for row, load in enumerate(loads.values()):
        top = _MARGIN + row * cell
        if row % max(1, -(-12 // cell)) == 0:
            draw.text((4, top + max(0, cell // 2 - 6)), str(row), fill="black")
        for column, (value, tokens) in enumerate(zip(relative(load), load, strict=True)):
            left = _LEFT + column * cell
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=_colour(value) if tokens else _DEAD)
    bottom = _MARGIN + len(loads) * cell + 2
    for column in range(0, columns, max(1, -(-28 // cell))):
        draw.text((_LEFT + column * cell, bottom), str(column), fill="black")
    left = 4
    for text, colour in (
        ("no token", _DEAD),
        ("less than the mean", _colour(0.3)),
        ("the mean", _colour(1.0)),
        (f"{_MOST:g} times or more", _colour(_MOST)),
    ):
        draw.rectangle((left, bottom + 20, left + 10, bottom + 30), fill=colour, outline="grey")
        draw.text((left + 14, bottom + 19), text, fill="black")
        left += 24 + int(draw.textlength(text))
    return np.asarray(image)


def _colour(value: float) -> tuple[int, int, int]:
    place = value if value < 1 else 1 + min(1.0, (value - 1) / (_MOST - 1))
    low = min(int(place), 1)
    mixed = _COLOURS[low] + (_COLOURS[low + 1] - _COLOURS[low]) * (place - low)
    red, green, blue = (int(part) for part in mixed)
    return red, green, blue
