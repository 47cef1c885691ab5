"""Which ranks are on one node, and whether rows cross between nodes once a rank or once a node.

A *node* is a machine: links inside of it are fast, those to others slow. Ranks are on nodes in their global order,
``ranks_per_node`` on each, as torchrun numbers them. Two hops take a token over the slow links once for each node that
has some of its experts, and one hop once for each rank. Whether that is worth a second hop follows from the layout and
the number of experts a token goes to.

Legend: P ep ranks, N nodes of L of them each, E experts, K top-k.
"""

import functools
import itertools
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from math import comb
from typing import Any, NamedTuple

import torch.distributed as dist

from moesaic import ranks
from moesaic.layers.config import MoEConfig
from moesaic.ops.arguments import check_int, divisors

# The first hop of two sends at most this part of the rows that one hop would send over nodes, or two are not taken by
# default. The second sends about as many rows again, within nodes. Where links there are ten times as fast, as NVLink
# is beside a network card for each GPU, that takes the time of a tenth of them.
WORTH = 0.9

_ONE_NODE = "all ranks of ep are on one node"


class NodeGroups(NamedTuple):
    """The groups of two hops, of which the first is over nodes.

    Attributes:
        across: ranks at the same place in their nodes, in the order of nodes.
        within: the ranks of this node.
    """

    across: dist.ProcessGroup
    within: dist.ProcessGroup


@dataclass(frozen=True)
class Exchange:
    """How rows go to the ranks of their experts.

    Attributes:
        nodes: the groups of two hops; None for one hop.
        why: in words, for the user.
    """

    nodes: NodeGroups | None
    why: str


@dataclass(frozen=True)
class Nodes:
    """The nodes of the ranks of a mesh.

    Attributes:
        ranks_per_node: how many ranks in a row are on one node; None if that is not known.
        given: whether the user said so, and torchrun did not.
        groups: of two hops; None where the layout has no use for them.
        obstacle: why it has none.
    """

    ranks_per_node: int | None = None
    given: bool = False
    groups: NodeGroups | None = None
    obstacle: str = "it is not known which ranks are on one node: give ranks_per_node"

    @property
    def none_crosses(self) -> bool:
        """Whether no row leaves its node."""
        return self.obstacle == _ONE_NODE

    def exchange(self, config: MoEConfig, capacity: int | None = None) -> Exchange:
        """How the rows of a layer are exchanged.

        Two hops where the layout allows them and ``ranks_per_node`` was given. Where it is torchrun's: if they are
        expected to send at most nine tenths of the rows over nodes, and no capacity has each rank send to each other as
        much as it could.

        Raises:
            ValueError: a capacity, and nodes that the user gave.
        """
        if self.groups is None:
            return Exchange(None, f"one hop: {self.obstacle}")
        nodes, size = self.groups.across.size(), self.groups.within.size()
        if capacity is not None:
            if self.given:
                raise ValueError(
                    f"capacity: got {capacity}, and ranks_per_node {self.ranks_per_node}. With a capacity as much goes "
                    "to every rank whatever is routed, so that rows cannot cross once a node; leave capacity out, or "
                    "give ranks_per_node 1"
                )
            return Exchange(None, "one hop: with a capacity, as much goes to every rank whatever is routed")
        groups = config.num_groups, config.top_groups
        one, two = expected_rows(nodes, size, config.num_experts, 1 if config.weigh_inputs else config.top_k, *groups)
        saved = f"about {two:.2f} rows a token cross between nodes, and {one:.2f} in one hop"
        if self.given or two <= WORTH * one:
            return Exchange(self.groups, f"two hops, over {nodes} nodes and then over {size} ranks of each: {saved}")
        return Exchange(None, f"one hop: two would save little; {saved.replace(', and', ' in two,')}")


