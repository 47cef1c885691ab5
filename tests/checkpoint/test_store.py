"""Writing and reading checkpoints: on many ranks, across layouts, through damage and kill -9."""

import itertools
import json
import os
import random
import shutil
import signal
import threading

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moesaic import checkpoint, ranks
from moesaic.checkpoint import CheckpointError, folder
from moesaic.testing.pool import RankError


def _state(step, rows=6):
    """Tensors that tell their step."""
    return {
        "model": {"w": torch.full((rows, 4), float(step))},
        "optimizer": {"w": {"m": torch.full((5,), float(step))}},
    }


def _values(state):
    return {float(x) for x in [*state["model"]["w"].flatten(), *state["optimizer"]["w"]["m"]]}


# --- one process, no process group ---


def test_save_and_load(tmp_path):
    path = checkpoint.save(tmp_path, 3, _state(3), {"note": [1, "two"]})
    assert path == tmp_path / "step-00000003"
    state = _state(0)
    manifest = checkpoint.load(tmp_path, state)
    assert (manifest.step, manifest.world_size, manifest.info) == (3, 1, {"note": [1, "two"]})
    assert _values(state) == {3.0}


def test_the_newest_is_loaded_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, _state(step), {}, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    state = _state(0)
    assert checkpoint.load(tmp_path, state).step == 10
    assert _values(state) == {10.0}


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 3, _state(3), {})
    checkpoint.save(tmp_path, 3, _state(4), {})
    state = _state(0)
    checkpoint.load(tmp_path, state)
    assert _values(state) == {4.0}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _truncate, os.remove], ids=["bit flip", "truncation", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damage_is_found_and_the_step_before_is_loaded(tmp_path, damage, name, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step), {})
    damage(tmp_path / "step-00000002" / name)
    state = _state(0)
    assert checkpoint.load(tmp_path, state).step == 1
    assert _values(state) == {1.0}
    assert f"step-00000002/{name}" in caplog.text
    damage(tmp_path / "step-00000001" / name)
    with pytest.raises(CheckpointError, match="there is no sound checkpoint in"):
        checkpoint.load(tmp_path, state)


@pytest.mark.parametrize("change", [{"files": {}}, {"info": {"position": 48}}, {"step": 1}], ids=str)
def test_a_changed_manifest_is_found_and_the_step_before_is_loaded(tmp_path, change, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step), {"position": 32})
    file = tmp_path / "step-00000002" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change, indent=1))
    assert checkpoint.load(tmp_path, _state(0)).step == 1
    assert "manifest.json is damaged: it has changed" in caplog.text


def test_a_file_that_the_manifest_does_not_list_is_found(tmp_path):
    path = checkpoint.save(tmp_path, 1, _state(1), {})
    (path / "__9_0.distcp").write_bytes(b"of another save")
    with pytest.raises(CheckpointError, match=r"__9_0\.distcp is not in manifest\.json"):
        checkpoint.load(tmp_path, _state(0))


def test_the_manifest_can_be_refused_before_tensors_are_read(tmp_path):
    checkpoint.save(tmp_path, 1, _state(1), {"data": "a"})

    def check(manifest):
        raise KeyError(manifest.info["data"])

    state = _state(0)
    with pytest.raises(KeyError, match="a"):
        checkpoint.load(tmp_path, state, check=check)
    assert _values(state) == {0.0}


@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        (torch.float32, torch.int64),
        (torch.int64, torch.int8),
        (torch.bool, torch.float32),
        (torch.complex64, torch.float32),
    ],
)
def test_another_kind_of_numbers_is_refused(tmp_path, saved, asked):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(3).to(saved)}, {})
    with pytest.raises(CheckpointError, match=f"w is {saved} in the checkpoint and {asked} here"):
        checkpoint.load(tmp_path, {"w": torch.zeros(3, dtype=asked)})


