"""A sweep's end by Ctrl-C, SIGTERM or SIGHUP: said at once, and what then goes on with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.messages import ENDS, INTERRUPTED

TELL_SECONDS = 2.0


class Ended(KeyboardInterrupt):
    """The user has ended a sweep; says what there is of it, and what goes on with it."""


# What runs in a command of ours: it may end the process, which is not a user's own program.
in_command = False
driven: Folder | None = None  # the folder of the sweep that this process drives
said = False  # that it is being ended
# Ends what is drawn on the terminal: above a table as high as that nobody sees what is said.
undrawn: Callable[[], None] | None = None


def end_signals() -> None:
    """In a command: an end that leaves time is a Ctrl-C, and what was trained is saved."""
    global in_command
    in_command = True
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background
            signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)  # as `ray job stop` and `kill` send it


def end(number: int, *_: object) -> None:
    say_ending(signal.Signals(number).name)
    raise KeyboardInterrupt


@contextmanager
def lost_without_ray(processes: Mapping[str, Any]) -> Iterator[None]:
    """With processes, by their names, without which nothing goes on: their end is this one's.

    Exit code 1, after one paragraph. Ray would end this process as well, some at once and some
    after a minute, with a word to its own log.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for name, process in processes.items():
                if process.poll() is not None and not over.wait(0.5):
                    lose(name, processes)

    if in_command:
        threading.Thread(target=watch, name="Ray's processes", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def lose(name: str, processes: Mapping[str, Any]) -> None:
    """Ends this process and its Ray, of which one process has died."""
    goes_on = (
        "" if driven is None else f" The sweep goes on with: saeray sweep --resume {driven.uri}"
    )
    print(
        f"\nsaeray: {name}, a process of Ray's own, has died (out of memory?), and nothing "
        f"goes on without it.{goes_on}",
        file=sys.stderr,
        flush=True,
    )
    for process in processes.values():
        with suppress(OSError):
            process.kill()
    os._exit(1)


def say_ending(why: str) -> None:
    """At once: the rest may take as long as a step, an evaluation and a checkpoint."""
    global said
    if driven is None or said:
        return
    said = True
    text = (
        f"\nsaeray: {why}: stopping. What is trained so far is being saved in {driven.uri}, up "
        "to a minute; once more, and it stops at once, with the checkpoints there are."
    )

    def tell() -> None:
        with suppress(OSError):  # the terminal may be what has gone
            if undrawn is not None:
                undrawn()
            print(text, file=sys.stderr, flush=True)

    # This may be a signal's handler, in the middle of a line that this thread prints: what draws
    # might then wait for that line, and this thread for what draws.
    teller = threading.Thread(target=tell, name="the end is said", daemon=True)
    teller.start()
    teller.join(TELL_SECONDS)


@contextmanager
def driving(folder: Folder) -> Iterator[None]:
    """With a sweep that ends when this process does.

    Also at SIGHUP, the end of its terminal, unless that is ignored (`nohup`).

    Raises:
        Ended: in the place of KeyboardInterrupt.
    """
    global driven, said
    driven, said = folder, False
    try:
        with signals_end():
            yield
    except KeyboardInterrupt:
        raise Ended(epitaph(folder)) from None
    finally:
        driven = None


@contextmanager
def signals_end() -> Iterator[None]:
    """With `end` for SIGHUP, and for a Ctrl-C where Python's own handler is still there."""
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        own = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        replaced = {n: handler for n, handler in own.items() if signal.getsignal(n) is handler}
    for number in replaced:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def signals_kept() -> Iterator[None]:
    """With a call that sets a handler of SIGTERM, as `ray.init` does, which would just exit."""
    kept: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and kept is end:
            signal.signal(signal.SIGTERM, kept)


def epitaph(folder: Folder) -> str:
    """What there is of a sweep that was interrupted, and the command that goes on with it."""
    try:
        rows = SweepFolder(folder, folder.name).read_rows()
    except Exception:  # its files may just be where the trouble is
        rows = []
    ended = sum(row["status"] in ENDS and row["status"] != INTERRUPTED for row in rows)
    saved = [
        tokens
        for row in rows
        if row["status"] == INTERRUPTED and (tokens := newest_saved(folder, row["trial"]))
    ]
    parts = [f"{ended} ended"] if ended else []
    if saved:
        parts.append(f"{len(saved)} saved at {min(saved):,} tokens or more")
    there = f"of {len(rows)} SAEs {', '.join(parts)}" if parts else "no SAE is saved yet"
    return f"interrupted; {there}. It goes on with: saeray sweep --resume {folder.uri}"


def newest_saved(folder: Folder, trial: str) -> int:
    """Tokens of the newest checkpoint of an SAE; 0 where it has none."""
    return max((folder / "trials" / trial / "checkpoints").numbers(), default=0)
