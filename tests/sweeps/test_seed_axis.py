"""A grid over seeds, on real Ray: its stability in the results, and pages of its features."""

from urllib.parse import quote

import pytest
from support.bundled import fields

import saeray
from saeray.files import feature_data
from saeray.files.frontier import marks
from saeray.report.gather import feature_pages
from saeray.sae.stability import pw_mcc


@pytest.mark.slow
@pytest.mark.ci
def test_saes_of_several_seeds_have_their_stability(ray_instance, tmp_path):
    config = fields(
        expansion_factor=2,
        lr=3e-3,
        seed=[1, 2, 3],
        training_tokens=32 * 1024,
        train_batch_size=2048,
        n_batches_in_buffer=8,
        b_dec_init_rows=512,
        eval_every=0,
        features=2048,
    )
    result = saeray.sweep(config, name="seeds", storage_path=tmp_path, live=False)
    one, two, three = (result.load(row).W_dec for row in result.rows)
    pairs = pw_mcc(one, two), pw_mcc(one, three), pw_mcc(two, three)
    assert all(0.1 < alike < 0.99 for alike in pairs)
    assert result.rows[0]["pw_mcc"] == pytest.approx((pairs[0] + pairs[1]) / 2)
    assert "over seeds" in result.summary() and f"{sum(pairs) / 3:.3f}" in result.summary()
    page = (tmp_path / "seeds" / "report.html").read_text()
    assert f'<td class="num">{sum(pairs) / 3:.3g}</td>' in page.partition('id="seeds"')[2]
    read = saeray.load_sweep(tmp_path / "seeds")
    assert read.rows == result.rows
    row = read.best(l0=min(r["l0"] for r in result.rows))
    assert row["path"] == str(tmp_path / "seeds" / "trials" / row["trial"] / "final")
    # Pages of the features of those on the frontier, which the report leads to.
    on = [r["trial"] for r, mark in zip(result.rows, marks(result.rows), strict=True) if mark]
    assert on
    assert {*feature_pages(result.folder)} == {*on}
    for name in on:
        assert f'href="features/{quote(name)}/index.html"' in page or name in page
        about = feature_data.read_about(result.folder / "features" / name)
        assert 2048 <= about["windows"] * about["context_size"] <= 2 * 2048
    assert len(saeray.resume(tmp_path / "seeds", live=False).rows) == 3  # nothing is left to do
