"""Rows in their order: the shuffle buffer's bounds, and patience with a source."""

import io
import time

import numpy as np
import pytest
from support.digits import parquet, windows_of

from saeray.errors import ConfigError
from saeray.text import rows
from saeray.text.columns import Masked
from saeray.text.read_bytes import Counted
from saeray.text.rows import bytes_of, compact, restored, shuffled


def test_the_order_of_a_stream_is_this_one_for_ever():
    # A permutation of each full buffer of 4, half of which is given; of what is left in the end.
    assert list(shuffled(range(10), seed=0, n_rows=4)) == [2, 0, 5, 4, 1, 7, 3, 8, 9, 6]
    assert list(shuffled(range(3), seed=0, n_rows=4)) == [2, 0, 1]
    assert sorted(shuffled(range(1000), seed=1, n_rows=32)) == list(range(1000))


def test_the_order_is_that_of_datasets_which_it_was_before():
    import datasets

    if tuple(map(int, datasets.__version__.split(".")[:2])) < (5, 2):
        pytest.skip("an earlier version of datasets has another order")
    rows = datasets.IterableDataset.from_generator(lambda: ({"i": i} for i in range(100)))
    theirs = [row["i"] for row in rows.shuffle(7, buffer_size=16)]
    assert list(shuffled(range(100), seed=7, n_rows=16)) == theirs


@pytest.mark.parametrize(("text", "most"), [("1", 16), ("1234567890", 10)])
def test_the_buffer_is_bounded_in_rows_and_in_bytes(text, most):
    read = 0

    def source():
        nonlocal read
        for i in range(200):
            read += 1
            yield f"{text}{i:03}"  # 4 bytes, or 13

    held = [
        read - given for given, _ in enumerate(shuffled(source(), seed=3, n_rows=16, n_bytes=130))
    ]
    assert max(held) == most
    assert len(held) == 200


@pytest.mark.parametrize(
    ("row", "n_bytes"),
    [("aé€", 6), ("\ud800", 3), ([1, 2, 3], 24), ([[1, 2]], 16), (Masked([1, 9], [1, 0]), 32)],
)
def test_a_held_row_has_a_size_that_does_not_depend_on_python(row, n_bytes):
    assert bytes_of(compact(row)) == n_bytes
    back = restored(compact(row))
    if isinstance(row, str):
        assert back == row
    else:
        assert np.array_equal(np.asarray(back), np.asarray(row).squeeze())


def test_odd_rows_go_through_the_buffer_as_they_are():
    rows = [None, 3, {"a": 1}, [1.5], ["a"], b"a"]
    assert sorted(map(repr, shuffled(rows, seed=0))) == sorted(map(repr, rows))


class Steady:
    """A stream that gives ten rows each hundredth of a second."""

    column_names = ("text",)

    def __init__(self, n_rows):
        self.n_rows = n_rows

    def __iter__(self):
        for i in range(self.n_rows):
            if i % 10 == 0:
                time.sleep(0.01)
            yield {"text": str(i % 9 + 1) * 3}


def steady_windows(monkeypatch, n_rows=600, **changes):
    monkeypatch.setattr("saeray.text.tokens.open_dataset", lambda config: Steady(n_rows))
    return windows_of("steady", wait_limit_s=1.2, **changes)  # a stall is one of 0.2 s


def test_a_slow_but_steady_source_is_no_stall(monkeypatch):
    said = []
    monkeypatch.setattr(rows, "LOOK_SECONDS", 0.01)
    w = steady_windows(monkeypatch, warn=said.append)
    # 256 rows to a batch are 0.26 s, and the shuffle buffer takes all 600: 0.6 s.
    assert w.train(0, 500).shape == (500, 4)
    assert said == []


def test_one_who_asks_within_a_time_learns_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(rows, "LOOK_SECONDS", 0.01)
    w = steady_windows(monkeypatch)
    seen = []
    while (windows := w.train_within(0.1, 0, 500)) is None:
        seen.append(w.progress)
    assert len(seen) > 2
    assert seen == sorted(set(seen))
    assert (windows == steady_windows(monkeypatch).train(0, 500)).all()


class Fetching(Steady):
    """A stream whose bytes come in long before its first row."""

    def __iter__(self):
        for _ in range(30):
            time.sleep(0.01)
            Counted(io.BytesIO(b"123")).read()
        yield from super().__iter__()


def test_bytes_that_come_in_are_a_sign_of_life(monkeypatch):
    said = []
    monkeypatch.setattr(rows, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr("saeray.text.tokens.open_dataset", lambda config: Fetching(40))
    w = windows_of("fetching", wait_limit_s=1.2, warn=said.append)
    w.train(0, 5)
    assert said == []


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_what_a_stream_reads_is_counted(tmp_path, kind):
    if kind == "parquet":
        path = parquet(tmp_path / "a.parquet", text=["123"] * 2_000)
    else:
        path = tmp_path / f"a.{kind}"
        path.write_text({"jsonl": '{"text": "123"}\n', "txt": "123\n"}[kind] * 2_000)
    w = windows_of(path, streaming=True)
    before = w.rows.progress - w.rows.seen
    w.train(0, 1)
    assert w.rows.progress - w.rows.seen >= before + path.stat().st_size / 2


def test_a_source_that_broke_may_be_asked_again(monkeypatch):
    w = steady_windows(monkeypatch)
    calm = w.train(0, 20)
    w.makers.clear()
    w.store.segments.clear()
    monkeypatch.setattr(w.rows, "training", lambda *_: iter([["", ""]]))
    with pytest.raises(ConfigError, match="no document with text is left"):
        w.train(0, 20)
    monkeypatch.undo()
    assert (w.train(0, 20) == calm).all()
