"""Text to windows: local files of every kind, BOS, packing, epochs, held-out text."""

import json
import shutil
import time

import datasets
import numpy as np
import pyarrow as pa
import pytest
from support.digits import Digits, parquet, windows_of

from saeray.errors import ConfigError, SaerayError
from saeray.lm.hub import embedding_rows, load_tokenizer
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.messages import SpecialTokens
from saeray.stream.token_server import TokenServer
from saeray.text.tokens import TokenWindows

BOS = 0  # of the bundled model


def test_documents_are_packed_with_bos_at_window_starts_and_between(tmp_path):
    w = windows_of(parquet(tmp_path / "a.parquet", text=["1"] * 9))
    packed = w.pack(iter(np.array(d, dtype=np.int32) for d in ([1, 2], [3, 4, 5, 6, 7], [8])))
    # 0 1 2 | 0 (separator), then 3 4 5 after the next window's BOS, 6 7 after another, 0 8.
    assert [next(packed).tolist() for _ in range(2)] == [[0, 1, 2, 0], [0, 3, 4, 5]]
    w.bos = None
    packed = w.pack(iter(np.array(d, dtype=np.int32) for d in ([1, 2], [3, 4, 5, 6, 7], [8])))
    assert [next(packed).tolist() for _ in range(2)] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_windows_can_be_had_again_and_are_a_function_of_the_seed(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[str(i % 9 + 1) * 5 for i in range(60)])
    one, again, other = windows_of(path), windows_of(path), windows_of(path, seed=1)
    first = one.train(0, 30)
    assert np.array_equal(one.train(7, 3), first[7:10])
    assert np.array_equal(again.train(20, 10), first[20:])  # asked for in another order
    assert not np.array_equal(other.train(0, 30), first)


def test_held_out_documents_are_in_no_epoch(tmp_path):
    # Every document has a digit pair of its own: 11, 12, ... as its fingerprint.
    texts = [f"{a}{b}" for a in range(1, 10) for b in range(1, 10)]
    w = windows_of(parquet(tmp_path / "a.parquet", text=texts), context_size=3, eval_windows=5)
    held_out = {tuple(x[1:]) for x in w.evaluation().tolist()}
    assert len(held_out) == 5
    n_left = len(texts) - w.n_held_out_documents
    trained = [tuple(x[1:]) for x in w.train(0, 3 * n_left).tolist()]
    assert w.epoch >= 2
    assert not held_out & set(trained)
    assert len(set(trained[:n_left])) == n_left  # an epoch has every document once
    assert trained[:n_left] != trained[n_left : 2 * n_left]  # each epoch in another order


@pytest.mark.parametrize("streaming", [None, True])
def test_the_end_of_the_only_document_is_held_out(tmp_path, streaming):
    text = "".join(str(i % 8 + 1) for i in range(4_497)) + "999"  # 4,500 tokens
    path = parquet(tmp_path / "a.parquet", text=[text, "", None])
    w = windows_of(path, streaming=streaming)
    assert w.evaluation().tolist() == [[0, 9, 9, 9]]
    trained = w.train(0, 1_600)
    assert 9 not in trained
    laid = trained[:1_499, 1:].reshape(-1)  # three tokens and a BOS in each window
    assert "".join(map(str, laid.tolist())) == text[:4_497]
    assert w.epoch == 1  # and then from its beginning again


@pytest.mark.parametrize(
    ("texts", "held_out", "first"),
    [
        (["12", "3456"], [[0, 1, 2, 0]], [0, 3, 4, 5]),  # the last window ends with a BOS alone
        (["1", "234567"], [[0, 1, 0, 7]], [0, 2, 3, 4]),
        (["123", "456", "4"], [[0, 1, 2, 3]], [0, 4, 5, 6]),  # there are others to train on
    ],
)
def test_of_the_last_document_only_what_is_needed_is_held_out(tmp_path, texts, held_out, first):
    w = windows_of(parquet(tmp_path / "a.parquet", text=texts), streaming=True, data_seed=1)
    assert w.evaluation().tolist() == held_out
    trained = {tuple(x) for x in w.train(0, 9).tolist()}
    assert tuple(first) in trained
    assert not trained & {tuple(x) for x in held_out}


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("streaming", [None, True])
def test_held_out_and_trained_tokens_never_meet(tmp_path, streaming, prepend_bos):
    class Many(Digits):
        def __len__(self):
            return 10_000

    rng = np.random.default_rng(5)
    for case in range(12):
        # Every token of every document is another one; BOS is 0.
        lengths = rng.integers(0, 40, size=rng.integers(1, 5))
        ids = np.split(np.arange(1, 1 + lengths.sum()), np.cumsum(lengths)[:-1])
        path = parquet(tmp_path / f"{case}.parquet", tokens=[i.tolist() for i in ids])
        changes = dict(streaming=streaming, prepend_bos=prepend_bos, is_dataset_tokenized=True)
        n_windows = int(rng.integers(1, 6))
        try:
            w = windows_of(path, Many(), eval_windows=n_windows, context_size=5, **changes)
        except ConfigError as error:  # too little text
            assert "eval_windows" in str(error) or "empty" in str(error)
            assert lengths.sum() <= 5 * n_windows
            continue
        assert w.evaluation().shape == (n_windows, 5)
        held_out, trained = set(w.evaluation().flat), set(w.train(0, 200).flat)
        assert held_out & trained <= {0}
        assert trained > {0} or not prepend_bos


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("texts", [["123"], ["123", "", None], ["12"], ["1", "2"]])
def test_text_that_is_all_held_out_is_refused_at_the_start(tmp_path, streaming, texts):
    with pytest.raises(ConfigError, match=r"eval_windows = 1: .* takes all of .*a\.parquet"):
        windows_of(parquet(tmp_path / "a.parquet", text=texts), streaming=streaming)


