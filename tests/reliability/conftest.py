"""The runs of `tests/train`, and what happens to them."""

from tests.train.conftest import cache, corpus, model_file, one_thread, tiny

__all__ = ["cache", "corpus", "model_file", "one_thread", "tiny"]
