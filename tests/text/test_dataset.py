"""Which files, split and column a dataset_path means, locally and behind a URI."""

import importlib.util
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from support.digits import parquet, windows_of

from saeray.errors import ConfigError
from saeray.files.storage import Folder


def seen(windows, n=60):
    """The tokens that training sees."""
    return set(np.unique(windows.train(0, n)).tolist()) - {0}


def split_folder(path, suffix="parquet"):
    """A folder with a digit for each split: 1 train, 2 validation, 3 test."""
    path.mkdir(parents=True, exist_ok=True)
    for digit, split in enumerate(("train", "validation", "test"), start=1):
        texts = [str(digit) * 3] * 20
        if suffix == "parquet":
            parquet(path / f"{split}-0.parquet", text=texts)
        elif suffix == "jsonl":
            lines = "\n".join(json.dumps({"text": t}) for t in texts)
            (path / f"{split}-0.jsonl").write_text(lines)
        else:
            (path / f"{split}-0.txt").write_text("\n\n".join(texts))
    return path


# --- splits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("streaming", [None, True])
def test_a_folder_has_the_splits_that_its_file_names_say(tmp_path, suffix, streaming):
    folder = split_folder(tmp_path / "folder", suffix)
    for digit, split in enumerate(("train", "validation", "test"), start=1):
        w = windows_of(folder, dataset_split=split, streaming=streaming)
        assert seen(w) == {digit}
    with pytest.raises(ConfigError, match=r"dataset_split = 'nonsense'.*train, validation, test"):
        windows_of(folder, dataset_split="nonsense", streaming=streaming)


def test_splits_may_be_folders_parts_and_sums(tmp_path):
    for digit, split in enumerate(("train", "test"), start=1):
        (tmp_path / split).mkdir()
        parquet(tmp_path / split / "0.parquet", text=[str(digit) * 3] * 20)
    assert seen(windows_of(tmp_path, dataset_split="test")) == {2}
    assert seen(windows_of(tmp_path, dataset_split="train+test")) == {1, 2}
    w = windows_of(tmp_path, dataset_split="test[:25%]")
    assert len(w.dataset) == 5
    with pytest.raises(ConfigError, match=r"dataset_split = 'validation'"):
        windows_of(tmp_path, dataset_split="validation")
    with pytest.raises(ConfigError, match=r"dataset_split = 'train\[nonsense\]'"):
        windows_of(tmp_path, dataset_split="train[nonsense]")


def test_one_file_is_one_split(tmp_path):
    path = parquet(tmp_path / "validation.parquet", text=["123"] * 9)
    assert seen(windows_of(path)) == {1, 2, 3}
    assert seen(windows_of(f"file://{path}", streaming=True)) == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"dataset_split = 'validation'.* has: train"):
        windows_of(path, dataset_split="validation")


def test_names_may_have_brackets_or_be_hidden(tmp_path):
    (tmp_path / ".hidden").mkdir()
    parquet(tmp_path / ".hidden" / "0.parquet", text=["9"] * 9)
    assert seen(windows_of(tmp_path)) == {9}
    folder = split_folder(tmp_path / "text [v1]" / "a*b")
    assert seen(windows_of(folder, dataset_split="test")) == {3}
    assert seen(windows_of(folder / "test-0.parquet")) == {3}


def test_a_readme_may_name_configurations(tmp_path):
    for digit in (1, 2):
        parquet(tmp_path / f"{digit}.parquet", text=[str(digit) * 3] * 20)
    (tmp_path / "dataset_infos.json").write_text("{}")  # is no data
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: 1.parquet\n"
        "- config_name: two\n  data_files: 2.parquet\n---\n"
    )
    assert seen(windows_of(tmp_path, dataset_config="two")) == {2}
    for wrong in (None, "three"):
        with pytest.raises(ConfigError, match=rf"dataset_config = {wrong!r}.*'one', 'two'"):
            windows_of(tmp_path, dataset_config=wrong)


