"""account.json: what a sweep has cost and what limited it, session by session. No Ray.

A session is what one process has driven of a sweep, from its start or a --resume on. One that was
killed has left no account: what it harvested stands in the next one's, its seconds in none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from saeray.errors import SaerayError
from saeray.files import strict_json
from saeray.files.storage import Folder

FILE = "account.json"


class Session(NamedTuple):
    """One of them. Times are time.time() where it was driven, seconds are wall time."""

    began: float
    ended: float
    start_up_s: float | None  # to the first optimizer step
    training_s: float | None  # from there to the newest report
    trainers_s: Mapping[str, float]  # step, around, waiting: summed over the packs' ranks
    harvesters_s: Mapping[str, float]  # busy, idle: summed over harvesters
    harvested_tokens: int  # computed by the language model, evaluation not counted
    cached_tokens: int  # read from an activation cache instead
    trained_tokens: int  # SAE-tokens
    one_pass_tokens: int  # of one SAE of each stream, in this session
    evaluation_tokens: int
    packs: int
    limit: str | None
    placement: str
    warnings: list[str]

    @property
    def rest_s(self) -> float | None:
        """Evaluation of what ended last, and the end."""
        if self.start_up_s is None or self.training_s is None:
            return None
        return max(0.0, self.ended - self.began - self.start_up_s - self.training_s)


def add_session(folder: Folder, session: Session) -> None:
    """Writes it beside those before it, and in the place of one with the same beginning."""
    before = [s for s in read_sessions(folder) if s.began != session.began]
    sessions = [*before, session]
    text = strict_json.dumps({"sessions": [s._asdict() for s in sessions]}, indent=1)
    folder.write(FILE, text.encode())


def read_sessions(folder: Folder) -> list[Session]:
    """In order; none of a sweep that wrote none, as of before there were any.

    Raises:
        SaerayError: the file is there, and is not what was written.
    """
    if FILE not in folder.names():
        return []
    try:
        sessions = strict_json.loads(folder.read(FILE))["sessions"]
        return [Session(**{name: of.get(name) for name in Session._fields}) for of in sessions]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SaerayError(f"{folder.uri}/{FILE}: damaged ({error!r}).") from None
