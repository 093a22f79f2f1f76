"""`grid:`: points beyond the product, as a list of partial configs."""

import pytest
import yaml
from support.bundled import MODEL
from support.configs import config

from saeray.client.cli import load_sweep_file
from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig, stream_key
from saeray.spec.grid import expand


def test_paired_axes_are_two_saes_and_not_four():
    saes = expand(config(grid=[dict(lr="1e-3", l1_coefficient=2), dict(lr=2e-3, l1_coefficient=4)]))
    assert [s.name for s in saes] == ["lr=0.001,l1_coefficient=2", "lr=0.002,l1_coefficient=4"]
    assert [(s.config.lr, s.config.l1_coefficient) for s in saes] == [(1e-3, 2.0), (2e-3, 4.0)]
    assert [s.config.grid for s in saes] == [None, None]


def test_lists_in_an_entry_and_beside_it_are_multiplied_out():
    saes = expand(config(seed=[1, 2], grid=[dict(lr=[1e-3, 2e-3]), dict(l1_coefficient=0.1)]))
    assert [s.name for s in saes] == [
        "seed=1,lr=0.001", "seed=1,lr=0.002", "seed=2,lr=0.001", "seed=2,lr=0.002",
        "seed=1,l1_coefficient=0.1", "seed=2,l1_coefficient=0.1",
    ]  # fmt: skip
    assert len({stream_key(s.config) for s in saes}) == 1


def test_an_entrys_value_stands_for_the_axis_beside_it():
    saes = expand(config(lr=[1e-3, 2e-3], grid=[dict(seed=1), dict(seed=2, lr=5e-4)]))
    assert [(s.config.seed, s.config.lr) for s in saes] == [(1, 1e-3), (1, 2e-3), (2, 5e-4)]


def test_architectures_have_their_own_fields_and_leave_those_of_others():
    saes = expand(
        config(
            l1_coefficient=[1e-3, 2e-3],
            grid=[dict(architecture="topk", k=[8, 16]), dict(architecture="standard")],
        )
    )
    assert [s.name for s in saes] == [
        "architecture=topk,k=8",
        "architecture=topk,k=16",
        "architecture=standard,l1_coefficient=0.001",
        "architecture=standard,l1_coefficient=0.002",
    ]
    assert [s.config.l1_coefficient for s in saes] == [None, None, 1e-3, 2e-3]


def test_one_stream_serves_seeds_and_lengths_of_all_entries():
    saes = expand(
        config(seed=9, grid=[dict(seed=3, training_tokens="81920"), dict(seed=4)]),
    )
    assert {s.config.data_seed for s in saes} == {3}
    assert {s.config.stream_tokens for s in saes} == {2_000_000}


def test_a_grid_survives_being_written_down():
    c = config(grid=[dict(lr=[1e-3, 2e-3]), dict(dtype="float64")])
    text = yaml.safe_dump(c.to_dict())
    assert expand(LanguageModelSAERunnerConfig.from_dict(yaml.safe_load(text))) == expand(c)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([], "a list of partial configs"),
        ({"lr": 1e-3}, "a list of partial configs"),
        ([3], "grid = 3"),
        ([{"lr": 1e-3}, {"lrr": 1e-3}], "entry 2: unknown key 'lrr'; did you mean lr"),
        ([{}, {"lr": "fast"}], "entry 2: lr = 'fast': a number"),
        ([{"lr": []}], "entry 1: lr = .*empty"),
        ([{"lr": -1.0}], "entry 1: lr = -1.0: above 0"),
        ([{"resources": {}}], "entry 1: resources = {}: concerns the whole sweep"),
        ([{"grid": [{}]}], "entry 1: grid = .*concerns the whole sweep"),
        ([{"lr": 1e-3}, {"lr": 1e-3}], r"duplicate trial lr=0\.001"),
        ([{}, {"lr": 3e-4}], r"sae and lr=0\.0003 are the same SAE"),
        ([{"architecture": "topk"}], "entry 1: k = None"),
        ([{"architecture": "topk", "k": 8, "l1_coefficient": 1.0}, {}], "entry 1: l1_coefficient"),
    ],
)
def test_bad_entries_are_refused_by_number(grid, words):
    with pytest.raises(ConfigError, match=words):
        expand(config(grid=grid))


def test_paths_in_entries_are_found_beside_the_sweep_file(tmp_path):
    (tmp_path / "text.parquet").touch()
    file = tmp_path / "sweep.yaml"
    entries = [dict(dataset_path="text.parquet"), dict(model_name=str(MODEL), lr=1e-3)]
    file.write_text(yaml.safe_dump(dict(grid=entries)))
    assert load_sweep_file(file)["grid"] == [
        dict(dataset_path=str(tmp_path / "text.parquet")),
        dict(model_name=str(MODEL), lr=1e-3),
    ]
