"""Checkpoints that are written while the training goes on: of one step, and not too early."""

import threading
from types import SimpleNamespace

import pytest
import torch
from support.configs import short_run

from saeray.actors import waiting
from saeray.cluster.checkpoint_writer import CheckpointWriter, ToWrite
from saeray.cluster.options import options_of
from saeray.errors import Late
from saeray.files.checkpoint import newest_checkpoint, taken
from saeray.files.storage import Folder
from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer
from saeray.spec.messages import Answer

CONFIG, CPU = short_run(), torch.device("cpu")


def trainer():
    sae = initial_sae(4, 16, seed=0, b_dec=torch.zeros(4), dtype=torch.float32)
    return SAETrainer(sae, options_of(CONFIG, CPU, 4))


def step(t):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t.step))
    PackStep().step([t], x)


class Roster:
    """Has settled nothing of the SAE until `until` is set to a step, and then up to that."""

    def __init__(self):
        self.until, self.asked = 0, threading.Event()
        self.settled = SimpleNamespace(remote=self.answer)

    def answer(self, pack, upto):
        assert (pack, upto) == ("pack", {"sae": 2})
        self.asked.set()
        return Answer("incarnation", [], {"sae": self.until})


@pytest.fixture
def roster(monkeypatch):
    monkeypatch.setattr(waiting, "poll", lambda call, *_: call())
    monkeypatch.setattr("saeray.cluster.checkpoint_writer.LOOK_AGAIN_SECONDS", 0.01)
    return Roster()


def writer_at(roster, folder, t, limit=30.0):
    writer = CheckpointWriter(roster, "pack", limit, None)
    writer.write([ToWrite(folder, CONFIG, taken(t), {8})], {"sae": 2})
    return writer


def test_it_is_of_its_step_and_counts_when_its_reports_are_settled(roster, tmp_path):
    folder, t = Folder.at(tmp_path), trainer()
    for tokens in (8, 16):  # the first one is to be kept, the second is passed by
        Folder.at(tmp_path / str(tokens)).write("cfg.json", b"{}")
    step(t)
    step(t)
    step(t)
    at_three = {name: getattr(t.sae, name).clone() for name in PARAMETERS}
    writer = writer_at(roster, folder, t)
    step(t)  # in place
    assert roster.asked.wait(10)
    assert writer.busy
    assert newest_checkpoint(folder)[0] is None
    roster.until = 2
    writer.wait()
    assert not writer.busy
    found, _ = newest_checkpoint(folder)
    again = found.trainer(options_of(CONFIG, CPU, 4), CPU)
    assert again.step == 3
    assert all(torch.equal(getattr(again.sae, n), at_three[n]) for n in PARAMETERS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["24", "8"]
    step(again)
    assert all(torch.equal(getattr(again.sae, n), getattr(t.sae, n)) for n in PARAMETERS)


def test_what_goes_wrong_in_the_thread_is_raised_by_who_waits(roster, tmp_path):
    roster.until = 2
    (tmp_path / "file").write_text("no folder")
    writer = writer_at(roster, Folder.at(tmp_path / "file"), trainer())
    with pytest.raises(OSError, match="file"):
        writer.wait()


def test_one_that_is_never_settled_is_not_waited_for_without_end(roster, tmp_path):
    writer = writer_at(roster, Folder.at(tmp_path), trainer(), limit=0.05)
    with pytest.raises(Late, match=r"wait_limit_s"):
        writer.wait()
    roster.until = 2  # so that its thread ends
    writer.thread.join(10)
