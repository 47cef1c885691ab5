"""Which layouts the tests try: degrees as torchtitan names them, `etp` within its `ep`."""

from tests.torchtitan.case import Case

Layout = tuple[int, dict[str, int]]

WHOLE_EXPERTS: list[Layout] = [
    (1, {}),
    (2, {}),
    (2, {"tp": 2}),
    (2, {"ep": 2}),
    (2, {"tp": 2, "ep": 2}),
    (2, {"cp": 2, "ep": 2}),
    (2, {"pp": 2}),
    (4, {"ep": 2}),
    (4, {"tp": 2, "ep": 4}),
    (4, {"dp_replicate": 2, "ep": 2}),
    (4, {"pp": 2, "ep": 2}),
    (8, {"dp_replicate": 2, "tp": 2, "ep": 4}),
    (8, {"pp": 2, "cp": 2, "tp": 2, "ep": 4}),
    (8, {"ep": 8}),
]
CUT_EXPERTS: list[Layout] = [
    (2, {"ep": 2, "etp": 2}),
    (2, {"tp": 2, "ep": 2, "etp": 2}),
    (2, {"cp": 2, "ep": 2, "etp": 2}),
    (4, {"ep": 2, "etp": 2}),
    (4, {"ep": 4, "etp": 2}),
    (4, {"tp": 2, "ep": 4, "etp": 2}),
    (4, {"dp_replicate": 2, "ep": 2, "etp": 2}),
    (4, {"pp": 2, "ep": 2, "etp": 2}),
    (8, {"tp": 2, "ep": 4, "etp": 2}),
    (8, {"dp_replicate": 2, "tp": 2, "ep": 4, "etp": 2}),
    (8, {"cp": 2, "tp": 2, "ep": 8, "etp": 2}),
    (8, {"pp": 2, "tp": 2, "ep": 4, "etp": 2}),
    (8, {"ep": 8, "etp": 4}),
]
LAYOUTS = {"experts": WHOLE_EXPERTS, "routed_experts": WHOLE_EXPERTS + CUT_EXPERTS, "moe": WHOLE_EXPERTS + CUT_EXPERTS}


def cases(model: str, override: str, every: int = 1, first: int = 0) -> list[tuple[int, Case]]:
    """Every so-many-th layout of an override, fewest ranks first."""
    layouts = sorted(LAYOUTS[override][first::every], key=lambda layout: layout[0])
    return [(ranks, Case(model, override, **degrees)) for ranks, degrees in layouts]
