"""A run small enough for tests: a few dozen short documents, and a model of some ten thousand parameters."""

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
import torch

from moesaic.train.config import TrainConfig
from moesaic.train.run import set_up
from moesaic.train.runtime import started
from moesaic.train.step import train_step

MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents of made-up sentences, no two alike."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    words = ["the", "a", "cat", "dog", "tree", "sees", "eats", "likes", "big", "small", "red", "and", "or", "often"]
    for index in range(documents):
        lines = [" ".join(chance.choices(words, k=8)) for _ in range(12)]
        (folder / f"doc{index:03}.txt").write_text(f"{index}\n" + ".\n".join(lines) + ".\n")
    return folder


@contextlib.contextmanager
def run_of(config, cache):
    """A run that is set up on the CPU, on this rank or alone, and closed unless something fails."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        yield run
        run.close()


def one_step(run):
    """The next step of a run."""
    return train_step(run.training, run.config, meshes=run.meshes, guard=run.guard, device=run.runtime.device)


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small for two, and beside other tests they would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder of the tests' own; ranks have to be told of it."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


@pytest.fixture
def tiny(corpus, model_file, cache, tmp_path):
    """Settings of a run that takes a second."""
    return TrainConfig(
        data=str(corpus),
        model=str(model_file),
        steps=6,
        batch_size=4,
        seq_len=31,  # uneven shards of the sequence
        lr=1e-2,
        warmup_steps=2,
        aux_loss_coef=0.01,
        out=tmp_path / "run",
        save_every=0,
        log_every=1,
        tensorboard=False,
        device="cpu",
        eval_bytes=2000,
        sample_tokens=5,
    )
