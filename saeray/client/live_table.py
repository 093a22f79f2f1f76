"""What the live view shows, as lines that fit the terminal: the progress is always among them.

Of more SAEs than there is room for it shows those that have failed, those on the frontier so far,
the slowest one and some of the rest, by L0, and counts the others.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from saeray.client.speed import duration, human
from saeray.errors import printable
from saeray.files.frontier import pareto
from saeray.spec.messages import ENDS, FAILED, INTERRUPTED, TRAINING, SAERow, SweepStatus

STYLES = {"failed": "red", "interrupted": "red", "done": "green"}
NARROW, WIDE = 60, 100  # columns
BAR = 20
SHORTEST_FIELD = 3  # cells of a field's name that is cut
MARK = "●"


class Column(NamedTuple):
    """One of the table's columns, beside the name."""

    head: str
    width: int
    cell: Callable[[SAERow], str]
    from_width: int = 0  # of the terminal


def newest(row: SAERow, name: str) -> float | None:
    """A figure of the last batch; of an SAE that has ended, the held-out one."""
    both = row.metrics.get(f"eval/{name}"), row.metrics.get(f"metrics/{name}")
    found, other = both if row.state in ENDS else both[::-1]
    return other if found is None else found


def figure(key: str, form: str) -> Callable[[SAERow], str]:
    def cell(row: SAERow) -> str:
        value = row.metrics.get(key) if "/" in key else newest(row, key)
        return "–" if value is None else format(value, form)

    return cell


def share(row: SAERow) -> str:
    return f"{row.step / row.total_steps:.0%}" if row.total_steps else "–"


COLUMNS = (
    Column("done", 4, share),
    Column("tokens", 6, lambda row: human(row.n_training_tokens), WIDE),
    Column("loss", 9, figure("losses/overall_loss", ".4g"), WIDE),
    Column("L0", 6, figure("l0", ".1f")),
    Column("expl.var", 8, figure("explained_variance", ".3f"), NARROW),
    Column("CE score", 8, figure("eval/CE_loss_score", ".3f")),
    Column("dead", 5, figure("sparsity/below_dead_feature_threshold", "d"), NARROW),
)


def state_of(row: SAERow, phase: str) -> str:
    """What an SAE does, in a word or two: one that a pack has need not train yet."""
    if row.state != TRAINING or row.step > 0:
        return row.state
    if phase.startswith("loading"):
        return "model loads"
    return "waits" if phase.startswith("waiting") else "starts"


def fitted_names(names: Sequence[str], width: int) -> tuple[str, list[str]]:
    """Names of at most `width` cells, different where they were, and what heads them.

    Of `lr=0.001,seed=1` only the values where all have the same fields; what all have in common is
    left out then. Longer ones lose their middle, and get their number where that makes two alike.
    """
    if all(cell_len(name) <= width for name in names):
        return "SAE", list(names)
    parts = [[part.partition("=") for part in name.split(",")] for name in names]
    head, short = "SAE", list(names)
    if len({tuple(key for key, _, _ in of) for of in parts}) == 1:
        telling = [i for i in range(len(parts[0])) if len({of[i][2] for of in parts}) > 1] or list(
            range(len(parts[0]))
        )
        head = fitted_head([parts[0][i][0] for i in telling], width)
        wide = {i: max(cell_len(of[i][2]) for of in parts) for i in telling}
        short = [" ".join(f"{of[i][2]:<{wide[i]}}" for i in telling).rstrip() for of in parts]
        if max(map(cell_len, short)) > width:
            short = [" ".join(of[i][2] for i in telling) for of in parts]
    else:
        common = set.intersection(*({"".join(part) for part in of} for of in parts))
        texts = [["".join(part) for part in of] for of in parts]
        short = [",".join(t for t in of if t not in common) or "the base" for of in texts]
    cut = [in_the_middle(name, width) for name in short]
    if len(set(cut)) < len(set(names)):
        digits = len(str(len(names)))
        room = width - digits - 2
        cut = [f"#{i:<{digits}} {in_the_middle(n, room)}" for i, n in enumerate(short, start=1)]
    return in_the_middle(head, width), cut


def fitted_head(fields: Sequence[str], width: int) -> str:
    """The fields' names in `width` cells, if they fit: the longest lose their ends."""
    wide = max(map(cell_len, fields))
    while wide > SHORTEST_FIELD and sum(min(wide, cell_len(f)) + 1 for f in fields) - 1 > width:
        wide -= 1
    return " ".join(in_the_end(field, wide) for field in fields)


