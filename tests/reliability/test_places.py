"""A run folder that cannot be written to: told in one line, and what can go on goes on."""

import errno
import os

import pytest

from moesaic.checkpoint import checkpoints
from moesaic.train import loop, run
from moesaic.train.errors import UserError
from tests.train.test_resume import _fit


def _read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_settings_that_cannot_be_written(tiny, cache, monkeypatch):
    monkeypatch.setattr(run, "write_json", _read_only)
    with pytest.raises(UserError, match="cannot write into the run folder .*: Read-only file system"):
        _fit(tiny, cache)


def test_metrics_that_cannot_be_written(tiny, cache, monkeypatch):
    monkeypatch.setattr(loop, "JsonlWriter", _read_only)
    finished, messages = _fit(tiny, cache)
    assert finished
    assert any("warning: cannot write" in text and "training continues" in text for text in messages)
    assert [path.name for path in checkpoints(tiny.out / "checkpoints")] == ["step-00000006"]
