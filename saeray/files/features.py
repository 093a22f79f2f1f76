"""features.parquet: a row per feature of one SAE, beside its final/ (columns: docs/metrics.md).

Needs nothing of saeray's to be read. No Ray.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet

FILE = "features.parquet"


def as_parquet(columns: Mapping[str, np.ndarray]) -> bytes:
    """The file's bytes, the same for the same figures; columns [L] by name.

    What a feature has none of is null: NaN where it never fires, -1 where it has no neighbour.
    """
    n_features = len(next(iter(columns.values())))
    table = {"feature": pa.array(np.arange(n_features, dtype=np.int32))}
    for name, values in columns.items():
        if values.dtype == np.int64:
            table[name] = pa.array(values.astype(np.int32), mask=values < 0)
        else:
            table[name] = pa.array(values, from_pandas=True)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(table), file)
    return file.getvalue()
