"""Reading a checkpoint's metadata runs no code."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from moesaic.checkpoint import CheckpointError
from moesaic.checkpoint.reader import SafeReader


class _Call:
    """Unpickling this calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _read(folder, content: bytes):
    (folder / ".metadata").write_bytes(content)
    return SafeReader(folder).read_metadata()


@pytest.mark.parametrize(
    "call",
    [
        lambda mark: _Call(os.system, f"touch {mark}"),
        lambda mark: _Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: _Call(torch.load, str(mark)),
        lambda mark: {"nested": [_Call(os.mkdir, str(mark))]},
    ],
    ids=["system", "eval", "torch.load", "nested"],
)
def test_calls_are_refused_and_not_made(tmp_path, call):
    mark = tmp_path / "mark"
    with pytest.raises(CheckpointError, match=r"\.metadata .*which no checkpoint needs"):
        _read(tmp_path, pickle.dumps(call(mark)))
    assert not mark.exists()


def test_a_dotted_name_does_not_reach_through_an_allowed_class(tmp_path):
    # Protocol 4 lets a pickle walk attributes: from an allowed class to the globals of its module.
    path = b"Metadata.__init__.__globals__"
    module = b"torch.distributed.checkpoint.metadata"
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, path)) + b"\x93."
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        _read(tmp_path, content)


def test_other_things_than_metadata_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="but a dict"):
        _read(tmp_path, pickle.dumps({}))


@given(st.binary(max_size=200))
def test_garbage_is_refused(tmp_path_factory, content):
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        _read(tmp_path_factory.mktemp("garbage"), content)


@pytest.mark.parametrize("place", ["../secret", "/secret", "..", "sub/file"])
def test_places_outside_of_the_folder_are_refused(tmp_path, place):
    entries = {MetadataIndex("w"): _StorageInfo(place, 0, 8)}
    with pytest.raises(CheckpointError, match="is not in this folder"):
        _read(tmp_path, pickle.dumps(Metadata({}, storage_data=entries)))


def test_every_dtype_is_read(tmp_path):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
    state = {str(dtype): torch.ones(3, dtype=dtype) for dtype in dtypes}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    metadata = SafeReader(tmp_path).read_metadata()
    assert isinstance(metadata, Metadata)
    assert set(metadata.state_dict_metadata) == set(state)