def test_floats_are_read_into_floats(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.full((3,), 0.7)}, {})
    w = torch.zeros(3, dtype=torch.bfloat16)
    checkpoint.load(tmp_path, {"w": w})
    assert torch.equal(w, torch.full((3,), 0.7, dtype=torch.bfloat16))


@pytest.mark.parametrize(("arguments", "message"), [({"keep": 0}, "keep: .* got 0"), ({"step": -1}, "step: .* got -1")])
def test_mistaken_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(**{"root": tmp_path, "step": 1, "state": _state(1), "info": {}} | arguments)
    assert not list(tmp_path.iterdir())


def test_every_bit_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, _state(1), {}) / "__0_0.distcp"
    good = path.read_bytes()
    for position in range(0, len(good), 97):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match="has changed"):
            checkpoint.store.verify(path.parent)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, _state(1), {})
    with pytest.raises(CheckpointError, match="extra"):
        checkpoint.load(tmp_path, {**_state(0), "extra": torch.zeros(2)})


def test_a_tensor_of_another_size_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, _state(1), {})
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        checkpoint.load(tmp_path, _state(0, rows=7))


def test_a_place_that_cannot_be_written_is_an_error_with_a_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*: (Not a directory|File exists)"):
        checkpoint.save(tmp_path / "file" / "inside", 1, _state(1), {})


# --- several ranks ---


def _fail_on_rank_1(root):
    def full(*args):
        raise OSError(28, os.strerror(28))

    checkpoint.save(root, 1, _sharded(1), {})
    if ranks.rank() == 1:
        os.fsync = full
    try:
        checkpoint.save(root, 2, _sharded(2), {})
    except CheckpointError as error:
        return str(error)


def _save_what_json_cannot_hold(root):
    with pytest.raises(TypeError, match="info: only JSON values can be saved"):
        checkpoint.save(root, 1, _state(1), {"when": object()} if ranks.is_leader() else {})


def test_all_ranks_raise_where_json_cannot_hold_the_info(tmp_path, ranks):
    ranks(_save_what_json_cannot_hold, 2, tmp_path)


def test_all_ranks_learn_of_a_full_disk(tmp_path, ranks):
    for message in ranks(_fail_on_rank_1, 2, tmp_path):
        assert "cannot write the checkpoint" in message
        assert "No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def _sharded(step):
    mesh = init_device_mesh("cpu", (ranks.world_size(),))
    whole = _state(step)
    whole["model"]["w"] = distribute_tensor(whole["model"]["w"], mesh, [Shard(0)])
    return whole


def _save_and_die(root, victim, function, calls):
    """Save step 1, then die in the `calls`-th call of os.`function` while saving step 2."""
    checkpoint.save(root, 1, _sharded(1), {}, keep=1)
    if ranks.rank() == victim:
        left = iter(range(calls))
        original = getattr(os, function)

        def deadly(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, function, deadly)
    checkpoint.save(root, 2, _sharded(2), {}, keep=1)


# On rank 0 fsync is called for data, metadata, manifest, folder and parent, and rename for metadata, publication and
# the removal of step 1.
@pytest.mark.parametrize(
    ("victim", "function", "calls"),
    [(1, "fsync", 0), *((0, "fsync", calls) for calls in range(5)), *((0, "rename", calls) for calls in range(3))],
)
def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path, ranks, victim, function, calls):
    with pytest.raises(RankError, match="exit code -9"):
        ranks(_save_and_die, 2, tmp_path, victim, function, calls)
    state = _state(0)
    step = checkpoint.load(tmp_path, state).step
    assert _values(state) == {float(step)}
    published = (function, calls) in [("fsync", 4), ("rename", 2)]
    assert step == (2 if published else 1)
    # The next save tidies up.
    checkpoint.save(tmp_path, 3, _state(3), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def _save_and_die_after(root, victim, seconds):
    if ranks.rank() == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for step in itertools.count(2):
        checkpoint.save(root, step, _sharded(step), {}, keep=1)


@pytest.mark.long
@pytest.mark.parametrize("kill", range(200))
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path, ranks, kill):
    checkpoint.save(tmp_path, 1, _state(1), {}, keep=1)
    with pytest.raises(RankError, match="exit code -9"):
        ranks(_save_and_die_after, 2, tmp_path, kill % 2, random.Random(kill).uniform(0, 0.2))
    state = _state(0)
    assert _values(state) == {0.0}
    step = checkpoint.load(tmp_path, state).step
    assert _values(state) == {float(step)}


