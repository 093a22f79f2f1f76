"""The live view on a terminal of a certain size, as an emulator shows it; in a notebook."""

import sys
import time

import pyte
import pytest
from rich.console import Console, ConsoleDimensions

from saeray.client import ending
from saeray.client.live import LiveView
from saeray.client.notebook import Output
from saeray.files.storage import Folder
from saeray.spec.messages import DONE, FAILED, TRAINING, SAERow, SweepStatus


def grid(n):
    """A sweep of n SAEs: the sparser, the worse; the 7th of 10 or more has failed."""
    rows = []
    for i in range(n):
        l0 = 10.0 * 1.05**i
        metrics = {
            "metrics/l0": l0, "metrics/explained_variance": 1 - 5 / l0, "losses/overall_loss": 0.1,
            "eval/CE_loss_score": 1 - 3 / l0, "sparsity/below_dead_feature_threshold": i,
        }  # fmt: skip
        name = f"expansion_factor=16,l1_coefficient={0.01 / 1.05**i:.3g},lr=0.0004,seed={i % 3}"
        rows.append(SAERow(name, TRAINING, 50, 100, 50_000, metrics))
    if n >= 10:
        rows[6].state, rows[6].error = FAILED, "the loss is nan"
    return SweepStatus(
        rows, "training", harvested_tokens=60_000, trained_tokens=50_000 * n,
        warnings=["wandb is not installed"], placement="1 harvester, packs of up to 30 SAEs",
    )  # fmt: skip


class Terminal:
    """An emulator that a console writes to."""

    def __init__(self, columns, lines):
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.Stream(self.screen)
        self.console = Console(
            file=self, force_terminal=True, width=columns, height=lines, color_system=None,
            legacy_windows=False, _environ={},
        )  # fmt: skip

    def write(self, text):
        self.stream.feed(text.replace("\n", "\r\n"))  # as a terminal's driver does

    def flush(self):
        pass

    def isatty(self):
        return True

    def resize(self, columns, lines):
        self.screen.resize(lines, columns)
        self.console.size = ConsoleDimensions(columns, lines)

    @property
    def shown(self):
        return [line.rstrip() for line in self.screen.display if line.strip()]


def seen(terminal, status):
    """What is on it after some looks."""
    view = LiveView(lambda: status, live=True, console=terminal.console)
    with view.on_screen() as live:
        for _ in range(3):
            view.refresh(live)
    return terminal.shown


def test_that_it_is_being_ended_stands_below_a_table_as_high_as_the_terminal(monkeypatch, tmp_path):
    terminal = Terminal(80, 24)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(ending, "driven", Folder.at(tmp_path))
    monkeypatch.setattr(ending, "said", False)
    with LiveView(lambda: grid(30), live=True, console=terminal.console):
        deadline = time.monotonic() + 20
        while not any("╌ 5" in line for line in terminal.shown):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ending.say_ending("SIGINT")
        time.sleep(1.5)  # a look later
        below = "".join(terminal.shown[-5:])
    assert "saeray: SIGINT: stopping." in below and "it stops at once" in terminal.shown[-1]
    assert ending.undrawn is None


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("n", [6, 30, 200])
def test_the_progress_is_always_there_and_names_are_different(n, columns):
    shown = seen(Terminal(columns, 24), grid(n))
    assert len(shown) <= 24
    assert sum("╌ 50%" in line or "╌ 52%" in line for line in shown[-3:]) == 1
    assert f"{n} SAE" in shown[0]
    assert any("wandb is not installed" in line for line in shown)
    rows = [line for line in shown if " training " in line or " failed " in line]
    rows = [line for line in rows if "SAEs" not in line]
    assert len({line.split(" training ")[0] for line in rows}) == len(rows)
    assert max(map(len, shown)) < columns
    if n == 6:
        assert len(rows) == 6
        assert not any("… and" in line for line in shown)
    else:
        assert len(rows) >= 10
        assert "failed" in rows[0]  # first, whatever else there is no room for
        (fold,) = [line for line in shown if "… and" in line]
        assert f"… and {n - len(rows)} SAEs: {n - len(rows)} training" in fold
        assert rows[1].startswith("●")


def test_it_survives_a_terminal_that_changes_its_size():
    terminal, status = Terminal(200, 50), grid(30)
    view = LiveView(lambda: status, live=True, console=terminal.console)
    with view.on_screen() as live:
        for columns, lines in ((200, 50), (80, 24), (120, 30), (40, 6), (200, 24)):
            terminal.resize(columns, lines)
            view.refresh(live)
            view.refresh(live)
            # Once, and nothing of another size beside it.
            assert sum("╌" in line for line in terminal.shown) == 1
            assert sum(line.startswith("training ·") for line in terminal.shown) == 1
    assert sum("╌" in line for line in terminal.shown) == 1


def test_what_others_print_meanwhile_stands_above_it():
    terminal, status = Terminal(80, 24), grid(6)
    view = LiveView(lambda: status, live=True, console=terminal.console)
    with view.on_screen() as live:
        view.refresh(live)
        print("from elsewhere")
        view.refresh(live)
        assert terminal.shown[0] == "from elsewhere"
        assert terminal.shown[1].startswith("training")


def test_a_last_look_is_drawn_when_it_is_over():
    terminal, status = Terminal(80, 24), grid(6)
    view = LiveView(lambda: status, live=True, console=terminal.console)
    with view:  # from its own thread
        for row in status.rows:
            row.state, row.step = DONE, 100
    assert "6 SAEs: 6 done" in terminal.shown[0]
    assert any("100%" in line for line in terminal.shown)


def test_in_a_notebook_one_output_is_written_anew():
    class Handle:
        def __init__(self):
            self.shown = []

        def update(self, data, raw):
            assert raw
            self.shown.append(data)

    handle, begun = Handle(), []

    def display(data, raw, display_id):
        begun.append(data)
        assert raw and display_id
        return handle

    status = grid(6)
    status.rows[0].name = "lr=<script>"
    view = LiveView(lambda: status, live=True)
    view.output = Output(display)
    with view:
        pass
    assert len(begun) == 1
    assert "6 SAEs: 6 training" in handle.shown[-1]["text/plain"]
    assert "lr=&lt;script&gt;" in handle.shown[-1]["text/html"]
    assert Output.wanted() is None  # no notebook here