def test_what_would_be_ignored_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["123"] * 9)
    for changes in (dict(dataset_config="one"), dict(dataset_revision="main")):
        with pytest.raises(ConfigError, match=rf"{next(iter(changes))} = .*leave it out"):
            windows_of(path, **changes)
    with pytest.raises(ConfigError, match=r"dataset_revision = 'main'.*leave it out"):
        windows_of(tmp_path, dataset_revision="main")


def test_a_saved_dataset_has_its_splits(tmp_path):
    of = {
        s: datasets.Dataset.from_dict({"text": [d * 3] * 9})
        for s, d in zip("ab", "12", strict=True)
    }
    datasets.DatasetDict(of).save_to_disk(tmp_path / "several")
    assert seen(windows_of(tmp_path / "several", dataset_split="b")) == {2}
    with pytest.raises(ConfigError, match=r"dataset_split = 'train'.* has: a, b"):
        windows_of(tmp_path / "several")
    of["a"].save_to_disk(tmp_path / "one")
    assert seen(windows_of(tmp_path / "one")) == {1}
    with pytest.raises(ConfigError, match=r"dataset_split = 'b'.* has: train"):
        windows_of(tmp_path / "one", dataset_split="b")


def test_a_sweep_of_the_version_before_keeps_its_text(tmp_path):
    folder = split_folder(tmp_path / "folder")
    for split in ("train", "nonsense"):
        assert seen(windows_of(folder, text_version=1, dataset_split=split)) == {1, 2, 3}
    (tmp_path / "a.txt").write_text("1\n\n2\n\n" * 9)
    w = windows_of(tmp_path / "a.txt", text_version=1)
    assert len(w.dataset) == 36


# --- columns --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [["a", "b"], 3, 0.5, [1.5], {"ids": [1]}, [[1], [2, 3]], True])
@pytest.mark.parametrize("streaming", [None, True])
def test_text_is_used_beside_tokens_that_are_none(tmp_path, tokens, streaming):
    path = parquet(tmp_path / "a.parquet", tokens=[tokens] * 20, text=["123"] * 20)
    w = windows_of(path, streaming=streaming)
    assert (w.column, w.is_tokenized) == ("text", False)
    assert seen(w) == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"is_dataset_tokenized = True: column 'tokens' holds"):
        windows_of(path, streaming=streaming, is_dataset_tokenized=True)


def test_tokens_may_have_a_batch_dimension(tmp_path):
    path = parquet(tmp_path / "a.parquet", input_ids=[[[1, 2, 3]], [[4, 5, 6]]] * 9)
    w = windows_of(path)
    assert w.is_tokenized
    assert {tuple(x) for x in w.train(0, 9).tolist()} == {(0, 1, 2, 3), (0, 4, 5, 6)}


CHAT = [{"role": "user", "content": "123"}]


@pytest.mark.parametrize(
    ("columns", "changes", "words"),
    [
        (
            dict(messages=CHAT),
            dict(text_column="messages"),
            r"text_column = 'messages': .*\(struct of role",
        ),
        (dict(text=CHAT), {}, r"column 'text' holds a list of 1 \(struct of .*role"),
        (dict(text=7), {}, "column 'text' holds a number"),
        (dict(text=b"123"), {}, "column 'text' holds bytes"),
        (dict(text=["1", "2"]), {}, r"column 'text' holds a list of 2 \(text\)"),
        (dict(text=[1, 2]), {}, r"column 'text' holds a list of 2 \(number\)"),
        (dict(input_ids=[[1, 2], [3, 4]]), {}, r"column 'input_ids' holds a list of 2 \(list of 2"),
        (dict(input_ids=["a", "b"]), {}, r"column 'input_ids' holds a list of 2 \(text\)"),
        (dict(ids=[1.5]), dict(text_column="ids"), r"text_column = 'ids': .*list of 1 \(number\)"),
        (dict(text="123"), dict(text_column="text", is_dataset_tokenized=True), "holds text"),
    ],
)
@pytest.mark.parametrize("streaming", [None, True])
def test_other_columns_are_refused_by_what_is_in_them(tmp_path, columns, changes, words, streaming):
    path = parquet(tmp_path / "a.parquet", **{k: [v] * 20 for k, v in columns.items()})
    with pytest.raises(ConfigError, match=words) as refused:
        windows_of(path, streaming=streaming, **changes)
    assert "empty" not in str(refused.value)


