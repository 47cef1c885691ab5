"""Mistyped names: told at once, and never asked of the hub where a look at the disk is enough."""

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from moesaic.train.architecture import find_model
from moesaic.train.corpus import documents
from moesaic.train.errors import UserError
from moesaic.train.hub import check_on_hub
from moesaic.train.tokenizer import load


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; it has nothing. There is a folder `data` with a file `chats.jsonl`."""
    names = []

    def repo_info(self, name, *, repo_type, timeout):
        names.append((repo_type, name))
        assert timeout <= 10
        raise RepositoryNotFoundError("404", response=_Response())

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_text(json.dumps({"text": "x"}))
    return names


class _Response:
    headers: dict = {}  # noqa: RUF012
    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("read", "flag"), [(documents, "--data"), (find_model, "--model"), (load, "--tokenizer")], ids=lambda value: value
)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data/chat.jsonl", "; did you mean data/chats.jsonl?"),
        ("datas/chats.jsonl", ""),
        ("./dat", "; did you mean data?"),
    ],
)
def test_a_mistyped_path_stays_here(asked, read, flag, name, hint):
    with pytest.raises(UserError) as error:
        read(name)
    assert str(error.value) == f"{flag} {name}: there is no such file or folder{hint}"
    assert asked == []


@pytest.mark.parametrize(("read", "flag", "kind"), [(documents, "--data", "dataset"), (find_model, "--model", "model")])
def test_the_hub_is_asked_once_for_owner_and_name(asked, read, flag, kind):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=f"{flag} someone/thing: there is no such folder here, and no such {kind} on"):
        list(read("someone/thing"))
    assert asked == [(kind, "someone/thing")]


def test_a_name_alone_is_no_name_of_the_hub(asked):
    with pytest.raises(
        UserError, match=r"--data chats: there is no such file or folder; a name on the hub is owner/name"
    ):
        documents("chats")
    with pytest.raises(UserError, match=r"--data dat: there is no such file or folder; did you mean data\?"):
        documents("dat")
    assert asked == []


def test_what_is_cached_or_offline_is_not_asked_for(asked, tmp_path, monkeypatch):
    (tmp_path / "cache" / "models--someone--thing").mkdir(parents=True)
    check_on_hub("--model", "someone/thing", "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_on_hub("--model", "someone/other", "model")
    assert asked == []


def test_a_hub_that_cannot_be_reached_is_told(asked, monkeypatch):
    def repo_info(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    with pytest.raises(UserError, match="the hub cannot be asked: no route; give a folder, or set HF_HUB_OFFLINE=1"):
        check_on_hub("--model", "someone/thing", "model")
