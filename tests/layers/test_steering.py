"""Routing recorded, played again and forced: ids, gradients, activation checkpointing, files of others."""

import copy
import functools
import gc

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.layers import Routing
from moesaic.routing import Record, force, record, replay
from tests.layers import naive
from tests.policies import WAYS, recomputed


def other_experts(layer: moesaic.MoE, *shape: int, seed: int = 0) -> Tensor:
    """Ids `[*shape, K]` that no scores have chosen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, layer.config.num_experts, generator=generator).topk(layer.config.top_k).indices


def expected_of(layer: moesaic.MoE, x: Tensor, ids: Tensor) -> Tensor:
    """The layer with given ids, in plain words. Its scores are softmax."""
    weights = (x @ layer.router.weight.T).softmax(-1).gather(1, ids)
    if layer.config.normalize_top_k:
        weights = weights / weights.sum(1, keepdim=True)
    return layer.experts(x, ids, weights * layer.config.route_scale)


def gradients(layer: moesaic.MoE, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))


def test_recorded_ids_are_played_with_the_scores_of_now():
    layer = naive.make()
    x = naive.tokens(7, layer.config.dim).requires_grad_()
    with record() as r:
        layer(x)
    [[(ids, weights)]] = r.layers
    routing = layer.router(x)
    assert torch.equal(ids, routing.ids)
    assert torch.equal(weights, routing.weights)
    with torch.no_grad():
        layer.router.weight.neg_()
    assert not torch.equal(layer.router(x).ids, ids)
    layer.router.load.zero_()
    with replay(r):
        y = layer(x)
    expected = expected_of(layer, x, ids)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(layer, x, y), gradients(layer, x, expected))
    assert torch.equal(layer.router.load, ids.flatten().bincount(minlength=layer.config.num_experts))


def test_tokens_that_were_not_recorded_go_by_score():
    layer = naive.make()
    x, ids = naive.tokens(6, layer.config.dim), other_experts(layer, 6)
    ids[::2] = -1
    with replay(Record.from_routed_experts(ids.unsqueeze(1))), record() as again:
        layer(x)
    assert torch.equal(again.layers[0][0].ids, torch.where(ids < 0, layer.router(x).ids, ids))


def test_padding_is_not_recorded_and_stays_padding():
    layer = naive.make()
    x, mask = naive.tokens(5, layer.config.dim), torch.tensor([True, False, True, True, False])
    with record() as r:
        y = layer(x, mask)
    assert torch.equal(r.layers[0][0].ids < 0, ~mask.unsqueeze(1).expand(-1, layer.config.top_k))
    with replay(r):
        torch.testing.assert_close(layer(x, mask), y)


def pending(layer: moesaic.MoE, way: str | None) -> list[Tensor]:
    """Three forward passes, two of them played from other records, all before their backward passes."""
    layer = copy.deepcopy(layer)
    inputs = [naive.tokens(n, layer.config.dim, seed=n).requires_grad_() for n in (9, 5, 8)]
    call = (lambda f, x: f(x)) if way is None else functools.partial(recomputed, way)
    outputs = []
    records = [Record.from_routed_experts(other_experts(layer, n, 1, seed=n)) for n in (9, 5)]
    for x, r in zip(inputs, [*records, None], strict=True):
        # The layer runs once in each, within what runs again.
        if r is None:
            outputs.append(call(lambda x: layer(x.sin()).cos(), x))
            continue
        with replay(r):
            outputs.append(call(lambda x: layer(x.sin()).cos(), x))
    sum(y.square().sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), *(t.grad for t in (*inputs, *layer.parameters())), layer.router.load]


@pytest.mark.parametrize("way", WAYS)
def test_what_runs_again_goes_where_it_went(way):
    layer = naive.make()
    torch.testing.assert_close(pending(layer, way), pending(layer, None))


def test_what_runs_again_is_not_recorded_again():
    layer = naive.make()
    x = naive.tokens(4, layer.config.dim).requires_grad_()
    with record() as r:
        recomputed("plain", layer, x).sum().backward()
    assert [len(passes) for passes in r.layers] == [1]


def test_a_record_that_is_gone_is_missed():
    layer = naive.make()
    x = naive.tokens(4, layer.config.dim).requires_grad_()
    r = Record.from_routed_experts(other_experts(layer, 4, 1))
    with replay(r):
        y = recomputed("plain", layer, x)
    del r
    gc.collect()
    with pytest.raises(RuntimeError, match="what it replayed is gone; keep the record until after the backward pass"):
        y.sum().backward()


def test_a_pass_that_cannot_be_told_is_refused():
    layer = naive.make()
    noise = torch.Generator().manual_seed(0)
    x = naive.tokens(4, layer.config.dim).requires_grad_()
    r = Record.from_routed_experts(other_experts(layer, 4, 1))
    with replay(r):
        y = recomputed("plain", lambda x: layer(x + torch.rand(x.shape, generator=noise)), x)
    with pytest.raises(RuntimeError, match="has the logits of none that is remembered; make it deterministic"):
        y.sum().backward()


def test_two_passes_with_the_same_logits_are_not_mixed_up():
    layer = naive.make()
    x = naive.tokens(4, layer.config.dim).requires_grad_()
    r = Record.from_routed_experts(other_experts(layer, 4, 1))
    with torch.no_grad(), record():
        layer(x)  # which never runs again
    with replay(r):
        played = recomputed("plain", layer, x)
    played.sum().backward()
    with replay(r):
        played = recomputed("plain", layer, x)
    free = recomputed("plain", layer, x)
    with pytest.raises(RuntimeError, match="there were two with its logits that sent tokens to other experts"):
        (played + free).sum().backward()


def test_layers_and_passes_by_the_order_of_calls():
    layers = [naive.make(seed=n) for n in range(3)]
    model = torch.nn.Sequential(*layers)
    inputs = [naive.tokens(n, layers[0].config.dim, seed=n) for n in (4, 0, 6)]
    with record() as r:
        outputs = [model(x) for x in inputs]
    assert [[len(p.ids) for p in passes] for passes in r.layers] == [[4, 0, 6]] * 3
    assert r.routed_experts(2).shape == (6, 3, layers[0].config.top_k)
    assert r.routed_experts().dtype == torch.int32
    theirs = Record.from_routed_experts(r.routed_experts(2).numpy(), layers=[0, 2])
    assert torch.equal(theirs.routed_experts(), r.routed_experts(2)[:, [0, 2]])
    with replay(r):
        for x, y in zip(inputs, outputs, strict=True):
            assert torch.equal(model(x), y)
    # A record may be played as often as one likes.
    with replay(r), record() as again:
        model(inputs[0])
    assert torch.equal(again.routed_experts(), r.routed_experts())


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    layer = naive.make()
    E, K = layer.config.num_experts, layer.config.top_k
    x = naive.tokens(4, layer.config.dim)

    def played(r: Record, times: int = 1, model: torch.nn.Module = layer) -> None:
        with replay(r):
            for _ in range(times):
                model(x)

    fits = Record.from_routed_experts(other_experts(layer, 4, 1))
    played(fits)
    with pytest.raises(ValueError, match=r"forward pass 1 of layer 0.* and 1 are recorded; enter replay\(\) once for"):
        played(fits, times=2)
    with pytest.raises(ValueError, match="this is layer 1, counted from 0, and 1 layers are recorded"):
        played(fits, model=torch.nn.Sequential(layer, naive.make()))
    with pytest.raises(ValueError, match=rf"layer 0 chooses experts for .* \[4, {K}\], and \[5, {K}\] is recorded"):
        played(Record.from_routed_experts(other_experts(layer, 5, 1)))
    with pytest.raises(ValueError, match=f"expert {E} is recorded, and layer 0 has {E}"):
        played(Record.from_routed_experts(torch.full((4, 1, K), E)))
    with pytest.raises(TypeError, match=r"expected a Record, got Tensor; Record.from_routed_experts\(ids\) makes one"):
        played(torch.zeros(4, 1, K))
    with pytest.raises(ValueError, match=r"ids: expected integers \[tokens, layers, k\], got torch.float32 \[4, 2\]"):
        Record.from_routed_experts(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="layers: 2 is none of the 2 layers of ids"):
        Record.from_routed_experts(torch.zeros(4, 2, K, dtype=torch.int16), layers=[0, 2])
    with pytest.raises(ValueError, match="forward_pass: 1 was not recorded; the 1 layers have"):
        fits.routed_experts(1)
    with pytest.raises(ValueError, match=r"skew: expected a share in 0..1, got 1.5"), force(skew=1.5):
        pass


@pytest.mark.parametrize("tokens", [0, 1, 12, 13])
def test_forced_loads(tokens):
    layer = naive.make()
    E, K = layer.config.num_experts, layer.config.top_k
    x = naive.tokens(tokens, layer.config.dim).requires_grad_()

    def routing(skew: float) -> Routing:
        with force(skew=skew):
            return layer.router(x)

    balanced = routing(0.0).ids.flatten().bincount(minlength=E)
    assert balanced.max() - balanced.min() <= 1
    assert torch.equal(routing(1.0).ids, torch.arange(K).expand(tokens, K))
    assert (routing(0.5).ids == torch.arange(K)).all(1).sum() >= round(0.5 * tokens)
    with force():
        y = recomputed("plain", layer, x)
        y.square().sum().backward()
    expected = expected_of(layer, x, (torch.arange(tokens * K) % E).view(tokens, K))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.router.weight.grad, gradients(layer, x, expected)[1])
