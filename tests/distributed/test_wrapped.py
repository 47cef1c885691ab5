"""A language model inside a wrapper: loss and gradients are those of one process. So are those of peft's adapters."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moesaic
from tests.distributed.parity import assert_close, meshes_of, whole
from tests.distributed.test_families import labels_of
from tests.distributed.test_qwen3_parity import VOCAB, make_model

BATCH, LENGTH = 4, 7
LAYOUTS = [{"ep": 2}, {"tp": 2, "ep": 2}]


class Shell(nn.Module):
    """Passes on what it gets, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class WithHead(nn.Module):
    """A model with a head of its own on the backbone's hidden states, beside the loss of labels."""

    def __init__(self, lm: Any):
        super().__init__()
        self.lm, self.head = lm, nn.Linear(32, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        out = self.lm(input_ids=input_ids, labels=labels, output_hidden_states=True)
        out.loss = out.loss + self.head(out.hidden_states[-1]).square().sum()
        return out


def adapted(lm: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "o_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(lm, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


WRAPPERS = {
    "shell": (Shell, LAYOUTS[1:]),
    "shell in a shell": (lambda lm: Shell(Shell(lm)), LAYOUTS[:1]),
    "own head": (WithHead, LAYOUTS[:1]),
    "peft": (adapted, LAYOUTS),
    "peft in a shell": (lambda lm: Shell(adapted(lm)), LAYOUTS[:1]),
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": labels_of(ids)}


def check_wrappers() -> None:
    for kind, (wrap, layouts) in WRAPPERS.items():
        plain = wrap(make_model(tied=False))
        expected = copy.deepcopy(plain)
        expected(**batch()).loss.backward()
        loss = expected(**batch()).loss.detach()
        gradients = {n: p.grad for n, p in expected.named_parameters() if p.requires_grad}
        for layout in layouts:
            meshes = meshes_of(layout)
            model = moesaic.parallelize(copy.deepcopy(plain), meshes)
            rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
            part = model(**{name: t[rows] for name, t in batch().items()}).loss
            part.backward()
            dist.all_reduce(total := part.detach().clone())
            assert_close(f"{kind}, {layout}: loss", total, loss)
            actual = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            assert actual.keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert actual[name] is not None, f"{kind}, {layout}: {name} has no gradient"
                assert_close(f"{kind}, {layout}: gradient of {name}", whole(actual[name]), gradient)


def test_loss_and_gradients_are_those_of_one_process(same_ranks):
    same_ranks(check_wrappers, 2)


def check_losses_of_their_own() -> None:
    lm = make_model(tied=False)

    class Subclass(type(lm)):
        def forward(self, labels: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            out = super().forward(**kwargs)
            out.loss = None if labels is None else out.logits.logsumexp(-1).mean()
            return out

    lm.__class__ = Subclass
    meshes = meshes_of({"ep": 2})
    model = moesaic.parallelize(Shell(lm), meshes)
    with pytest.raises(ValueError, match=r"labels: the forward of \w*Subclass makes its loss without self.loss_funct"):
        model(**batch())
    assert model(input_ids=batch()["input_ids"]).loss is None

    lm = make_model(tied=False)
    lm.loss_function = lambda logits, **_: logits.mean()
    with pytest.raises(ValueError, match=r"labels: \w+ has a loss_function of its own"):
        moesaic.parallelize(Shell(lm), meshes)(**batch())


def test_a_loss_that_is_not_over_all_ranks_is_refused(same_ranks):
    same_ranks(check_losses_of_their_own, 2)


def check_later_additions() -> None:
    peft = pytest.importorskip("peft")
    meshes = meshes_of({"ep": 2})
    for wrapped in (False, True):
        lm = make_model(tied=False)
        model = moesaic.parallelize(Shell(lm) if wrapped else lm, meshes)
        later = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj"]))
        for entry in (model, later):
            with pytest.raises(ValueError, match=r"q_proj.* got parameters after parallelize.*adapters .* before it"):
                entry(**batch())
    lm = moesaic.parallelize(make_model(tied=False), meshes)
    lm.lm_head = nn.Linear(32, VOCAB)
    with pytest.raises(ValueError, match=r"'lm_head' \(Linear\) got parameters after parallelize"):
        lm(**batch())


def test_parameters_that_come_after_parallelize_are_refused(same_ranks):
    same_ranks(check_later_additions, 2)


def check_refused_wrappers() -> None:
    tp = meshes_of({"tp": 2})
    with pytest.raises(ValueError, match=r"tp > 1 works for causal .*WithHead has other parameters.*use tp=1"):
        moesaic.parallelize(WithHead(make_model(tied=False)), tp)
    for settings, problem in (({"use_dora": True}, "DoRA"), ({"lora_dropout": 0.1}, "lora_dropout to 0")):
        config = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"], **settings)
        model = pytest.importorskip("peft").get_peft_model(make_model(tied=False), config)
        with pytest.raises(ValueError, match=rf"the adapter on 'q_proj' of Qwen3MoeAttention .*{problem}"):
            moesaic.parallelize(model, tp)
    with pytest.raises(ValueError, match=r"'module' is a DistributedDataParallel, which sums gradients .*\(.module\)"):
        moesaic.parallelize(Shell(nn.parallel.DistributedDataParallel(make_model(tied=False))), meshes_of({"ep": 2}))


def test_wrappers_that_cannot_work_are_refused(same_ranks):
    same_ranks(check_refused_wrappers, 2)
