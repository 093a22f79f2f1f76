"""Folders on local disks, in memory and on S3: published whole, without keys."""

import pytest

from saeray.errors import ConfigError
from saeray.files.storage import Folder


def test_a_folder_is_published_whole(tmp_path):
    folder = Folder.at(tmp_path) / "a" / "b"
    folder.publish({"one": b"1", "two": b"2"})
    folder.publish({"one": b"3"})
    assert folder.names() == ["one"]
    assert folder.read("one") == b"3"
    assert (Folder.at(tmp_path) / "a").names() == ["b"]  # nothing half-written beside it
    assert Folder.at(tmp_path / "missing").names() == []


def test_object_storage_through_the_same_code():
    folder = Folder.at("memory://bucket/sweep") / "final"  # fsspec's own store in memory
    folder.publish({"cfg.json": b"{}", "marker": b"x"})
    assert folder.names() == ["cfg.json", "marker"]
    assert folder.read("cfg.json") == b"{}"
    assert not folder.is_local
    with pytest.raises(ConfigError, match="storage_path = 'nonsense://x'"):
        Folder.at("nonsense://x")


def test_a_folder_on_s3_is_used_like_a_local_one(s3):
    root = Folder.at(s3("results"))
    folder = root / "sweep" / "trials"
    folder.publish({"a": b"1", "b": b"2"})
    again = Folder.at(folder.uri)  # as another process opens it
    assert again.names() == ["a", "b"]
    assert again.read("b") == b"2"
    assert (again.name, Folder.at(again.parent_uri).names()) == ("trials", ["trials"])
    folder.delete()
    assert not again.exists()


def test_a_question_mark_is_a_character_like_any_other_in_a_local_path(tmp_path):
    folder = Folder.at(tmp_path / "what?" / "x#y z")
    (folder / "sweep").write("a", b"1")
    assert (tmp_path / "what?" / "x#y z" / "sweep" / "a").read_bytes() == b"1"
    again = Folder.at((folder / "sweep").uri)  # as another process opens it
    assert again.read("a") == b"1"
    assert Folder.at(again.parent_uri).names() == ["sweep"]


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA123:topsecret@bucket/x", "s3://bucket/x?access_key=AKIA123&secret_key=topsecret"],
)
def test_a_key_in_a_uri_is_refused_and_not_repeated(uri):
    with pytest.raises(ConfigError, match=r"storage_path.*environment") as refused:
        Folder.at(uri)
    assert "topsecret" not in str(refused.value)
