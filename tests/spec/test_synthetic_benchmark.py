"""`benchmarks/synthetic.py`: every line of its table is a sweep, and the best SAE stands for it."""

import sys

import pytest
from support.bundled import ROOT

from saeray.spec.architectures import OWN_FIELDS
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import expand

sys.path.insert(0, str(ROOT / "benchmarks"))
import synthetic

FIGURES = {key: "0.5" for _, key, _ in synthetic.FIGURES}


def row(setting, l1, mcc):
    name = LanguageModelSAERunnerConfig(model_name=synthetic.SETTINGS[setting]).model_name
    return FIGURES | {"model_name": name, "l1_coefficient": str(l1), "mcc": mcc}


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_every_architecture_has_a_grid_that_can_be_trained(architecture):
    fields = synthetic.SHARED | synthetic.ARCHITECTURES[architecture]
    names = list(synthetic.SETTINGS.values())
    saes = expand(
        LanguageModelSAERunnerConfig(
            **fields, architecture=architecture, model_name=names, training_tokens=10**6
        )
    )
    (axis,) = synthetic.grid_fields(architecture)
    assert len(saes) == len(names) * len(fields[axis])


def test_all_architectures_are_in_it():
    assert set(synthetic.ARCHITECTURES) == set(OWN_FIELDS)


def test_the_sae_with_the_largest_mcc_stands_for_its_architecture():
    rows = [row("easy", 0.2, "0.7"), row("easy", 0.3, "0.9"), row("easy", 0.4, "")]
    rows.append(row("zipf", 0.2, "0.8"))
    text = synthetic.report({"standard": rows}, ["easy", "zipf"])
    easy, zipf, every_sae = text.split("\n\n|")[1:]
    assert "| standard | l1_coefficient 0.3 | 0.50 | 0.5000 | 0.900 |" in easy
    assert "| standard | l1_coefficient 0.2 | 0.50 | 0.5000 | 0.800 |" in zipf
    assert every_sae.count("| standard |") == 4
    assert "| easy | standard | l1_coefficient 0.4 | 0.50 | 0.5000 | – |" in every_sae