def in_the_middle(text: str, width: int) -> str:
    """Text of at most `width` cells; a longer one loses its middle."""
    if cell_len(text) <= width:
        return text
    end = max(0, (width - 1) // 2)
    return set_cell_size(text, max(0, width - 1 - end)) + "…" + text[len(text) - end :]


def on_frontier(rows: Sequence[SAERow]) -> set[str]:
    """Those that no sparser one beats in explained variance so far."""
    known, points = [], []
    for row in rows:
        l0, explained = newest(row, "l0"), newest(row, "explained_variance")
        if row.state != FAILED and l0 is not None and explained is not None:
            known.append(row.name)
            points.append((l0, -explained))
    return {name for name, on in zip(known, pareto(points), strict=True) if on}


def l0_of(row: SAERow) -> float:
    value = newest(row, "l0")
    return float("inf") if value is None else float(value)


def chosen(rows: Sequence[SAERow], room: int) -> list[SAERow]:
    """At most `room` rows: all in their order, or the interesting ones, failed first, by L0."""
    if len(rows) <= room:
        return list(rows)
    broken = [r for r in rows if r.state in (FAILED, INTERRUPTED)]
    best = on_frontier(rows)
    running = [r for r in rows if r.state not in ENDS and r.total_steps]
    slowest = min(running, key=lambda r: r.step / r.total_steps, default=None)
    by_l0 = sorted(rows, key=l0_of)
    taken = {r.name: r for r in evenly(broken, max(1, room // 3))}
    taken |= {r.name: r for r in evenly([r for r in by_l0 if r.name in best], room // 2)}
    if slowest is not None and len(taken) < room:
        taken[slowest.name] = slowest
    rest = [r for r in by_l0 if r.name not in taken]
    taken |= {r.name: r for r in evenly(rest, room - len(taken))}
    shown = sorted(taken.values(), key=lambda r: (r.state not in (FAILED, INTERRUPTED), l0_of(r)))
    return shown[:room]


def evenly(rows: Sequence[SAERow], n: int) -> list[SAERow]:
    """n of the rows, from the first to the last."""
    if n <= 0 or len(rows) <= n:
        return list(rows) if n > 0 else []
    return [rows[round(i * (len(rows) - 1) / max(1, n - 1))] for i in range(n)]


def counted(rows: Sequence[SAERow], phase: str) -> str:
    """`6 SAEs: 2 done, 4 training`."""
    states = Counter(state_of(r, phase) for r in rows)
    words = ", ".join(f"{n} {state}" for state, n in states.items())
    return f"{len(rows)} SAE{'s' * (len(rows) != 1)}" + (f": {words}" if rows else "")


def table(status: SweepStatus, width: int, room: int) -> list[Text]:
    """At most `room` lines: a head, rows, and how many more there are."""
    rows = status.rows
    folds = len(rows) > room - 1
    shown = chosen(rows, room - 2 if folds else len(rows))
    columns = [c for c in COLUMNS if width >= c.from_width]
    state = max([5, *(cell_len(state_of(r, status.phase)) for r in rows)])
    others = state + sum(c.width + 1 for c in columns) + 1 + len(MARK) + 1
    longest = max([3, *(cell_len(printable(r.name)) for r in rows)])
    room_for_names = max(6, min(longest, width - 1 - others))
    all_names = [printable(r.name) for r in rows]
    head, names = fitted_names(all_names, room_for_names)
    short = dict(zip((r.name for r in rows), names, strict=True))
    best = on_frontier(rows)
    wide = max([cell_len(head), *(cell_len(n) for n in names)])

    def line(name: str, mark: str, word: str, cells: Sequence[str], style: str = "") -> Text:
        text = Text(f"{mark} {set_cell_size(name, min(wide, room_for_names))} ")
        text.append(f"{word:<{state}}", style)
        text.append("".join(f" {cell:>{c.width}}" for cell, c in zip(cells, columns, strict=True)))
        return text

    lines = [line(head, " ", "state", [c.head for c in columns])]
    lines[0].stylize("bold")
    for r in shown:
        cells = [c.cell(r) for c in columns]
        mark = MARK if r.name in best else " "
        lines.append(line(short[r.name], mark, state_of(r, status.phase), cells, style(r)))
    if folds:
        names_shown = {r.name for r in shown}
        left = [r for r in rows if r.name not in names_shown]
        lines.append(
            Text(f"  … and {counted(left, status.phase)} ({MARK}: frontier so far)", "dim")
        )
    return lines


def style(row: SAERow) -> str:
    return STYLES.get(row.state, "")


def progress(status: SweepStatus, left: float | None) -> str:
    """The line that is always there."""
    total = sum(r.total_steps for r in status.rows)
    ended = sum(r.total_steps if r.state in ENDS else r.step for r in status.rows)
    part = ended / total if total else 0.0
    full = round(BAR * part)
    line = f"{'━' * full}{'╌' * (BAR - full)} {part:.0%}"
    return line if left is None else f"{line} · {duration(left)} left"


def lines_of(
    status: SweepStatus,
    summary: Sequence[str],
    left: float | None,
    elapsed: float,
    width: int,
    height: int,
) -> list[Text]:
    """The whole view: at most `height` lines of at most `width` cells.

    summary: parts of what is said of the whole sweep; left: seconds, if that is known.
    """
    head = f"{status.phase} · {duration(elapsed)} · {counted(status.rows, status.phase)}"
    if status.error:
        said = [
            Text(head),
            *(Text(t, "red") for t in wrapped(printable(status.error), width, height)),
        ]
        return cropped(said, width, height)
    below = [Text(progress(status, left), "bold")]
    below += [Text(t) for t in wrapped(" · ".join(summary), width, 2)]
    spare = height - len(below) - 1  # beside the head
    notes = [Text(t, "yellow") for w in status.warnings[-3:] for t in wrapped(f"! {w}", width, 2)]
    notes = notes[: max(0, spare - 6)]
    spare -= len(notes)
    about = wrapped(status.placement, width, 2 if height >= 30 else 1) if spare > 8 else []
    spare -= len(about)
    rows = table(status, width, spare) if spare >= 3 and status.rows else []
    above = [Text(head), *(Text(t, "dim") for t in about)]
    top = [*above, *rows, *notes][: max(0, height - len(below))]
    return cropped([*top, *below], width, height)


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Text in at most so many lines; the last one says by … that there would be more."""
    lines = textwrap.wrap(text, max(10, width - 1), break_on_hyphens=False)
    if len(lines) > most:
        lines = [*lines[: most - 1], in_the_end(lines[most - 1] + " …", width - 1)]
    return lines


def in_the_end(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…"


def cropped(lines: Sequence[Text], width: int, height: int) -> list[Text]:
    for line in lines:
        line.truncate(width - 1, overflow="ellipsis")
    return list(lines[:height])