@pytest.mark.parametrize("columns", [dict(text=["?", "!"] * 9), dict(tokens=[[0]] * 9)])
def test_rows_of_which_nothing_is_left_are_not_called_empty(tmp_path, columns):
    with pytest.raises(ConfigError, match=r"no row gives any token \(row 0 of column"):
        windows_of(parquet(tmp_path / "a.parquet", **columns), streaming=True)


def test_a_named_column_of_ids_is_tokens(tmp_path):
    path = parquet(tmp_path / "a.parquet", ids=[[1, 2, 3]] * 9)
    assert windows_of(path, text_column="ids").is_tokenized


def test_what_is_odd_only_later_is_not_called_empty(tmp_path):
    # The first rows are empty, so that the column's name must do.
    lines = [{"text": None}] * 300 + [{"text": {"a": "1"}}] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=r"no row gives any token \(row \d+ of column 'text'"):
        windows_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("streaming", [None, True])
def test_masked_positions_are_dropped(tmp_path, streaming):
    path = parquet(
        tmp_path / "a.parquet",
        input_ids=[[1, 2, 3, 9, 9, 9, 9, 9], [9, 9, 4, 5, 6, 9, 9, 9], [7, 8, 7, 8, 7, 8, 7, 8]]
        * 9,
        attention_mask=[[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [1] * 8] * 9,
    )
    w = windows_of(path, streaming=streaming)
    assert seen(w) == {1, 2, 3, 4, 5, 6, 7, 8}
    assert 9 in seen(windows_of(path, streaming=streaming, text_version=1))


def test_a_mask_may_have_a_batch_dimension_or_hide_all_and_must_be_as_long(tmp_path):
    ids, mask = [[[1, 2, 9]], [[9, 9, 9]]] * 9, [[[1, 1, 0]], [[0, 0, 0]]] * 9
    w = windows_of(parquet(tmp_path / "a.parquet", input_ids=ids, attention_mask=mask))
    assert seen(w) == {1, 2}
    assert w.skipped_rows > 0
    for wrong in ([1], ["a", "b"], [[1], [1, 1]], [0, 0]):
        columns = dict(input_ids=[[1, 2]] * 9, attention_mask=[wrong] * 9)
        with pytest.raises(
            ConfigError, match=r"no row gives any token \(row 0 .*attention_mask of"
        ):
            windows_of(parquet(tmp_path / "c.parquet", **columns))
    path = parquet(tmp_path / "b.parquet", input_ids=[[1, 2]] * 9, attention_mask=[[1]] * 9)
    with pytest.raises(
        ConfigError, match=r"row 0 of column 'input_ids' .* beside an attention_mask"
    ):
        windows_of(path)


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("streaming", [None, True])
def test_only_the_wanted_column_must_be_the_same_in_all_files(tmp_path, kind, streaming):
    rows = dict(
        a=dict(text=["123"] * 9, tokens=[7] * 9),
        b=dict(text=["456"] * 9, meta=[{"q": 1}] * 9),
        c=dict(meta=["q"] * 9, text=["789"] * 9, tokens=[["7"]] * 9),
    )
    for name, columns in rows.items():
        if kind == "parquet":
            parquet(tmp_path / f"{name}.parquet", **columns)
        elif kind == "arrow":
            table = pa.table(columns)
            with pa.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as file:
                file.write_table(table)
        else:
            lines = pa.table(columns).to_pylist()
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert seen(windows_of(tmp_path, streaming=streaming)) == set(range(1, 10))


@pytest.mark.parametrize("streaming", [None, True])
def test_the_file_that_cannot_be_read_is_named(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": "123"}\n')
    bad = tmp_path / "b.jsonl"
    for text, words in (('{"other": "1"}\n', "its columns are other"), ('{"text": "1', "JSON")):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=rf"b\.jsonl.*{words}") as refused:
            windows_of(tmp_path, streaming=streaming)
        assert "error occurred while" not in str(refused.value)


@pytest.mark.parametrize(
    ("txt_documents", "documents"),
    [
        (None, ["12\n3", "45", "6\n"]),
        ("blank_line", ["12\n3", "45", "6\n"]),
        ("file", ["12\n3\n\n45\n\n6\n"]),
        ("line", ["12", "3", "", "45", "", "6"]),
    ],
)
@pytest.mark.parametrize("streaming", [None, True])
def test_documents_of_a_txt_file(tmp_path, txt_documents, documents, streaming):
    (tmp_path / "a.txt").write_text("12\n3\n\n45\n\n6\n")
    w = windows_of(tmp_path, txt_documents=txt_documents, streaming=streaming)
    assert [row["text"] for row in w.dataset] == documents


def test_a_txt_file_without_blank_lines_has_a_document_in_each_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"12\r\n3\r\n")
    assert list(windows_of(tmp_path).dataset["text"]) == ["12", "3"]
    with pytest.raises(ConfigError, match=r"txt_documents = 'sentence'.*blank_line, file, line"):
        windows_of(tmp_path, txt_documents="sentence")