@functools.cache
def expected_rows(
    nodes: int, size: int, num_experts: int, top_k: int, num_groups: int = 1, top_groups: int = 1
) -> tuple[float, float]:
    """How many rows a token sends over nodes, in one hop and in two, if it goes to K experts of E at random.

    Of ``M`` experts among which it chooses, ``m`` of them have one with the probability ``1 - C(M - m, K) / C(M, K)``.
    Summed over all ranks, or over all nodes, of which the token's own does not count: it is each one in N times.

    Args:
        nodes, size: N, and how many ep ranks are on each.
        num_experts, top_k: E and K. Each rank has ``ceil(E / ranks)`` experts, the last ones what is left.
        num_groups, top_groups: how many groups the experts form, and of how many of them a token's experts are.

    Example:
        >>> one, two = expected_rows(nodes=2, size=4, num_experts=64, top_k=8)
        >>> print(f"{one:.2f} {two:.2f}")
        2.72 1.00
    """
    group, among = num_experts // num_groups, num_experts // num_groups * top_groups

    def hit(first: int, last: int) -> float:
        # How many ways there are to choose so many groups, with so many of these experts in them.
        ways = Counter({(0, 0): 1})
        for start in range(0, num_experts, group):
            here = max(min(last, start + group) - max(first, start), 0)
            ways.update({(n + 1, m + here): count for (n, m), count in list(ways.items())})
        missed = sum(count * comb(among - m, top_k) for (n, m), count in ways.items() if n == top_groups)
        return 1 - missed / (comb(num_groups, top_groups) * comb(among, top_k))

    each, away = -(-num_experts // (nodes * size)), (nodes - 1) / nodes

    def of_parts(experts: int) -> float:
        return away * sum(hit(first, min(first + experts, num_experts)) for first in range(0, num_experts, experts))

    return of_parts(each), of_parts(each * size)


def check_ranks_per_node(value: Any, world_size: int) -> None:
    """Raise unless ``value`` is None or divides the number of ranks."""
    if value is None:
        return
    check_int("ranks_per_node", value)
    if value < 1 or world_size % value:
        legal = ", ".join(map(str, divisors(world_size)))
        raise ValueError(
            f"ranks_per_node: got {value}, and there are {world_size} ranks in all, as many on each node; choose one "
            f"of {legal}"
        )


def launched_per_node() -> int | None:
    """How many processes torchrun started on each node; None where it did not, or ranks are not in that order."""
    try:
        size, place, rank, world = (
            int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK", "WORLD_SIZE")
        )
    except (KeyError, ValueError):
        return None
    fits = (rank, world) == (ranks.rank(), ranks.world_size()) and size > 0 and world % size == 0
    return size if fits and rank % size == place else None


def find_nodes(given: int | None, launched: list[int | None], ep: dist.ProcessGroup) -> Nodes:
    """How the ranks of ``ep`` lie on nodes, and the groups of two hops. Collective over all ranks.

    Args:
        given: what the user said of the ranks of a node.
        launched: what each rank's launcher says.
        ep: the ranks that have all experts together; each rank's own.
    """
    per_node = given if given is not None else launched[0] if len(set(launched)) == 1 else None
    if per_node is None:
        return Nodes()
    if per_node == ranks.world_size():
        return Nodes(per_node, given is not None, None, _ONE_NODE)
    groups = sorted(set(ranks.gather(tuple(dist.get_process_group_ranks(ep)))))
    on_nodes = {_sizes_on_nodes(group, per_node): group for group in reversed(groups)}
    sizes = {size for pattern in on_nodes for size in pattern}
    if sizes == {len(groups[0])}:
        return Nodes(per_node, given is not None, None, _ONE_NODE)
    if sizes == {1}:
        obstacle = "every rank of ep is on a node of its own, so that a row a rank is a row a node"
        return Nodes(per_node, given is not None, None, obstacle)
    if len(sizes) > 1:
        said = "; ".join(f"of {list(group)} it has {', '.join(map(str, p))}" for p, group in reversed(on_nodes.items()))
        obstacle = (
            f"nodes of {per_node} ranks do not have equally many of each ep group: {said}. Two hops need ep * etp to "
            f"be a multiple of {per_node}"
        )
        if given is not None and ranks.is_leader():
            warnings.warn(f"ranks_per_node: rows go straight to each rank, for {obstacle}", stacklevel=3)
        return Nodes(per_node, given is not None, None, obstacle)
    return Nodes(per_node, given is not None, _groups(groups, sizes.pop()), "")


def _sizes_on_nodes(group: tuple[int, ...], per_node: int) -> tuple[int, ...]:
    """How many of these ranks, which are in order, are on each node that has some."""
    return tuple(len(list(members)) for _, members in itertools.groupby(group, lambda rank: rank // per_node))


def _groups(groups: list[tuple[int, ...]], size: int) -> NodeGroups:
    """The groups that this rank is in, where each of ``groups`` has ``size`` ranks on a node."""
    across = [list(group[place::size]) for group in groups for place in range(size)]
    within = [list(group[first : first + size]) for group in groups for first in range(0, len(group), size)]
    mine = []
    for lists in (across, within):
        group, _ = dist.new_subgroups_by_enumeration(lists)
        assert isinstance(group, dist.ProcessGroup)
        mine.append(group)
    return NodeGroups(*mine)
