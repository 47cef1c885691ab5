"""The collectives of one forward and backward pass are those of the design, and no other."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic
from moesaic.parallel.beside import Streams
from tests.parallel.test_beside import Recorder

c10d = torch.ops.c10d

# A count exchange; rows out over ep and etp, their weights and ids in one message; results back over both. Backward:
# the same for rows and weights (ids have no gradient), reversed.
FORWARD_PER_AXIS = 2 + 1
BACKWARD_PER_AXIS = 2 + 1


def count(way: str, layout: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    torch.manual_seed(0)
    config = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2)
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    moe = moesaic.parallelize(moesaic.MoE(config), meshes, compute=way)
    x = torch.randn(5 + meshes.tp_rank, 8, requires_grad=True)
    # Padding costs none, and a rank that has nothing else takes part.
    mask = torch.arange(len(x)) < 3 * meshes.tp_rank
    with CommDebugMode() as forward:
        y = moe(x, mask)
    with CommDebugMode() as backward:
        y.sum().backward()
    return named(forward), named(backward)


def named(mode: CommDebugMode) -> dict[str, int]:
    return {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n}


@pytest.mark.parametrize("way", ["dtensor", "local"])
@pytest.mark.parametrize(
    ("layout", "axes", "more_peers"),
    [({"tp": 4, "ep": 2, "etp": 2}, 2, 0), ({"tp": 4, "ep": 4}, 1, 0), ({"tp": 4, "etp": 4}, 1, 2)],
    ids=["ep2 etp2", "ep4", "etp4"],
)
def test_only_the_dispatcher_communicates(same_ranks, layout, axes, more_peers, way):
    for forward, backward in same_ranks(count, 4, way, layout):
        # A gather over etp sends to one rank after the other: two gathers forward, and one backward.
        exchanges = FORWARD_PER_AXIS * axes + 2 * more_peers
        assert forward == {"all_gather_into_tensor": 1, "all_to_all_single": exchanges}
        # The gate's weight is replicated over tp and its gradient summed there.
        assert backward == {"all_to_all_single": BACKWARD_PER_AXIS * axes + more_peers, "all_reduce": 1}


class Order(TorchDispatchMode):
    """The names of what runs, in order, and on which stream."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        self.recorder = recorder or Recorder()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        self.recorder.calls.append((self.recorder.now, self.names[-1]))
        return func(*args, **(kwargs or {}))


def order() -> tuple[list[str], list[str]]:
    torch.manual_seed(0)
    config = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2, shared_hidden_dim=6)
    meshes = moesaic.build_meshes(ep=2, device_type="cpu")
    moe = moesaic.parallelize(moesaic.MoE(config), meshes, compute="local")
    x = torch.randn(5, 8, requires_grad=True)
    with Order() as forward:
        y = moe(x)
    with Order() as backward:
        y.sum().backward()
    return forward.names, backward.names


def test_the_shared_expert_computes_while_rows_are_under_way(same_ranks):
    for forward, backward in same_ranks(order, 2):
        # Rows and routing are sent, the shared expert's three products come, and only then does anybody wait.
        first = forward.index("all_to_all_single")
        until = forward.index("wait_tensor", first)
        assert forward[first:until].count("all_to_all_single") == 2
        assert forward[first:until].count("mm") == 3
        # Gradients of rows and of routing weights are both under way before one is waited for.
        starts = [i for i, name in enumerate(backward) if name == "all_to_all_single"]
        assert "wait_tensor" not in backward[starts[1] : starts[2]]


def streams() -> tuple[list[tuple[object, ...]], bool]:
    """What a layer calls with streams, and whether its results and gradients are those without."""
    torch.manual_seed(0)
    config = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2, shared_hidden_dim=6, weigh_inputs=True)
    moe = moesaic.parallelize(moesaic.MoE(config), moesaic.build_meshes(ep=2, device_type="cpu"), compute="local")
    x, recorder, results = torch.randn(5, 8), Recorder(), []
    with pytest.MonkeyPatch.context() as patch:
        record = lambda t, stream: recorder.calls.append((stream.number, "reads", t.shape[0]))  # noqa: E731
        patch.setattr(torch.Tensor, "record_stream", record)
        for found in (None, Streams(recorder, x.device)):
            for module in ("dispatch", "traffic"):
                patch.setattr(f"moesaic.parallel.{module}.streams_of", lambda t, found=found: found)
            recorder.calls.clear()
            of = x.clone().requires_grad_()
            with Order(recorder):
                y = moe(of)
            y.square().sum().backward()
            results.append((y.detach(), of.grad))
    return recorder.calls, all(map(torch.equal, *results))


def test_with_streams_the_shared_expert_is_queued_before_the_host_waits_for_counts(same_ranks):
    program, work, copies = 0, 1, 2
    for calls, is_equal in same_ranks(streams, 2):
        assert is_equal
        # Counts are sent, and then it begins. Its tokens are the layer's, not the weighed copies that are sent.
        counts = calls.index((program, "all_gather_into_tensor"))
        begins, reads = calls.index((work, "waits for", program)), calls.index((work, "reads", 5))
        assert counts < begins < reads
        assert [name for stream, name, *_ in calls[begins:reads] if stream == work].count("mm") == 3
        # The host waits for counts on a third stream, when tokens have been sorted meanwhile.
        waits = calls.index((copies, "wait_tensor"))
        assert reads < calls.index((program, "sort_by_expert")) < waits < calls.index((copies, "traffic"))
        # Its result is waited for after all exchanges.
        ends = [i for i, call in enumerate(calls) if call[1] == "wait_tensor"][-1]
        joins = calls.index((program, "waits for", work))
        assert ends < joins
        assert calls[joins + 1] == (program, "reads", 5)
