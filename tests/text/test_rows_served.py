"""Rows that are left out, and the windows of each block: by hand, by counting, after a restart."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.digits import Digits, config_of, parquet, windows_of

from saeray.errors import ConfigError
from saeray.stream import token_server
from saeray.stream.token_server import TokenBlock, TokenServer
from saeray.text.served import Blocks, ServedRows, excluded_ids
from saeray.text.tokens import Position

WINDOWS = np.array(
    [[0, 1, 2, 3], [0, 4, 0, 5], [0, 6, 7, 0], [0, 0, 8, 9], [0, 1, 2, 3], [0, 4, 5, 6]], np.int32
)


class Given:
    """These windows, in the place of a `TokenWindows`."""

    tokenizer = Digits()

    def __init__(self, **changes):
        self.config = config_of("d", **changes)

    def evaluation(self):
        return WINDOWS[:1]

    def train_within(self, seconds, first, n, near=None):
        return WINDOWS[first : first + n]

    def nearest(self, window):
        return Position(window)


def blocks_of(windows):
    return Blocks(windows, ServedRows.of(windows))


def served_ids(windows, block, blocks):
    tokens = blocks.within(1.0, block)
    served = ServedRows.of(windows)
    return tokens.ravel()[served.of_block(tokens)].tolist()


def test_a_block_takes_whole_windows_until_it_has_its_rows():
    windows = Given(store_batch_size=2, exclude_special_tokens=True)
    assert windows.config.block_rows == 4  # (2 - 1) contexts of 4
    blocks = blocks_of(windows)
    # 1 2 3 of the first window, 4 of the second, whose 5 is left out; then 6 7 and 8 9.
    assert served_ids(windows, 0, blocks) == [1, 2, 3, 4]
    assert served_ids(windows, 1, blocks) == [6, 7, 8, 9]
    assert served_ids(windows, 2, blocks) == [1, 2, 3, 4]
    assert blocks.starts == {0: 0, 1: 2, 2: 4, 3: 6}
    # Whichever is asked for first.
    assert served_ids(windows, 2, blocks_of(windows)) == [1, 2, 3, 4]


def test_a_slice_takes_the_same_positions_of_each_window():
    windows = Given(store_batch_size=2, context_slice=[1, 2])
    blocks = blocks_of(windows)
    assert served_ids(windows, 0, blocks) == [1, 2, 4, 0]
    assert served_ids(windows, 2, blocks) == [1, 2, 4, 5]
    both = Given(store_batch_size=3, context_slice=[1, -2], exclude_special_tokens=[0, "<7>"])
    # (3 - 1) contexts of 2: 1 2 of the first window, 4, 6, and of the fourth 8: one more than 4.
    assert served_ids(both, 0, blocks_of(both)) == [1, 2, 4, 6]


def test_the_rows_of_a_real_text_are_those_that_counting_gives(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[str(i % 9 + 1) * (i % 5) for i in range(400)])
    windows = windows_of(path, store_batch_size=3, exclude_special_tokens=True)
    blocks, served = blocks_of(windows), ServedRows.of(windows)
    every = windows_of(path).train(0, 400)
    first = 0
    for block in range(40):
        counted = np.cumsum((every[first:] != 0).sum(axis=1))
        n = int(np.searchsorted(counted, 8)) + 1  # (3 - 1) contexts of 4
        tokens = blocks.within(9.0, block)
        assert np.array_equal(tokens, every[first : first + n])
        rows = tokens.ravel()[served.of_block(tokens)]
        assert len(rows) == 8 and 0 not in rows
        first += n


def test_a_restarted_server_counts_from_the_last_place(tmp_path, monkeypatch):
    monkeypatch.setattr(token_server, "load_tokenizer", lambda config: Digits())
    monkeypatch.setattr(token_server, "embedding_rows", lambda config: None)
    path = parquet(tmp_path / "a.parquet", text=[str(i % 9 + 1) * (i % 5) for i in range(900)])
    config = config_of(path, store_batch_size=3, exclude_special_tokens=True).to_dict()
    one = TokenServer(config)
    assert one.check() == (0, "<0>", (0,))
    got = [one.block(b) for b in range(150)]
    assert [b for b, answer in enumerate(got) if isinstance(answer, TokenBlock)] == [63, 127]
    place = got[127].next_at
    assert place.block == 128 and place.window > 128 * 3
    again = TokenServer(config)
    assert np.array_equal(again.block(149, place), got[149])
    assert again.windows.n_made < 150 * 5 - place.window
    # And one that nobody has told counts from the beginning, a bit at each call.
    monkeypatch.setattr(token_server, "AT_ONCE_SECONDS", 0.0)
    alone, calls = TokenServer(config), 1
    while not isinstance(answer := alone.block(149), np.ndarray):
        calls += 1
    assert np.array_equal(answer, got[149])
    assert calls > 100


def test_ids_and_names_of_special_tokens():
    def ids(wanted, tokenizer):
        return excluded_ids(config_of("d", exclude_special_tokens=wanted), tokenizer)

    sae_lens_would = SimpleNamespace(bos_token_id=5, eos_token_id=2, pad_token_id=2)
    assert ids(True, sae_lens_would) == (2, 5)
    assert ids(False, sae_lens_would) == ()
    assert ids([7, "<3>", "<7>"], Digits()) == (3, 7)
    with pytest.raises(ConfigError, match=r"exclude_special_tokens = True: .* has no BOS"):
        ids(True, SimpleNamespace())
    with pytest.raises(ConfigError, match="= 10: digits has a vocabulary of 10"):
        ids([10], Digits())
    with pytest.raises(ConfigError, match="= '<pad>': digits has no such token"):
        ids(["<pad>"], Digits())


def test_a_text_of_which_nothing_is_left_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["12"] + ["1" * 4_000] * 4)
    with pytest.raises(ConfigError, match="all 4 rows of the held-out windows are left out"):
        ServedRows.of(windows_of(path, exclude_special_tokens=[0, 1, 2]))
    windows = windows_of(path, store_batch_size=2, exclude_special_tokens=[0, 1], seed=1)
    blocks = Blocks(windows, ServedRows(windows.config, (0, 1)))
    with pytest.raises(ConfigError, match=r"\[0, 1\]: of 800 tokens .* from window 0 on, only"):
        blocks.within(9.0, 0)
