"""A key that wandb will want is missed before the sweep, not after it."""

import pytest

from saeray.files.wandb_key import lacking


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without a key, in an empty folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DISABLED", "NETRC",
                 "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_without_any_key_it_is_said_with_what_to_do(monkeypatch):
    (said,) = lacking()
    assert said.startswith("wandb: no key for api.wandb.ai")
    assert "WANDB_MODE=offline" in said
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/x")
    assert lacking()[0].startswith("wandb: no key for wandb.example.org,")


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")],
)
def test_with_one_or_without_a_server_nothing_is(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert lacking() == []


def test_what_wandbs_own_commands_leave_counts(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password kkk\n")
    assert lacking() == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example.org")
    assert len(lacking()) == 1
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert lacking() == []
