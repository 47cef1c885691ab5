"""Long lists of tensors' names, said in short."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable


def fold(names: Iterable[str], known: Collection[str]) -> str:
    """The names in short, each part with its count, as in ``vision_model.* (420), model.layers.61.* (1040)``.

    Names are folded at the first place that no known name shares. What then differs in numbers only is folded again.

    Example:
        >>> fold(["a.x.w", "a.x.b", "c.w"], known=["a.y.w"])
        'a.x.* (2), c.w'
    """
    beginnings = {beginning for name in known for beginning in _beginnings(name)}
    places: dict[str, list[str]] = {}
    for name in names:
        place = next((b for b in _beginnings(name) if b not in beginnings), name)
        places.setdefault(place, []).append(name)
    numberless = Counter(re.sub(r"\d+", "*", place) for place in places)
    folded: dict[str, list[str]] = {}
    for place, found in places.items():
        shape = re.sub(r"\d+", "*", place)
        folded.setdefault(shape if numberless[shape] > 1 else place, []).extend(found)
    return ", ".join(_said(place, found) for place, found in folded.items())


def _said(place: str, found: list[str]) -> str:
    if len(found) == 1:
        return found[0]
    return f"{place}{'*' if place.endswith('.') else ''} ({len(found)})"


def _beginnings(name: str) -> list[str]:
    """All beginnings of a name that end in a dot, the shortest first."""
    return [name[: match.end()] for match in re.finditer(r"\.", name)]
