"""What a sweep refuses before anything is trained."""

import pytest
from support.bundled import MODEL
from support.running import rosters

import saeray
from saeray.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Of two streams the second, which would be started when the first is through.
        (
            dict(dataset_path=[str(MODEL / "text" / "train.parquet"), "/no/such/file.parquet"]),
            "no such file",
        ),
        pytest.param(dict(context_size=[64, 4096]), "context_size = 4096", marks=pytest.mark.slow),
        # These in `make test` by test_cli, without a cluster.
        pytest.param(
            dict(hook_point="blocks.2.hook_resid_prr"), "did you mean", marks=pytest.mark.slow
        ),
        pytest.param(dict(d_in=64), "d_in = 64", marks=pytest.mark.slow),
        pytest.param(
            dict(dataset_path="/no/such/file.parquet"), "no such file", marks=pytest.mark.slow
        ),
        pytest.param(
            dict(n_batches_in_buffer=2000, store_batch_size=256, training_tokens=10**9),
            "buffer",
            marks=pytest.mark.slow,  # the same by numbers alone, in test_plan
        ),
    ],
)
def test_what_only_the_cluster_can_see_is_refused_before_training(tiny, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        saeray.sweep(tiny | changes, name="bad", storage_path=tmp_path, live=False)
    assert rosters("bad") == []
    assert list((tmp_path / "bad").glob("trials/*/checkpoints/*")) == []


def test_a_folder_that_is_there_is_not_written_over(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.csv").write_text("precious")
    with pytest.raises(ConfigError, match="name = 'taken'"):
        saeray.sweep(tiny, name="taken", storage_path=tmp_path)
    assert (tmp_path / "taken" / "results.csv").read_text() == "precious"
