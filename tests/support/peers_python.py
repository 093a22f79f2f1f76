"""Pythons that have a package of the field, each in an environment of its own."""

import subprocess
import sys

import pytest
from support.bundled import ROOT


def python_with(peer):
    """As `benchmarks/peers.py` makes it; skips where it can't, and says so."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import environment

    try:
        return environment(peer)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no environment for {peer} could be made: {error}")
