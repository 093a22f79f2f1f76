"""Whether wandb will be let in: told before anything is spent. Asks no server, imports no wandb."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_SERVER = "https://api.wandb.ai"
# Of wandb: any of these says who one is.
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
NO_SERVER = ("offline", "disabled", "dryrun")
FALSE = ("", "0", "false", "no")


def lacking() -> list[str]:
    """A warning, where runs are to go to a server and this process has no key for it."""
    settings = from_settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "online")
    off = os.environ.get("WANDB_DISABLED", "").lower() not in FALSE
    if off or mode.lower() in NO_SERVER or any(os.environ.get(name) for name in CREDENTIALS):
        return []
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url", DEFAULT_SERVER)
    host = urlsplit(server).hostname or server
    if in_netrc(host):
        return []
    return [
        f"wandb: no key for {host}, so nothing will be sent there: `wandb login`, WANDB_API_KEY, "
        "WANDB_MODE=offline, or log_to_wandb: false. metrics.jsonl has everything in any case, and "
        "`saeray wandb DIR` sends it later."
    ]


def from_settings() -> dict[str, str]:
    """What wandb's own files of settings say: of the user, then of this folder."""
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser()
    try:
        parser.read([user / "settings", Path("wandb") / "settings"])
    except configparser.Error:
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def in_netrc(host: str) -> bool:
    """Whether `wandb login` has left a key for the host."""
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in [Path(p).expanduser() for p in places if p]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
