"""`saeray features` without a cluster: what is asked for, refused, and already there."""

import pytest
from support import feature_files
from support import features as of
from support.finished import finished, sae

from saeray.client.cli import main, parser
from saeray.client.features import chosen_saes, digest_of, sweep_and_saes
from saeray.client.features_asked import described, words
from saeray.errors import ConfigError, SaerayError
from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.features import Wanted
from saeray.spec.grid import SAE
from saeray.spec.messages import WAITING
from saeray.spec.synthetic import HOOK_POINT, TEXT


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return of.sweep_of(tmp_path_factory.mktemp("sweeps") / "sweep", a=of.sparse_sae(0))


def refused(capsys, *arguments):
    assert main(["features", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "a", "trials/a", "trials/a/final", "features/a"])
def test_a_sweep_is_found_from_any_folder_of_an_sae(sweep, below):
    found, name = sweep_and_saes(f"{sweep.uri}/{below}", Folder.at)
    assert found.uri == sweep.uri
    assert name == ("a" if below else None)


def test_where_there_is_no_sweep_is_said(tmp_path, capsys):
    assert "there is no sweep.yaml" in refused(capsys, tmp_path / "nothing" / "here")


def test_an_sae_that_is_not_there_is_refused_with_the_nearest(sweep, capsys):
    assert "has no trained SAE 'b'; known: a" in refused(capsys, f"{sweep.uri}/b")


def test_a_sweep_of_which_nothing_has_ended_has_none(tmp_path):
    folder = finished(tmp_path / "s", one=sae(state=WAITING))
    with pytest.raises(SaerayError, match="no SAE has finished"):
        chosen_saes(folder, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "0"], "--tokens = 0: at least 1"),
        (["--top", "0"], "--top = 0: at least 1"),
        (["--top", "2000"], "--top = 2000: at most 1,000"),
        (["--harvesters", "0"], "--harvesters = 0: at least 1"),
        (["--feature", "-1"], "--feature = -1: at least 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(sweep, capsys, options, words):
    assert words in refused(capsys, sweep.uri, *options)


def test_a_feature_of_no_sae_in_particular_is_refused(tmp_path, capsys):
    folder = finished(tmp_path / "s", one=sae(l0=1), two=sae(l0=2, lr=1e-4))
    assert "of which SAE? Name it" in refused(capsys, folder.uri, "--feature", "3")


def test_known_features_have_no_text(tmp_path, capsys):
    known = dict(model_name="synthetic:d_in=8,features=16,l0=2", hook_point=HOOK_POINT)
    folder = finished(tmp_path / "s", one=sae(l0=1, **known, dataset_path=TEXT))
    assert "has no text" in refused(capsys, folder.uri)


def test_features_that_are_there_are_shown_without_a_pass(sweep, capsys):
    config = SweepFolder(sweep, sweep.name).read_configs()["a"]
    wanted = Wanted(("a",))
    made = feature_files.by_hand(digest=digest_of(sweep, SAE("a", config), wanted), sae="a")
    place = sweep / "features" / "a"
    feature_data.write(place, made)
    assert main(["features", f"{sweep.uri}/a", "--feature", "64", "--format", "neuronpedia"]) == 0
    said = capsys.readouterr()
    assert "raises '<script>' 2.00" in said.out
    assert "1.64  <bos> the»<script>«alert(1)</script> cat" in said.out
    assert f"{place.uri}/feature.html#64" in said.out
    assert f"{place.uri}/index.html" in said.err and "neuronpedia" in place.names()
    with pytest.raises(ConfigError, match="a has 70, from 0"):
        described(sweep, "a", 70)


@pytest.mark.parametrize("change", [dict(tokens=5), dict(top=3)])
def test_other_text_or_other_weights_are_another_pass(sweep, change):
    config = SweepFolder(sweep, sweep.name).read_configs()["a"]
    one = SAE("a", config)
    assert digest_of(sweep, one, Wanted(("a",))) != digest_of(sweep, one, Wanted(("a",), **change))


def test_a_job_is_given_the_same_command():
    arguments = parser().parse_args(
        ["features", "results/mine/a", "--tokens", "5", "--feature", "3", "--format", "neuronpedia"]
    )
    wanted = Wanted((), 5, 20, None, ("pages", "neuronpedia"))
    again = parser().parse_args(words(arguments, wanted))
    assert again.sweep == "~/results/mine/a"
    for name in ("tokens", "top", "feature", "harvesters", "format"):
        assert getattr(again, name) == getattr(arguments, name)
