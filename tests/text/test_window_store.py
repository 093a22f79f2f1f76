"""Windows are kept in bounded space, and those that went are made again as they were."""

import os

import numpy as np
import pytest
from support.digits import Digits, parquet, windows_of

from saeray.text import window_store
from saeray.text.window_store import WindowStore

WINDOW = 16  # bytes: 4 tokens


@pytest.fixture
def small(monkeypatch):
    """Segments of 8 windows, of which 4 are kept."""
    monkeypatch.setattr(window_store, "SEGMENT_BYTES", 8 * WINDOW)
    monkeypatch.setattr(window_store, "KEEP_BYTES", 4 * 8 * WINDOW)


class Counting(Digits):
    n_texts = 0

    def __call__(self, texts, **options):
        self.n_texts += len(texts)
        return super().__call__(texts, **options)


TEXTS = [str(i % 9 + 1) * (i % 7) for i in range(900)]


def file_bytes(w):
    return os.fstat(w.store.file.fileno()).st_size


@pytest.mark.parametrize("streaming", [None, True])
def test_the_file_does_not_grow_and_all_windows_can_be_had_again(tmp_path, small, streaming):
    path = parquet(tmp_path / "a.parquet", text=TEXTS)
    w = windows_of(path, streaming=streaming)
    first = w.train(0, 2000)  # over several epochs
    assert w.epoch >= 1
    assert file_bytes(w) <= window_store.KEEP_BYTES
    skipped, epoch = w.skipped_rows, w.epoch
    for at in (0, 1000, 3, 1990, 700, 701, 12):  # far ahead, far back, near
        assert np.array_equal(w.train(at, 10), first[at : at + 10])
    assert len(w.makers) <= 2
    assert file_bytes(w) <= window_store.KEEP_BYTES
    assert (w.skipped_rows, w.epoch) == (skipped, epoch)  # nothing is counted twice


def test_two_who_read_far_apart_do_not_undo_each_others_work(tmp_path, small):
    tokenizer = Counting()
    w = windows_of(parquet(tmp_path / "a.parquet", text=TEXTS), tokenizer)
    w.train(0, 1000)
    before = tokenizer.n_texts
    for i in range(100):
        w.train(1000 + i, 1)
        w.train(i, 1)
    # About a document a window, for each of the two, in batches of 256.
    assert tokenizer.n_texts - before < 4 * 256


@pytest.mark.parametrize("streaming", [None, True])
def test_a_new_one_goes_on_where_an_earlier_one_was(tmp_path, streaming):
    path = parquet(tmp_path / "a.parquet", text=TEXTS)
    w = windows_of(path, streaming=streaming)
    w.train(0, 1700)
    tokenizer = Counting()
    again = windows_of(path, tokenizer, streaming=streaming)
    for_held_out = tokenizer.n_texts
    near, skipped = w.nearest(1700), w.skipped_rows
    assert near.window == 1700
    got = again.train_within(None, 1700, 20, near)
    assert np.array_equal(got, w.train(1700, 20))
    assert tokenizer.n_texts - for_held_out <= 256  # a batch; not the 1,700 texts before
    assert again.skipped_rows == w.skipped_rows >= skipped
    assert again.epoch == w.epoch == 1


def test_a_full_disk_costs_windows_and_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(window_store, "SEGMENT_BYTES", 2 * WINDOW)
    store = WindowStore(4, str(tmp_path))
    write = os.pwrite

    def pwrite(file, data, at):
        if at >= 4 * WINDOW:
            raise OSError(28, "No space left on device")
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for i in range(9):
        store.add(i, np.full(4, i, dtype=np.int32))
        assert store.read(i).tolist() == [i] * 4
    assert [i for i in range(9) if store.has(i)] == [6, 7, 8]


def test_the_file_is_where_there_is_room(monkeypatch):
    free = {"/var/tmp": 2**40, "/small": 2**20}

    class Usage:
        def __init__(self, folder):
            self.free = free.get(folder, 2**10)

    monkeypatch.setattr(window_store.shutil, "disk_usage", Usage)
    monkeypatch.setattr(window_store.tempfile, "gettempdir", lambda: "/small")
    assert window_store.roomiest() == "/var/tmp"
    free["/small"] = 2**33
    assert window_store.roomiest() == "/small"