def test_a_new_epoch_is_announced_and_counted(tmp_path):
    said = []
    w = windows_of(parquet(tmp_path / "a.parquet", text=["123"] * 10), warn=said.append)
    w.train(0, 40)
    assert w.epoch == len(said) >= 3
    assert "epoch 2 begins" in said[0]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "arrow", "saved", "folder"])
@pytest.mark.parametrize("streaming", [None, True])
def test_every_kind_of_local_dataset(tmp_path, kind, streaming):
    texts = [f"{i % 9 + 1}" * 3 for i in range(40)]
    if kind == "parquet":
        path = parquet(tmp_path / "a.parquet", text=texts)
    elif kind == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    elif kind == "txt":
        path = tmp_path / "a.txt"
        path.write_text("\n".join(texts))
    elif kind == "arrow":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif kind == "saved":
        if streaming:
            pytest.skip("a saved dataset is memory-mapped; there is nothing to stream")
        path = tmp_path / "saved"
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        parquet(path / "1.parquet", text=texts[:20])
        parquet(path / "2.parquet", text=texts[20:])
    w = windows_of(path, streaming=streaming)
    assert not w.is_tokenized
    got = w.train(0, 60)
    assert got.shape == (60, 4)
    assert (got[:, 0] == 0).all()
    assert set(np.unique(got)) == set(range(10))


def test_tokenised_columns_are_detected_and_their_own_bos_is_not_doubled(tmp_path):
    rows = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]] * 5
    for column in ("tokens", "input_ids"):
        path = parquet(tmp_path / f"{column}.parquet", **{column: rows})
        w = windows_of(path)
        assert w.is_tokenized
        # Each row fills a window of 4, BOS included, so the windows are the rows themselves.
        assert {tuple(x) for x in w.train(0, 14).tolist()} == {tuple(x) for x in rows}
        assert w.evaluation()[0].tolist() in rows


def test_empty_and_odd_rows_are_skipped_and_counted(tmp_path):
    w = windows_of(parquet(tmp_path / "a.parquet", text=["123", "", None, "456"] * 5))
    w.train(0, 10)
    assert w.skipped_rows >= 8


@pytest.mark.parametrize(
    ("columns", "changes", "words"),
    [
        (dict(words=["a"] * 9), {}, "columns are words; one called tokens, input_ids or text"),
        (dict(text=["1"] * 9), dict(is_dataset_tokenized=True), "no tokens or input_ids"),
        (dict(tokens=[[1]] * 9), dict(is_dataset_tokenized=False), "but no text"),
        (dict(text=["1"] * 9), dict(text_column="txt"), "text_column = 'txt'"),
        (dict(text=pa.array([], pa.string())), {}, "empty"),
        (dict(text=["", None]), {}, "empty"),
        (dict(text=["123"] * 3), dict(eval_windows=3), "eval_windows = 3"),
        (dict(tokens=[[1, 2, 77]] * 9), {}, "token id 77, .* vocabulary of 10"),
    ],
)
def test_bad_datasets_are_refused(tmp_path, columns, changes, words):
    path = parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ConfigError, match=words):
        windows_of(path, **changes)


def test_paths_that_are_not_there_or_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no such file or directory"):
        windows_of(tmp_path / "missing.parquet")
    with pytest.raises(ConfigError, match="holds no file that ends in"):
        windows_of(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="can't be read as parquet"):
        windows_of(tmp_path / "bad.parquet")


def test_a_tokenizer_without_bos(tmp_path):
    class NoBos(Digits):
        bos_token_id = None

    path = parquet(tmp_path / "a.parquet", text=["123"] * 9)
    with pytest.raises(ConfigError, match="prepend_bos = True"):
        windows_of(path, NoBos())
    assert windows_of(path, NoBos(), prepend_bos=False).bos is None


