"""One output of a notebook's cell that is written anew, for the live view."""

from __future__ import annotations

import html
import importlib
import sys
from collections.abc import Sequence
from typing import Any


class Output:
    """Lines in a cell's output; what was there before them is replaced."""

    def __init__(self, display: Any) -> None:
        """display: `IPython.display.display`."""
        self.display = display
        self.handle: Any = None

    @classmethod
    def wanted(cls) -> Output | None:
        """Where this process is a notebook's kernel."""
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython is not None else None
        if shell is None or not hasattr(shell, "kernel"):  # a terminal's has none
            return None
        return cls(importlib.import_module("IPython.display").display)

    def begin(self) -> None:
        self.handle = self.display(as_data(["…"]), raw=True, display_id=True)

    def show(self, lines: Sequence[str]) -> None:
        self.handle.update(as_data(lines), raw=True)


def as_data(lines: Sequence[str]) -> dict[str, str]:
    """For every frontend: text, and text that a browser does not wrap."""
    text = "\n".join(lines)
    return {
        "text/plain": text,
        "text/html": f'<pre style="white-space: pre; line-height: 1.2">{html.escape(text)}</pre>',
    }
