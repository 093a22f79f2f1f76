"""What `saeray fields` says, and that docs/config.md says the same."""

from dataclasses import fields

import pytest
from support.bundled import ROOT

from saeray.client.cli import main
from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fields import all_fields, as_markdown, matching
from saeray.spec.resources import Resources
from saeray.spec.scheduler import Scheduler


def test_every_field_is_there_with_its_default_and_words():
    every = {f.name: f for f in all_fields()}
    names = [f.name for f in fields(LanguageModelSAERunnerConfig)]
    for section, kind in (("scheduler", Scheduler), ("resources", Resources)):
        names += [f"{section}.{f.name}" for f in fields(kind)]
    assert list(every) == names
    assert every["scheduler.metric"][1:4] == ("Scheduler", "str", None)
    assert every["lr"].default == "3e-4" and every["model_name"].default is None
    assert every["context_size"][1:] == (
        "The language model and its text", "int", "128", "tokens per LM context", (),
    )  # fmt: skip
    assert every["k"].architectures == ("topk", "batchtopk", "matryoshka")
    assert every["txt_documents"].words.startswith("What is a document in a .txt file: what stands")
    assert every["text_column"].group == "How the text is read"
    assert every["architecture"].words.startswith("standard, p_anneal, gated")
    assert every["resources.trainer_cpus"].default == '"auto"'
    assert len({f.group for f in every.values()}) > 6


def test_docs_are_made_of_them():
    assert (ROOT / "docs" / "config.md").read_text() == as_markdown(), (
        "saeray fields --markdown > docs/config.md"
    )


def test_words_find_fields(capsys):
    assert [f.name for f in matching("lr_decay")] == ["lr_decay_steps"]
    assert "dead_feature_window" in [f.name for f in matching("without firing")]
    with pytest.raises(ConfigError, match="did you mean lr_decay_steps"):
        matching("lr_decay_stepz")
    assert main(["fields", "jumprelu_bandwidth"]) == 0
    said = capsys.readouterr().out
    assert "jumprelu_bandwidth: float | None, default None" in said
    assert "of architecture jumprelu" in said
    assert main(["fields", "nonsense-word"]) == 2
