"""`model_name: synthetic:…`: its parameters, what is refused, and what a config needs no more."""

import pytest

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve, stream_key
from saeray.spec.synthetic import parse

EASY = "synthetic:d_in=64,features=256,l0=4"


def config(model_name=EASY, **changes):
    return LanguageModelSAERunnerConfig(model_name=model_name, **changes)


def test_a_name_is_stored_with_all_its_parameters():
    written = config("synthetic: l0=2, noise=0.1").model_name
    assert written == (
        "synthetic:d_in=64,features=256,l0=2,zipf=0,spread=0.5,hierarchy=0,correlation=0,"
        "noise=0.1,seed=0"
    )
    assert config(written).model_name == written
    assert parse(written) == parse("synthetic:l0=2,noise=0.1")


def test_hook_point_and_text_are_settled():
    made = resolve(config())
    assert (made.hook_point, made.dataset_path) == ("activations", "synthetic")
    assert LanguageModelSAERunnerConfig.from_dict(made.to_dict()) == made
    of_two = config([EASY, "synthetic:zipf=1"])
    assert of_two.hook_point == "activations"
    assert stream_key(resolve(config(lr=1.0))) == stream_key(made)
    assert stream_key(resolve(config(EASY + ",noise=1"))) != stream_key(made)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("synthetic:feature=3", "unknown parameter 'feature'; did you mean features"),
        ("synthetic:d_in=64,d_in=32", "d_in is given twice"),
        ("synthetic:d_in=6.5", "d_in=6.5: a whole number is wanted"),
        ("synthetic:l0", "l0=: a number is wanted"),
        ("synthetic:zipf=nan", "zipf=nan: a number is wanted"),
        ("synthetic:features=0", "features=0: at least 1"),
        ("synthetic:l0=0", "l0=0: above 0"),
        ("synthetic:spread=2", "spread=2: between 0 and 1"),
        ("synthetic:correlation=-0.5", "correlation=-0.5: between 0 and 1"),
        ("synthetic:hierarchy=2", "features=256: a multiple of 3"),
        # Σ 1/rank over 256 is 6.124: the first fires 10 / 6.124 = 1.63 times a row.
        ("synthetic:l0=10,zipf=1", "1.63 times in every row; at most l0=6.12 here"),
    ],
)
def test_a_bad_name_says_what_is_right(name, remedy):
    with pytest.raises(ConfigError) as refused:
        config(name)
    assert str(refused.value).startswith(f"model_name = {name!r}: ")
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(hook_point="blocks.0.hook_resid_pre"),
        dict(dataset_path="text.parquet"),
        dict(hook_point_layer=2),
        dict(is_dataset_tokenized=False),
        dict(dataset_split="validation"),
        dict(prepend_bos=False),
        dict(trust_remote_code=True),
        dict(feature_sampling_method="anthropic"),
        dict(training_tokens=2**31, l1_coefficient=1e-3),
    ],
)
def test_what_is_meant_for_a_language_model_is_refused_by_name(changes):
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=f"^{name} = .*synthetic:"):
        config(**changes)


def test_frequencies_sum_to_l0_and_follow_rank():
    frequencies = parse("synthetic:features=100,l0=3,zipf=1").frequencies()
    assert sum(frequencies) == pytest.approx(3)
    assert frequencies[0] / frequencies[9] == pytest.approx(10)  # ranks 1 and 10
    # 50 parents with 3 children each: a child fires in (1 - 0.5) / 3 of its parent's rows.
    spec = parse("synthetic:features=200,l0=3,hierarchy=3")
    frequencies = spec.frequencies()
    assert (spec.trees, len(frequencies)) == (50, 200)
    assert sum(frequencies) == pytest.approx(3)
    assert frequencies[50] == pytest.approx(frequencies[0] / 6)
