"""The token server's answers, without Ray: blocks, patience with a slow source, a restart."""

import asyncio
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from support.digits import Digits, config_of, parquet

from saeray.actors import waiting
from saeray.actors.waiting import NotYet
from saeray.errors import Late
from saeray.spec.order import StreamOrder
from saeray.stream import token_server
from saeray.stream.buffer import ActivationBuffer
from saeray.stream.harvester_pool import HarvesterPool
from saeray.stream.token_server import TokenBlock, TokenServer


def server(path):
    return TokenServer(config_of(path, store_batch_size=2).to_dict())


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    monkeypatch.setattr(token_server, "load_tokenizer", lambda config: Digits())
    monkeypatch.setattr(token_server, "embedding_rows", lambda config: None)


def pool_of(server):
    """A pool without harvesters, on a server that need not be an actor."""

    async def block(*arguments):
        return server.block(*arguments)

    return HarvesterPool(
        SimpleNamespace(block=SimpleNamespace(remote=block)),
        [], 1, None, [], do=None, warn=None, up_again=None,
    )  # fmt: skip


def tokens_of(pool, block):
    return asyncio.run(pool.tokens(block, partial(pool.waits, block, 0.0)))


def test_a_restarted_server_is_told_where_the_text_is(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=[str(i % 9 + 1) * (i % 7) for i in range(900)])
    one = server(path)
    pool = pool_of(one)
    got = [tokens_of(pool, b) for b in range(300)]
    assert list(pool.places) == [64, 128, 192, 256]
    assert pool.places[256].window == 512
    again = server(path)
    pool.token_server = pool_of(again).token_server
    assert np.array_equal(tokens_of(pool, 299), got[299])
    # Only what lies behind the last place was made: block 256 and the following.
    assert again.windows.n_made == (300 - 256) * 2
    assert np.array_equal(tokens_of(pool, 70), got[70])
    assert again.windows.n_made == (300 - 256) * 2 + (71 - 64) * 2


def test_a_server_that_is_at_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(token_server, "AT_ONCE_SECONDS", 0.0)
    path = parquet(tmp_path / "a.parquet", text=["123"] * 900)
    one = server(path)
    answers = [one.block(5)]
    while isinstance(answers[-1], NotYet):
        answers.append(one.block(5))
    progress = [a.progress for a in answers[:-1]]
    assert progress == list(range(progress[0], progress[0] + 12))  # a window each time
    assert f"the token server (0 rows have come from {path})" == answers[0].late
    assert answers[-1].tolist() == [[0, 1, 2, 3]] * 2
    # And a pool asks until it has them.
    pool = pool_of(server(path))
    pool.under_way[5] = ("the token server", 0.0)
    assert tokens_of(pool, 5).tolist() == [[0, 1, 2, 3]] * 2
    assert pool.text_progress >= progress[-1]
    assert "rows have come from" in pool.under_way[5][0]


def test_a_wait_goes_on_as_long_as_there_is_progress(monkeypatch):
    monkeypatch.setattr(waiting, "ask", lambda call, limit, who: call())
    answers = [NotYet("the source", progress=i) for i in range(8)]

    def call():
        time.sleep(0.05)
        return answers.pop(0) if answers else "done"

    assert waiting.poll(call, 0.15, "buffer") == "done"
    answers += [NotYet("the source", progress=3)] * 8
    with pytest.raises(Late, match=r"nothing came from the source for 0\.15 s"):
        waiting.poll(call, 0.15, "buffer")


def test_a_block_now_and_then_says_where_the_next_one_begins(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["123"] * 900)
    one = server(path)
    plain, told = one.block(62), one.block(63)
    assert isinstance(plain, np.ndarray)
    assert isinstance(told, TokenBlock)
    assert told.next_at.window == 128
    assert told.next_at.near.row == 128  # a document fills a window


def test_only_a_wait_for_the_token_server_goes_on_with_its_progress():
    order = StreamOrder(n_blocks=8, block_rows=32, group_blocks=2, seed=0)
    buffer = ActivationBuffer(order, 6, ["hook"], None, [])
    buffer.pool.text_progress = 7
    buffer.pool.under_way[1] = ("the token server (20 rows have come from a.txt)", time.monotonic())
    assert buffer.not_yet(range(2)).progress == 7
    assert buffer.not_yet(range(2)).late.startswith("the token server (20 rows have come from")
    buffer.pool.under_way[1] = ("harvester 0", time.monotonic())
    assert buffer.not_yet(range(2)).progress == 0
