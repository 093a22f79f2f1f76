"""features.parquet, as any program reads it."""

import io

import numpy as np
import pyarrow.parquet

from saeray.files.features import as_parquet


def test_a_feature_has_null_for_what_it_has_none_of():
    columns = {
        "density": np.array([0.5, 0.0]),
        "mean_activation_when_active": np.array([2.0, np.nan], dtype=np.float32),
        "dead_on_held_out": np.array([False, True]),
        "nearest_feature": np.array([1, -1]),
    }
    data = as_parquet(columns)
    assert pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict() == {
        "feature": [0, 1],
        "density": [0.5, 0.0],
        "mean_activation_when_active": [2.0, None],
        "dead_on_held_out": [False, True],
        "nearest_feature": [1, None],
    }
    assert as_parquet(columns) == data
