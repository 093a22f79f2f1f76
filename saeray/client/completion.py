"""Completion in the shell, of commands, options, and the names of fields after `--set`.

Where argcomplete is installed: `eval "$(register-python-argcomplete saeray)"`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any


def complete(top: argparse.ArgumentParser) -> None:
    """Answers a shell that asks what could come next, and ends; does nothing otherwise."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        return
    (commands,) = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    for action in commands.choices["sweep"]._actions:
        if action.dest == "set":
            action.completer = fields_named
    argcomplete.autocomplete(top)


def fields_named(prefix: str, **_: Any) -> list[str]:
    """`field=` of every field that begins so."""
    from saeray.spec.fields import all_fields

    return [f"{f.name}=" for f in all_fields() if f.name.startswith(prefix)]
