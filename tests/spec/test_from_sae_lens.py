"""docs/from-sae-lens.md says of every field of sae_lens what the config does with it."""

import json
import subprocess

import pytest
from support import sae_lens_fields as theirs
from support.peers_python import python_with

SCRIPT = """
import dataclasses, json, sae_lens, sae_lens.saes as saes
from sae_lens.config import LoggingConfig
kinds = [sae_lens.LanguageModelSAERunnerConfig, LoggingConfig] + [
    getattr(saes, f"{kind}TrainingSAEConfig")
    for kind in ("Standard", "Gated", "TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU")
]
print("RESULT", json.dumps(sorted({f.name for kind in kinds for f in dataclasses.fields(kind)})))
"""


def test_the_page_has_the_table_of_what_is_done_with_each_field():
    text = theirs.PAGE.read_text(encoding="utf-8")
    assert theirs.table() in text, "run python tests/support/sae_lens_fields.py"


def test_notes_are_of_fields_that_there_are():
    assert {*theirs.NOTES} <= {name for of in theirs.FIELDS.values() for name in of.split()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_these_are_the_fields_of_sae_lens():
    done = subprocess.run(
        [python_with("sae_lens"), "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    there = set(json.loads(done.stdout.split("RESULT ")[1])) - {"sae", "logger"}  # what nests
    assert {name for of in theirs.FIELDS.values() for name in of.split()} == there
