"""How many rows and copies of tokens a rank sends, receives and computes, where the routing is even.

Every token goes to ``K`` different experts, all sets of ``K`` alike. A token that goes to several experts of one rank
travels there once: :func:`moesaic.parallel.nodes.expected_rows`.

Legend: P ep ranks, Q etp ranks, E experts, K top-k.
"""

from typing import NamedTuple

from moesaic.layers import MoEConfig
from moesaic.parallel.capacity import bounded_traffic
from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.nodes import expected_rows
from moesaic.parallel.traffic import round_up_capacity


class Load(NamedTuple):
    """Of one rank, in one pass of one layer.

    Attributes:
        sent: rows that it sends over ep, those to itself among them.
        away: those of them that go to other ranks.
        received: rows that arrive over ep.
        gathered: rows after the all-gather over etp.
        copies: of tokens, that its experts compute.
        listed: how long the list of copies is, and what is kept of them.
        experts: how many it has.
    """

    sent: int
    away: int
    received: int
    gathered: int
    copies: int
    listed: int
    experts: int

    @property
    def rows_an_expert(self) -> float:
        return self.copies / self.experts


def load_of(tokens: int, moe: MoEConfig, layout: MeshLayout, capacity: int | None = None) -> Load:
    """That of a rank with ``tokens`` tokens, as all ranks have; ``capacity`` as in ``parallelize``."""
    P, Q, E, K = layout.ep, layout.etp, moe.num_experts, moe.top_k
    here = -(-E // P)
    # Its share of the copies of P * Q ranks.
    copies = round(tokens * K * Q * here * P / E)
    if P * Q == 1:
        return Load(tokens, 0, tokens, tokens, copies, copies, here)
    if capacity is not None:
        traffic = bounded_traffic(capacity, P, Q)
        sent, gathered = sum(traffic.splits[0].send), sum(traffic.gather)
        return Load(sent, sent - capacity, sent, gathered, copies, traffic.copies, here)
    away, _ = rows_away(P, 1, moe)
    sent = round(tokens * away * P / (P - 1)) if P > 1 else tokens
    return Load(sent, round(tokens * away), sent, sent * Q, copies, round_up_capacity(copies), here)


def rows_away(nodes: int, size: int, moe: MoEConfig) -> tuple[float, float]:
    """How many rows a token sends to other nodes, in one hop and in two; of nodes of one rank, to other ranks."""
    if nodes == 1:
        return 0.0, 0.0
    top_k = 1 if moe.weigh_inputs else moe.top_k
    return expected_rows(nodes, size, moe.num_experts, top_k, moe.num_groups, moe.top_groups)