def test_the_deadly_calls_are_all_there(tmp_path, ranks):
    """With more calls than a save makes, nobody dies: so the cases above cover every one."""
    ranks(_save_and_die, 2, tmp_path, 0, "fsync", 5)
    shutil.rmtree(tmp_path / "step-00000002")
    ranks(_save_and_die, 2, tmp_path, 0, "rename", 3)


# --- models on meshes ---


class _Toy(nn.Module):
    """Dense parameters for FSDP and stacked experts for a mesh of their own; sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(7, 5)
        self.experts = nn.Parameter(torch.randn(4, 5, 6))
        self.register_buffer("bias", torch.randn(4))

    def forward(self, x):
        return self.dense(x)


def _toy(layout):
    """A toy model on (dp, ep, etp), with an optimizer after two steps. With no layout: one process."""
    model = _Toy()
    if layout is not None:
        dp, ep, etp = layout
        experts = init_device_mesh("cpu", (ep, etp))
        model.experts = nn.Parameter(distribute_tensor(model.experts.detach(), experts, [Shard(0), Shard(2)]))
        fully_shard(model, mesh=init_device_mesh("cpu", (dp,)), ignored_params={model.experts})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    return model, optimizer


def _train(model, optimizer, steps=2):
    for step in range(steps):
        model(torch.full((2, 7), 0.1 * step + 1)).square().sum().backward()
        model.experts.grad = torch.sin(model.experts.detach() * (step + 1))
        optimizer.step()
        optimizer.zero_grad()


def _whole(model, optimizer):
    def full(x):
        return x.full_tensor() if isinstance(x, DTensor) else x

    tensors = {name: full(x.detach()) for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": full(x) for key, x in optimizer.state[parameter].items()}
    return {name: x.clone() for name, x in tensors.items()}


def _save_toy(root, layout):
    model, optimizer = _toy(layout)
    _train(model, optimizer)
    checkpoint.save(root, 2, checkpoint.training_state(model, optimizer), {})
    return _whole(model, optimizer)


def _load_toy(root, layout):
    model, optimizer = _toy(layout)
    model.bias.zero_()
    state = checkpoint.training_state(model, optimizer)
    checkpoint.load(root, state)
    checkpoint.restore(model, optimizer, state)
    return _whole(model, optimizer)


def _on(ranks, fn, root, layout):
    return fn(root, None) if layout is None else ranks(fn, layout[0], root, layout)[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, None), ((4, 2, 2), (4, 2, 2)), ((4, 2, 2), None), (None, (4, 4, 1)), ((4, 1, 4), (2, 2, 1))],
    ids=str,
)
def test_a_model_and_its_optimizer_come_back_on_any_layout(tmp_path, ranks, before, after):
    saved = _on(ranks, _save_toy, tmp_path, before)
    loaded = _on(ranks, _load_toy, tmp_path, after)
    assert saved.keys() == loaded.keys()
    assert {"experts.exp_avg_sq", "dense.weight.step", "bias"} <= saved.keys()
    for name in saved:
        assert torch.equal(saved[name], loaded[name]), name


def test_damage_is_found_by_all_ranks(tmp_path, ranks):
    _on(ranks, _save_toy, tmp_path, (2, 2, 1))
    _flip(tmp_path / folder.folder_name(2) / "__1_0.distcp")
    with pytest.raises(RankError) as failure:
        ranks(_load_toy, 2, tmp_path, (2, 2, 1))
    assert list(failure.value.failures) in ([0, 1], [1, 0])
    assert all("__1_0.distcp is damaged" in text for text in failure.value.failures.values())