def test_eos_in_the_place_of_bos_is_warned_of(tmp_path):
    class OnlyEos(Digits):
        bos_token_id, eos_token_id = None, 7

    path = parquet(tmp_path / "a.parquet", text=["123"] * 9)
    warnings = []
    assert windows_of(path, OnlyEos(), warn=warnings.append).train(0, 1)[0].tolist() == [7, 1, 2, 3]
    (warning,) = warnings
    assert "digits has no BOS token; its EOS token '<7>' (id 7) begins every window" in warning
    windows_of(path, warn=warnings.append)  # one that has BOS
    windows_of(path, OnlyEos(), prepend_bos=False, warn=warnings.append)
    assert len(warnings) == 1


@pytest.mark.parametrize("tokenized", [True, False])
def test_documents_with_tokens_the_model_has_no_embedding_for_are_skipped(tmp_path, tokenized):
    texts = ["123", "129", "456", "181", "999"] * 3
    column = {"tokens": [[int(c) for c in t] for t in texts]} if tokenized else {"text": texts}
    path = parquet(tmp_path / "a.parquet", **column)
    warnings = []
    w = windows_of(path, warn=warnings.append, n_embeddings=8)
    assert w.train(0, 5).max() < 8  # the one held out, and the five that are left
    assert w.skipped_rows == 8  # and a ninth comes after the last window
    named = [text for text in warnings if "skipped" in text]
    assert sorted(n.split("documents with ")[1][:12] for n in named) == [
        "'<8>' (id 8)",
        "'<9>' (id 9)",
    ]
    assert all("digits has embeddings for 8 tokens only" in n for n in named)
    with pytest.raises(ConfigError, match=r"prepend_bos = True: .* \(id 0\) has no embedding"):
        windows_of(path, n_embeddings=0)


def test_a_token_that_was_added_to_the_tokenizer_alone(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny["model_name"], model)
    tokenizer = load_tokenizer(LanguageModelSAERunnerConfig(**tiny))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    texts = ["def f(x):\n    return x\n" * 40, "an <extra> token " * 40] * 8
    path = parquet(tmp_path / "a.parquet", text=texts)
    fields = tiny | dict(model_name=str(model), dataset_path=str(path), eval_windows=1)
    config = resolve(LanguageModelSAERunnerConfig(**fields))
    assert embedding_rows(config) == 4096
    server = TokenServer(config.to_dict())
    assert server.check() == SpecialTokens(0, "<|endoftext|>")
    assert server.block(0).max() < 4096
    counts = server.counts()
    assert counts.skipped_rows > 0
    assert any("'<extra>' (id 4096)" in text for text in counts.warnings)


def test_the_bundled_text_with_the_bundled_tokenizer(tiny):
    config = resolve(LanguageModelSAERunnerConfig(**tiny))
    w = TokenWindows(config, load_tokenizer(config))
    window = w.train(0, 1)[0]
    assert window[0] == BOS
    assert len(w.tokenizer.decode(window[1:].tolist())) > 64


class Shaky:
    """A streamed dataset whose every pass but the last ends too early, one way or another."""

    column_names = ("text",)

    def __init__(self, n_rows, faults):
        self.n_rows, self.faults = n_rows, list(faults)

    def __iter__(self):
        fault = self.faults.pop(0) if self.faults else None
        for i in range(self.n_rows):
            if fault is not None and i == fault[0]:
                if fault[1] == "stall":
                    time.sleep(3)
                raise ConnectionResetError("reset by peer")
            yield {"text": str(i % 9 + 1) * 3}

    def skip(self, n):
        rest = Shaky(self.n_rows - n, self.faults)
        rest.faults = self.faults  # one list for all views of the dataset
        return rest

    def shuffle(self, seed, buffer_size):
        return self


def shaky_windows(monkeypatch, faults, warn=lambda text: None, rows=2000):
    dataset = Shaky(rows, [])
    monkeypatch.setattr("saeray.text.tokens.open_dataset", lambda config: dataset)
    w = windows_of("shaky", warn=warn, wait_limit_s=3.0)  # a stall is noticed after 3 / 6 s
    dataset.faults += faults
    return w


def test_a_source_that_raises_or_stalls_is_tried_again_from_where_it_stopped(monkeypatch):
    calm = shaky_windows(monkeypatch, []).train(0, 1500)
    said = []
    faults = [(600, "raise"), (300, "raise"), (900, "stall")]
    w = shaky_windows(monkeypatch, faults, said.append)
    assert (w.train(0, 1500) == calm).all()
    assert sum("ConnectionResetError" in s for s in said) == 2
    assert sum("nothing came for 0.5 s" in s for s in said) == 1
    assert all("tried again" in s for s in said)


def test_a_source_that_stays_broken_is_given_up_with_its_last_word(monkeypatch):
    w = shaky_windows(monkeypatch, [(600, "raise")] * 9)
    with pytest.raises(SaerayError, match=r"tried 4 times \(shaky.*reset by peer.*--resume"):
        w.train(0, 1500)
