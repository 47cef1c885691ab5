"""Adapters on experts, attention and router of models of transformers: what plain peft computes on one process.

Logits, loss, the gradient of every factor, and the factors after three steps, which are saved and read by peft.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.integrations.transformers.files import Files
from moesaic.sharding.parts import local_part
from tests.distributed.parity import assert_close, legal_layouts, meshes_of, whole
from tests.distributed.test_lora_parity import name_of
from tests.integrations.families import make_model, token_ids

peft = pytest.importorskip("peft")
from moesaic.integrations.peft import (  # noqa: E402, needs peft
    add_adapters,
    files,
    load_adapters,
    save_adapters,
)
from moesaic.integrations.peft.add import factors_of  # noqa: E402
from moesaic.integrations.peft.files import in_files  # noqa: E402
from moesaic.integrations.peft.switch import adapters_of  # noqa: E402

# peft asks for an old name of a property of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BATCH, LENGTH, STEPS = 8, 7, 3
FAMILIES = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3")
FILE = "adapter_model.safetensors"


def config_of(dropout: float = 0.0) -> Any:
    return peft.LoraConfig(
        r=4,
        lora_dropout=dropout,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )


def base_of(family: str) -> Any:
    return make_model(family).double()


def steps() -> list[Tensor]:
    return list(token_ids(STEPS, BATCH, LENGTH))


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs plain peft on one process, once a family. Its folder has the adapters before and after, and what it saw."""
    folders: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family in folders:
            return folders[family]
        folder = folders[family] = tmp_path_factory.mktemp(family)
        model = peft.get_peft_model(base_of(family), config_of(), autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(folder / "before")
        optimizer, seen = adamw(model), []
        for ids in steps():
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            grads = {n.replace(".default", ""): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            seen.append({"logits": out.logits.detach(), "loss": out.loss.detach(), "grads": grads})
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / "after")
        torch.save(seen, folder / "seen.pt")
        return folder

    return run


def check(family: str, folder: Path, layout: dict[str, int], way: Any) -> None:
    model = swap_moe(base_of(family))
    load_adapters(model, folder / "before")
    meshes = meshes_of(layout)
    moesaic.parallelize(model, meshes, compute=way)
    # As they were laid out, and read again in parts.
    first = load_file(folder / "before" / FILE)
    for name, tensor in in_peft_names(model, dict(model.named_parameters())).items():
        assert torch.equal(tensor, first[name]), name
    load_adapters(model, folder / "before")
    seen, optimizer = torch.load(folder / "seen.pt"), adamw(model)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    for step, (ids, expected) in enumerate(zip(steps(), seen, strict=True)):
        out = model(input_ids=ids[rows], labels=ids[rows])
        out.loss.backward()
        mine = (rows, meshes.sequence_positions(LENGTH))
        if out.logits.numel():
            assert_close(f"logits, step {step}", out.logits.detach(), expected["logits"][mine])
        dist.all_reduce(total := out.loss.detach().clone())
        assert_close(f"loss, step {step}", total, expected["loss"])
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert named.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        grads = in_peft_names(model, named)
        assert grads.keys() == expected["grads"].keys()
        for name, grad in grads.items():
            assert_close(f"gradient of {name}, step {step}", grad, expected["grads"][name])
        optimizer.step()
        optimizer.zero_grad()
    final = folder / f"{name_of(layout)} {way}"
    save_adapters(model, final)
    after, ours = load_file(folder / "after" / FILE), load_file(final / FILE)
    assert ours.keys() == after.keys()
    for name, tensor in ours.items():
        assert_close(f"{name} after {STEPS} steps", tensor, after[name])


def in_peft_names(model: Any, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors of the parameters' names, as peft's files have them."""
    by_id = {id(p): tensors[n] for n, p in model.named_parameters() if n in tensors}
    found: dict[str, Tensor] = {}
    for target in adapters_of(model, "default"):
        factors = {n: whole(by_id[id(p)]) for n, p in factors_of(model, target, "default")}
        found |= dict(in_files(target, factors))
    return found


# An axis alone, tp beside whole experts and the reverse, all of them with FSDP of experts.
SOME = [
    ("Mixtral", 2, {"tp": 2, "ep": 2}, "local"),
    pytest.param("DeepSeek-V3", 4, {"tp": 2, "etp": 2}, "local", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "world", "layout", "way"), SOME, ids=name_of)
def test_some_layouts(by_peft, same_ranks, family, world, layout, way):
    same_ranks(check, world, family, by_peft(family), layout, way)


# By number of ranks, so that its processes are forked once.
EVERY = [(world, i, layout) for world in (1, 2, 4, 8) for i, layout in enumerate(legal_layouts(world))]


@pytest.mark.long
@pytest.mark.parametrize(("world", "number", "layout"), EVERY, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout(by_peft, same_ranks, family, world, number, layout):
    # Each has two heads of keys and values, or four heads in all.
    if layout["tp"] > (4 if family == "DeepSeek-V3" else 2):
        pytest.skip("fewer heads than ranks of tp")
    same_ranks(check, world, family, by_peft(family), layout, ("dtensor", "local")[number % 2])


def with_dropout(family: str) -> Any:
    """In training mode, on one process. No number of a factor is zero."""
    model = add_adapters(swap_moe(base_of(family)), config_of(0.3))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.train()


def check_dropout(family: str, layout: dict[str, int], way: Any) -> None:
    """Each rank has its part of the masks of one process, on linear layers too."""
    ids, alone, model, meshes = steps()[0], with_dropout(family), with_dropout(family), meshes_of(layout)
    torch.manual_seed(0)
    expected = alone(input_ids=ids, labels=ids)
    expected.loss.backward()
    # Other masks for another number.
    assert alone(input_ids=ids).logits.sub(expected.logits).abs().max() > 0.01
    moesaic.parallelize(model, meshes, compute=way)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    torch.manual_seed(dist.get_rank())
    out = model(input_ids=ids[rows], labels=ids[rows])
    out.loss.backward()
    mine = (rows, meshes.sequence_positions(LENGTH))
    if out.logits.numel():
        assert_close("logits", out.logits.detach(), expected.logits.detach()[mine])
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if q.requires_grad:
            assert_close(f"gradient of {name}", whole(p.grad), q.grad)


def check_reading(family: str, folder: Path, layout: dict[str, int]) -> None:
    """Each rank reads its part of every tensor, and nothing else."""
    read: list[Files] = []

    class Counted(Files):
        def __init__(self) -> None:
            super().__init__()
            read.append(self)

    model = swap_moe(base_of(family))
    add_adapters(model, config_of())
    moesaic.parallelize(model, meshes_of(layout))
    files.Files = Counted
    try:
        load_adapters(model, folder / "before")
    finally:
        files.Files = Files
    parts = {n: local_part(p)[0].nbytes for n, p in model.named_parameters() if p.requires_grad}
    assert read[0].bytes_read == sum(parts.values())
    assert sum(n for name, n in parts.items() if "experts" in name) == sum(
        p.nbytes // (layout["ep"] * (layout["etp"] if name[-4:] in ("w1_b", "w3_b", "w2_a") else 1))
        for name, p in model.named_parameters()
        if p.requires_grad and "experts" in name
    )


def test_each_rank_reads_its_part(by_peft, same_ranks):
    same_ranks(check_reading, 2, "Mixtral", by_peft("Mixtral"), {"tp": 2, "ep": 2, "etp": 1})


DROPPED = [
    ("Mixtral", 2, {"tp": 2, "ep": 2}, "local"),
    pytest.param("Qwen3-MoE", 4, {"cp": 2, "tp": 2, "ep": 2}, "dtensor", marks=pytest.mark.long),
    pytest.param("DeepSeek-V3", 4, {"cp": 4, "ep": 2}, "local", marks=pytest.mark.long),
    pytest.param("Mixtral", 4, {"ep": 2, "dp_replicate": 2}, "dtensor", marks=pytest.mark.long),
    pytest.param("DeepSeek-V3", 4, {"tp": 4, "etp": 2}, "local", marks=pytest.mark.long),
    pytest.param("Qwen3-MoE", 8, {"tp": 2, "ep": 2, "etp": 2}, "dtensor", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("family", "world", "layout", "way"), DROPPED, ids=name_of)
def test_dropout(same_ranks, family, world, layout, way):
    same_ranks(check_dropout, world, family, layout, way)


def test_peft_reads_what_ranks_have_saved(by_peft, same_ranks):
    folder = by_peft("Mixtral")
    layout = {"tp": 2, "ep": 2}
    same_ranks(check, 2, "Mixtral", folder, layout, "dtensor")
    ids = steps()[0]
    logits = [
        peft.PeftModel.from_pretrained(base_of("Mixtral"), place, autocast_adapter_dtype=False)(input_ids=ids).logits
        for place in (folder / "after", folder / f"{name_of(layout)} dtensor")
    ]
    assert_close("logits", logits[1], logits[0])
    assert base_of("Mixtral")(input_ids=ids).logits.sub(logits[0]).abs().max() > 0.1
