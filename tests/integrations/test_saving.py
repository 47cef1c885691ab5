"""Checkpoints that all ranks write: as transformers would have written them, and whole or not there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.integrations.transformers import export_pretrained, load_pretrained, saving, swap_moe
from moesaic.integrations.transformers.lazy import LazyTensor, equal_bits
from moesaic.integrations.transformers.shard_file import ShardFile
from moesaic.testing.pool import RankError
from moesaic.train.tokenizer import train_bpe
from tests.integrations.families import make_model
from tests.integrations.test_loading_files import SWAPPED

# More than the names and shapes in a file take.
HEADER = 10_000
ON_RANKS = ("Mixtral", "Qwen2-MoE", "DeepSeek-V3", "gpt-oss")


def tensors_of(folder):
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(folder, expected):
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", SWAPPED)
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["", "tied half"])
def test_one_process_writes_what_transformers_writes(tmp_path, family, tied, dtype):
    plain = make_model(family, tie_word_embeddings=tied).to(dtype)
    plain.save_pretrained(tmp_path / "theirs")
    export_pretrained(swap_moe(plain), tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tensors_of(tmp_path / "theirs"))
    for file in ("config.json", "generation_config.json"):
        mine, theirs = (json.loads((tmp_path / who / file).read_text()) for who in ("ours", "theirs"))
        assert mine == theirs
    mine, theirs = ({p.name for p in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    assert mine == theirs


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_all_that_an_export_writes_can_be_read_by_the_group(tmp_path):
    """As the umask says, in spite of the folder that only its user may read, in which it is made."""
    tokenizer = train_bpe(["to be or not to be"], 257)
    before = os.umask(0o027)
    try:
        export_pretrained(swap_moe(make_model("Mixtral")), tmp_path / "out", tokenizer=tokenizer, max_shard_size=20_000)
    finally:
        os.umask(before)
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {"model.safetensors.index.json", "tokenizer.json"} <= {path.name for path in written}
    modes = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in written}
    assert modes == {str(path.relative_to(tmp_path)): "0o750" if path.is_dir() else "0o640" for path in written}


def export_and_load_on_another_mesh(folders, layout, other):
    meshes, others = (moesaic.build_meshes(**sizes, device_type="cpu") for sizes in (layout, other))
    for folder in folders.values():
        export_pretrained(load_pretrained(folder, meshes), f"{folder}-out")
        export_pretrained(load_pretrained(f"{folder}-out", others), f"{folder}-again", max_shard_size=20_000)


LAYOUTS = [
    ({"tp": 2, "ep": 2, "etp": 2}, {"ep": 4}),
    pytest.param(({"ep": 2}, {"dp_replicate": 2, "etp": 2}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_ranks_write_what_transformers_wrote(ranks, tmp_path, layouts):
    folders = {}
    for family in ON_RANKS:
        make_model(family).save_pretrained(tmp_path / family)
        folders[family] = str(tmp_path / family)
    ranks(export_and_load_on_another_mesh, 4, folders, *layouts)
    for family, folder in folders.items():
        for suffix in ("-out", "-again"):
            assert_same_tensors(folder + suffix, tensors_of(folder))
        sizes = [file.stat().st_size for file in Path(folder + "-out").glob("*.safetensors")]
        assert len(sizes) == 4
        largest = max(tensor.nbytes for tensor in tensors_of(folder).values())
        assert max(sizes) < sum(sizes) / 4 + largest + HEADER
        assert (
            max(file.stat().st_size for file in Path(folder + "-again").glob("*.safetensors"))
            < max(20_000, largest) + HEADER
        )
        state = make_model(family).state_dict()
        loaded = AutoModelForCausalLM.from_pretrained(folder + "-out").state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def export_uneven(folder):
    meshes = moesaic.build_meshes(ep=4, tp=2, device_type="cpu")
    export_pretrained(load_pretrained(folder, meshes), f"{folder}-out")


def test_uneven_and_empty_shards_and_tied_weights(ranks, tmp_path):
    sizes = {"num_experts": 5, "moe_intermediate_size": 9, "tie_word_embeddings": True, "vocab_size": 67}
    make_model("Qwen3-MoE", **sizes).save_pretrained(tmp_path / "m")
    ranks(export_uneven, 4, str(tmp_path / "m"))
    assert_same_tensors(tmp_path / "m-out", tensors_of(tmp_path / "m"))


def export_while_one_rank_cannot_write(folder):
    meshes = moesaic.build_meshes(ep=2, device_type="cpu")
    model = load_pretrained(folder, meshes)
    write = ShardFile.write

    def full(self, name, tensor):
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    ShardFile.write = full
    export_pretrained(model, f"{folder}-out")


def test_a_rank_that_cannot_write_fails_all_and_leaves_what_was_there(ranks, tmp_path):
    make_model("Mixtral").save_pretrained(tmp_path / "m")
    (tmp_path / "m-out").mkdir()
    (tmp_path / "m-out/config.json").write_text("earlier")
    with pytest.raises(RankError) as caught:
        ranks(export_while_one_rank_cannot_write, 2, str(tmp_path / "m"))
    assert set(caught.value.failures) == {0, 1}
    assert all("No space left on device" in text for text in caught.value.failures.values())
    assert (tmp_path / "m-out/config.json").read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m-out"]


def test_a_crash_leaves_no_half(tmp_path, monkeypatch):
    model = swap_moe(make_model("Mixtral"))
    monkeypatch.setattr(saving, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export_pretrained(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path):
    export_pretrained(swap_moe(make_model("Mixtral")), tmp_path / "out", max_shard_size=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    export_pretrained(swap_moe(make_model("Qwen3-MoE")), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    (tmp_path / "out/notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"path: .*out has \['notes.md'\], which no export wrote"):
        export_pretrained(swap_moe(make_model("Mixtral")), tmp_path / "out")


def test_shares_are_equal_but_for_one_tensor():
    sizes = [700, 1, 300, 300, 250, 8, 8, 1000, 400, 500, 3, 90]
    tensors = {f"{i}": LazyTensor([size], torch.uint8, lambda box: torch.empty(0)) for i, size in enumerate(sizes)}
    for num_ranks in range(1, 14):
        dealt = saving.deal(tensors, num_ranks, 10**9)
        assert [name for files in dealt for file in files for name in file] == list(tensors)
        shares = [sum(sizes[int(name)] for file in files for name in file) for files in dealt]
        assert max(shares) <= sum(sizes) / num_ranks + max(sizes)
    (files,) = saving.deal(tensors, 1, 900)
    assert all(len(file) == 1 or sum(sizes[int(name)] for name in file) <= 900 for file in files)


@pytest.mark.parametrize("names", [["notes.txt", "config.json"], ["results.json", "config.json"], ["tokenizer.json"]])
def test_folders_that_no_export_wrote_stay(tmp_path, names):
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match="no export wrote"):
        export_pretrained(make_model("Mixtral"), tmp_path / "out")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == sorted(names)


def test_neighbours_of_the_target_stay(tmp_path):
    model = make_model("Mixtral")
    for name in ("out.tmp", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    for _ in range(2):
        export_pretrained(model, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out.old", "out.tmp"]
    assert all((tmp_path / name / "notes").read_text() == "mine" for name in ("out.tmp", "out.old"))


def test_a_file_that_is_written_tensor_by_tensor_is_that_of_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=generator).bfloat16(),
        "a": torch.randn(4, 3, generator=generator).mT,
        "one": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "eighth": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        "wide": torch.randn(2, 2, generator=generator).double()[::2],
    }
    file = ShardFile(tmp_path / "ours", {n: LazyTensor(t.shape, t.dtype, t.__getitem__) for n, t in tensors.items()})
    for name in reversed(tensors):
        file.write(name, tensors[name])
    file.close()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(equal_bits(found[name], t) for name, t in tensors.items())
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    theirs, ours = ((tmp_path / name).read_bytes() for name in ("theirs", "ours"))
    assert theirs[8 + int.from_bytes(theirs[:8], "little") :] == ours[8 + int.from_bytes(ours[:8], "little") :]
    with pytest.raises(ValueError, match="x: safetensors has no dtype for torch.complex128; cast it"):
        ShardFile(tmp_path / "no", {"x": LazyTensor((1,), torch.complex128, torch.zeros)})
