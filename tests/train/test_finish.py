"""The end of a run fails in one line."""

import pytest
from torch import nn

from moesaic.train import finish
from moesaic.train.config import TrainConfig
from moesaic.train.errors import TrainingError


def test_what_transformers_cannot_load_is_a_training_error(tmp_path):
    with pytest.raises(TrainingError, match="transformers cannot load the export in"):
        finish.load_exported(tmp_path)


def test_an_export_that_cannot_be_written_is_a_training_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(finish, "export_pretrained", fail)
    with pytest.raises(TrainingError, match=r"cannot export to .*No space left.*--resume"):
        finish.export(nn.Linear(1, 1), tmp_path / "export", None, TrainConfig(), None)
