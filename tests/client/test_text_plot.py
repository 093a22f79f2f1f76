"""The frontier as text at a sweep's end, and what a result says of itself."""

from saeray.client.result import SweepResult
from saeray.client.text_plot import HEIGHT, ON, WIDTH, plotted
from saeray.files.storage import Folder
from saeray.spec.messages import SweepStatus


def row(name, l0, score, status="done", **more):
    return dict(
        trial=name, status=status, l0=l0, ce_loss_score=score, explained_variance=0.5, error=None,
        n_training_tokens=80, dead_features=0, **more,
    )  # fmt: skip


def test_points_stand_where_their_figures_are():
    # 20 is a third of the way from 10 to 80 on a logarithmic axis; the fourth is beaten.
    rows = [row("a", 10.0, 0.5), row("b", 20.0, 0.9), row("c", 80.0, 1.0), row("d", 80.0, 0.8)]
    lines = plotted([*rows, row("e", 5.0, 0.1, status="failed")])
    assert max(map(len, lines)) < 80
    field = [line.partition("│")[2].ljust(WIDTH) for line in lines[1 : HEIGHT + 1]]
    assert [(y, x) for y, of in enumerate(field) for x, c in enumerate(of) if c == ON] == [
        (0, WIDTH - 1),
        (2, 20),  # (1 - 0.9) / 0.5 of 11 lines from the top
        (HEIGHT - 1, 0),
    ]
    assert field[4][WIDTH - 1] == "·"
    assert lines[1].strip().startswith("1.000") and "0.500" in lines[HEIGHT]
    assert lines[-1].split() == ["L0", "10", "28.3", "80"]
    assert plotted(rows[:2]) == []
    same = plotted([row(n, 10.0, 0.5) for n in "abc"])  # one point, without dividing by nothing
    assert sum(line.count(ON) for line in same[1:]) == 1


def test_a_result_says_itself_in_a_line(tmp_path):
    rows = [row(str(i), 10.0 + i, 0.5 + i / 1000) for i in range(200)]
    result = SweepResult("mine", Folder.at(tmp_path), rows, SweepStatus(rows=[], phase="over"))
    assert repr(result) == f"<SweepResult mine: 200 SAEs (200 done) in {tmp_path}>"
    assert "CE score by L0" in result.summary()