# --- behind a URI ---------------------------------------------------------------------------


def upload(folder, local):
    for file in local.iterdir():
        folder.write(file.name, file.read_bytes())


@pytest.mark.parametrize(
    ("suffix", "streaming"), [("parquet", None), ("jsonl", False), ("txt", None)]
)
def test_text_is_read_from_s3(tmp_path, s3, suffix, streaming):
    bucket = Folder.at(s3(f"text-{suffix}"))
    upload(bucket / "folder", split_folder(tmp_path / "folder", suffix))
    uri = (bucket / "folder").uri
    here = windows_of(tmp_path / "folder", dataset_split="test", streaming=streaming is None)
    there = windows_of(uri, dataset_split="test", streaming=streaming)
    assert np.array_equal(there.train(0, 30), here.train(0, 30))
    one = windows_of((bucket / "folder" / f"validation-0.{suffix}").uri, streaming=streaming)
    assert seen(one) == {2}
    with pytest.raises(ConfigError, match=r"dataset_split = 'nonsense'.*train, validation, test"):
        windows_of(uri, dataset_split="nonsense")


def test_a_uri_with_nothing_behind_it_is_refused(s3):
    with pytest.raises(ConfigError, match=r"dataset_path = 's3:.*no such file or folder"):
        windows_of((Folder.at(s3("text-nothing")) / "a.parquet").uri)
    with pytest.raises(ConfigError, match=r"dataset_path = 'nonsense://.*neither pyarrow.fs nor"):
        windows_of("nonsense://bucket/a.parquet")
    if importlib.util.find_spec("adlfs") is None:
        with pytest.raises(ConfigError, match=r"dataset_path = 'az://.*adlfs"):
            windows_of("az://bucket/a.parquet")
    with pytest.raises(ConfigError, match=r"dataset_path = 's3://…': a key in a URI"):
        windows_of("s3://key:secret@bucket/a.parquet")


def test_text_is_read_over_http(tmp_path, http_files):
    split_folder(tmp_path)
    assert seen(windows_of(f"{http_files(tmp_path)}/test-0.parquet?download=1")) == {3}
    with pytest.raises(ConfigError, match=r"dataset_path = 'http://.*"):
        windows_of(f"{http_files(tmp_path)}/nothing.parquet")
