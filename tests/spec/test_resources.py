"""The `resources:` section: amounts, custom resources, labels as Ray takes them."""

import pytest

from saeray.errors import ConfigError
from saeray.spec.resources import Resources
from saeray.spec.room import label_fits


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(harvester_resources={"harvester": "many"}), "harvester_resources.harvester"),
        (dict(harvester_resources=["x"]), "name: value"),
        (dict(trainer_resources={"GPU": 1}), "its own field, trainer_gpus"),
        (dict(trainer_resources={"x": 1.5}), "whole number above"),
        (dict(trainer_labels={"zone": 3}), "trainer_labels.zone"),
        (dict(node_wait_s=0), "node_wait_s"),
    ],
)
def test_what_is_no_resource_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Resources(**fields)


@pytest.mark.parametrize(
    "wanted, fitting",
    [
        ("a", {"a"}),
        ("!a", {"b", None}),
        ("in(a, b)", {"a", "b"}),
        ("in(b)", {"b"}),
        ("!in(a,b)", {None}),
    ],
)
def test_label_selectors_mean_what_they_mean_to_ray(wanted, fitting):
    assert {value for value in ("a", "b", None) if label_fits(value, wanted)} == fitting
    from ray._private.label_utils import validate_label_selector

    assert validate_label_selector({"zone": wanted}) is None  # what is wrong with it
    assert Resources(trainer_labels={"zone": wanted}).trainer_labels == {"zone": wanted}


@pytest.mark.parametrize("wanted", ["", "in()", "in(a", "-a", "!!a", "a b"])
def test_a_label_that_ray_would_not_take_is_refused(wanted):
    with pytest.raises(ConfigError, match=r"resources\.trainer_labels\.zone"):
        Resources(trainer_labels={"zone": wanted})
