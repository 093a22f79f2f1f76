"""Writes a pack's checkpoints in a thread of its own, while the training goes on.

A checkpoint is of one step: what it is written from was copied there. It counts, by its last file,
only when everything its SAE had reported up to that step is evaluated and written down, since who
goes on from it does not report that again; the thread waits for this first. A process that dies
before has the checkpoint before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saeray.actors import waiting
from saeray.errors import Late
from saeray.files.checkpoint import Taken, delete_others, save_checkpoint
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import SpecialTokens

LOOK_AGAIN_SECONDS = 0.5


def checkpoint_steps(config: LanguageModelSAERunnerConfig) -> set[int]:
    """Steps after which a checkpoint is due: at range(0, total, total // n)[1:] tokens."""
    n, total = config.n_checkpoints, config.training_tokens
    if n == 0:
        return set()
    tokens = range(0, total, max(1, total // n))[1:]
    return {max(1, round(t / config.train_batch_size)) for t in tokens} - {config.steps}


class ToWrite(NamedTuple):
    """One SAE's checkpoint."""

    folder: Folder  # of the SAE's checkpoints
    config: LanguageModelSAERunnerConfig
    state: Taken
    kept: set[int]  # tokens of checkpoints that stay beside it

    @property
    def tokens(self) -> int:
        return self.state.step * self.config.train_batch_size


class CheckpointWriter:
    """One step's checkpoints at a time: their copies are the memory that is planned for."""

    def __init__(
        self, roster: Any, pack: str, limit_s: float, special: SpecialTokens | None
    ) -> None:
        self.roster, self.pack = roster, pack
        self.limit_s = limit_s
        self.special = special
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether it is still at it."""
        return self.thread is not None and self.thread.is_alive()

    def write(self, checkpoints: Sequence[ToWrite], reported: Mapping[str, int]) -> None:
        """Begins with it. Not before `wait` has ended what it was at.

        reported: by SAE, the step of its newest report that may not be written down yet.
        """
        assert self.thread is None
        self.thread = threading.Thread(
            target=self.run,
            args=(list(checkpoints), dict(reported)),
            name="checkpoints",
            daemon=True,
        )
        self.thread.start()

    def wait(self) -> None:
        """Until all is written, once all that was reported is settled; raises what went wrong.

        Raises:
            Late: it was not, within the limit.
        """
        if self.thread is None:
            return
        self.thread.join(timeout=self.limit_s)
        if self.thread.is_alive():
            raise Late(f"checkpoints were not written within {self.limit_s:g} s (wait_limit_s).")
        self.thread = None
        if self.error is not None:
            raise self.error

    # --- the thread -------------------------------------------------------------------------

    def run(self, checkpoints: list[ToWrite], reported: dict[str, int]) -> None:
        try:
            self.until_written_down(reported)
            while checkpoints:
                one = checkpoints.pop(0)  # its copy is gone before the next one is serialised
                save_checkpoint(one.folder / str(one.tokens), one.config, one.state, self.special)
                delete_others(one.folder, one.kept | {one.tokens})
        except BaseException as error:
            self.error = error

    def until_written_down(self, reported: dict[str, int]) -> None:
        """Until the roster, whichever incarnation of it, has kept all these reports.

        One that was started again is told what it lacks by the pack, with its next report.
        """
        while reported:
            answer = waiting.poll(
                lambda: self.roster.settled.remote(self.pack, reported), self.limit_s, "roster"
            )
            if all(answer.settled.get(name, 0) >= step for name, step in reported.items()):
                return
            time.sleep(LOOK_AGAIN_SECONDS)
