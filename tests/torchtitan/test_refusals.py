"""What the overrides refuse, before anything is built. The package torchtitan alone is needed, and no ranks."""

import importlib
import importlib.util

import pytest

INTEGRATION = "moesaic.integrations.torchtitan"


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is not None, reason="torchtitan is installed")
def test_without_torchtitan_the_error_says_how_to_get_it():
    with pytest.raises(ImportError, match=r"needs torchtitan 0.3: pip install '.\[torchtitan\]'"):
        importlib.import_module(INTEGRATION)


@pytest.fixture(scope="module")
def titan():
    pytest.importorskip("torchtitan")
    return importlib.import_module(INTEGRATION)


@pytest.fixture
def experts():
    from torchtitan.models.common.moe import GroupedExperts

    return GroupedExperts.Config(dim=8, hidden_dim=6, num_experts=4)


@pytest.fixture
def routed(experts):
    from torchtitan.models.common.moe import RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    dispatcher = AllToAllTokenDispatcher.Config(num_experts=4, top_k=2)
    return RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)


def converted(base):
    """A class as converters make them: its products are others."""
    from dataclasses import dataclass

    class Converted(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            recipe: str = "mxfp8"

    return Converted.Config


def test_classes_that_are_not_known_are_named(titan, experts, routed):
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

    other = converted(GroupedExperts)(dim=8, hidden_dim=6, num_experts=4)
    match = "Converted.Config is not one of torchtitan's own classes.* take the converter"
    with pytest.raises(ValueError, match=f"experts: .*{match}"):
        titan.experts(other)
    routed.inner_experts = other
    with pytest.raises(ValueError, match=f"routed_experts: .*{match}"):
        titan.routed_experts(routed)
    around = converted(RoutedExperts)(inner_experts=experts, token_dispatcher=routed.token_dispatcher)
    with pytest.raises(ValueError, match=f"routed_experts: .*{match}"):
        titan.routed_experts(around)


def test_a_dispatcher_that_was_chosen_is_not_replaced(titan, routed):
    from torchtitan.models.common.token_dispatcher import TorchAOTokenDispatcher

    routed.token_dispatcher = TorchAOTokenDispatcher.Config(num_experts=4, top_k=2, pad_multiple=16)
    with pytest.raises(ValueError, match="would replace TorchAOTokenDispatcher.Config.* moe_comm_backend='standard'"):
        titan.routed_experts(routed)


@pytest.mark.parametrize(
    ("etp", "error", "match"),
    [
        (0, ValueError, "etp: must be at least 1, got 0"),
        (4, ValueError, "etp: 4 does not divide the experts' hidden_dim 6"),
        ("2", TypeError, "etp: expected an int, got"),
        (True, TypeError, "etp: expected an int, got True"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_etp_is_a_size(titan, routed, etp, error, match):
    with pytest.raises(error, match=match):
        titan.routed_experts(routed, etp=etp)


def test_the_limit_of_gpt_oss_is_that_of_the_operator(titan, routed):
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    routed.inner_experts = GptOssGroupedExperts.Config(dim=8, hidden_dim=6, num_experts=4, swiglu_limit=5.0)
    with pytest.raises(ValueError, match="swiglu_limit 5.0 is not the 7.0 of moesaic.experts_mlp; use .*experts, "):
        titan.routed_experts(routed)
    assert titan.experts(routed.inner_experts).swiglu_limit == 5.0


def test_etp_names_what_its_ranks_are_taken_from(titan):
    from torchtitan.distributed import ParallelDims

    from moesaic.integrations.torchtitan.meshes import check_etp

    sizes = {"dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1, "pp": 1, "world_size": 4}
    with pytest.raises(ValueError, match="etp: 2 does not divide expert_parallel_degree 1.* a multiple of 2"):
        check_etp(ParallelDims(**sizes, ep=1, spmd_backend="partial_dtensor"), 2)
    with pytest.raises(ValueError, match="etp: 2 .*spmd_backend 'spmd_types'.*set --parallelism.spmd_backend partial"):
        check_etp(ParallelDims(**sizes, ep=4, spmd_backend="spmd_types"), 2)


def test_another_torchtitan_and_an_old_torch_are_named(titan, monkeypatch):
    import torch.distributed as dist
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

    from moesaic.integrations.torchtitan.seams import check_seams

    check_seams()
    monkeypatch.setattr(RoutedExperts, "forward", lambda self, x_TD: x_TD)
    monkeypatch.delattr(GroupedExperts, "forward")
    match = (
        r"torchtitan 0\.3\.\d differs: .*GroupedExperts.forward takes .*; .*RoutedExperts.forward takes \(self, x_TD\)"
    )
    with pytest.raises(ImportError, match=match):
        check_seams()
    monkeypatch.delattr(dist, "set_timeout")
    with pytest.raises(ImportError, match="needs torch.distributed.set_timeout, which torch .* install torch 2.14"):
        check_seams()
