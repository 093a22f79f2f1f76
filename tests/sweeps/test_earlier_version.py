"""An interrupted sweep that an earlier version left is gone on with to the same end."""

import shutil
from pathlib import Path

import pytest

import saeray
from saeray.files.metrics_log import line_of

WRITTEN = Path(__file__).parent.parent / "files" / "written_by_0.1"


def lines(folder, trial):
    log = (folder / "trials" / trial / "metrics.jsonl").read_text()
    return [line for text in log.splitlines() if (line := line_of(text)) is not None]


@pytest.mark.slow
def test_it_ends_as_the_earlier_version_would_have_ended_it(ray_instance, tmp_path):
    folder = tmp_path / "interrupted"
    shutil.copytree(WRITTEN / "interrupted", folder)
    result = saeray.resume(folder, live=False)
    assert [r["status"] for r in result.rows] == ["done", "done"]
    finished = saeray.resume(WRITTEN / "finished")
    for row, other in zip(result.rows, finished.rows, strict=True):
        mine = lines(folder, row["trial"])
        theirs = lines(WRITTEN / "finished", row["trial"])
        # What was logged before under the name that the other figure has now, was renamed.
        named = ["metrics/explained_variance" in x for x in mine]
        assert named == [x["step"] > 250 for x in mine]
        assert [x["step"] for x in mine] == [x["step"] for x in theirs] == list(range(50, 1201, 50))
        # Bit for bit on the same kind of core; elsewhere sums are rounded in another way.
        for key in ("losses/overall_loss", "eval/l0", "eval/explained_variance_per_token"):
            assert mine[-1][key] == pytest.approx(theirs[-1][key], rel=2e-2), key
        for figure in ("l0", "ce_loss_score", "explained_variance_per_token"):
            assert row[figure] == pytest.approx(other[figure], rel=2e-2), figure
