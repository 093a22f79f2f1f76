"""The frontier: who is on it, and who is chosen from it."""

import random

import pytest

from saeray.errors import ConfigError, SaerayError
from saeray.files.frontier import best, marks, on_frontier, pareto


def row(l0, fvu, ce=None, status="done", **fields):
    ev = None if fvu is None else 1 - fvu
    return dict(
        trial=f"l0={l0}", status=status, l0=l0, explained_variance=ev, ce_loss_score=ce, **fields
    )


def beaten(a, b):
    """Whether b beats a."""
    return b[0] <= a[0] and b[1] <= a[1] and b != a


def test_a_point_is_on_the_frontier_unless_another_beats_it():
    generator = random.Random(0)
    for _ in range(200):
        # Few values, so that there are many ties.
        points = [(generator.randrange(6), generator.randrange(6)) for _ in range(8)]
        wanted = [not any(beaten(a, b) for b in points) for a in points]
        assert pareto(points) == wanted
    assert pareto([]) == []


def test_the_frontier_by_hand():
    # L0 20 is beaten by 10, which is sparser and better; the two at 30 are equal.
    points = [(10, 0.3), (20, 0.35), (30, 0.2), (30, 0.2), (30, 0.25), (40, 0.2)]
    assert pareto(points) == [True, False, True, True, False, False]


def test_each_figure_has_its_own_frontier():
    rows = [row(10, 0.3, 0.8), row(20, 0.2, 0.7), row(30, 0.25, 0.9), row(40, 0.4, 0.5)]
    assert on_frontier(rows, "fvu") == [True, True, False, False]
    assert on_frontier(rows, "ce_loss_score") == [True, False, True, False]
    assert marks(rows) == ["FVU CE", "FVU", "CE", ""]
    with pytest.raises(ConfigError, match="did you mean ce_loss_score"):
        on_frontier(rows, "ce_score")


def test_only_saes_that_ended_by_themselves_and_have_figures_count():
    rows = [
        row(10, 0.1, status="interrupted"),
        row(10, float("nan")),
        row(None, 0.1),
        row(12, 0.3, status="stopped"),
        row(14, 0.2),
    ]
    assert on_frontier(rows, "fvu") == [False, False, False, True, True]
    assert on_frontier(rows, "ce_loss_score") == [False] * 5


def test_hook_points_have_frontiers_of_their_own():
    rows = [row(10, 0.1, hook_point="a"), row(20, 0.5, hook_point="b")]
    assert on_frontier(rows, "fvu") == [True, True]
    with pytest.raises(SaerayError, match=r"2 hook points.*hook_point: a, b"):
        best(rows, 10)


def test_the_nearest_on_the_frontier_is_chosen():
    # 50 itself is beaten by 48; 48 is nearer to 50 than 55 is.
    rows = [row(48, 0.20), row(50, 0.22), row(55, 0.18), row(90, 0.1)]
    assert best(rows, 50) == 0
    assert best(rows, 55) == 2
    # As ratios 55 and 90 are equally far from their geometric mean, √(55 · 90) = 70.36.
    assert best(rows, 70.3, within=0.5) == 2
    assert best(rows, 70.4, within=0.5) == 3


def test_none_in_the_band_is_said_with_what_is_next_to_it():
    rows = [row(30, 0.2), row(50, 0.25), row(80, 0.1)]
    with pytest.raises(SaerayError) as raised:
        best(rows, 50)
    said = str(raised.value)
    assert "within 20% of 50 (41.7 to 60)" in said
    assert "l0=30 with 30 (within 0.67), l0=80 with 80 (within 0.6)" in said
    assert "beaten by sparser ones: l0=50 (50)" in said
    assert best(rows, 50, within=0.6) == 2
    with pytest.raises(SaerayError, match="l0=80 with 80"):
        best(rows, 1000)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "none was begun"),
        ([row(1, 0.1, status="waiting"), row(1, 0.1, status="waiting")], "2 waiting"),
        ([row(10, None)], "both an L0 and fvu"),
    ],
)
def test_nothing_to_choose_from(rows, words):
    with pytest.raises(SaerayError, match=words):
        best(rows, 50)


@pytest.mark.parametrize("wrong", [dict(l0=0), dict(l0=float("nan")), dict(l0=5, within=-0.1)])
def test_numbers_that_are_no_band(wrong):
    with pytest.raises(ConfigError, match="a number above 0"):
        best([row(10, 0.1)], **wrong)
