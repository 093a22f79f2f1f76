"""How loops are compiled by Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Sums may be reordered to fill vector registers, but NaN and infinity stay what they are: a loss
# that is not finite has to be seen.
REORDERED = {"reassoc", "contract", "nsz"}


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit without the interpreter's lock; cached on disk where there is a place for it."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return numba.njit(nogil=True, **options)(function)

    return decorate
