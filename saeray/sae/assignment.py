"""The assignment problem: a pair for every row of a matrix, so that the sum is the largest.

Shortest augmenting paths with potentials (Kuhn 1955; Jonker and Volgenant 1987): O(n² m) for
[n, m], n <= m, of which the inner loop is NumPy's.
"""

from __future__ import annotations

import numpy as np


def best_assignment(values: np.ndarray) -> np.ndarray:
    """values [n, m] with n <= m -> int64 [n], a column for each row, no column twice.

    Raises:
        ValueError: more rows than columns, or a value that is not finite.
    """
    n, m = values.shape
    if n > m:
        raise ValueError(f"[{n}, {m}]: more rows than columns; give it transposed")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    cost = values.max(initial=0.0) - values.astype(np.float64)
    of_row, of_column = np.zeros(n), np.zeros(m)  # potentials: reduced costs are never below 0
    row_at = np.full(m, -1)  # the row that has a column
    for row in range(n):
        # Dijkstra over columns, from a row that has none to a column that nobody has.
        distance, came_from = np.full(m, np.inf), np.full(m, -1)
        reached = np.zeros(m, dtype=bool)
        at, here, so_far = row, -1, 0.0
        while True:
            through = so_far + cost[at] - of_row[at] - of_column
            nearer = ~reached & (through < distance)
            distance[nearer], came_from[nearer] = through[nearer], here
            here = int(np.where(reached, np.inf, distance).argmin())
            reached[here], so_far = True, distance[here]
            at = int(row_at[here])
            if at < 0:
                break
        of_row[row] += so_far
        on_the_way = np.flatnonzero(reached & (row_at >= 0))
        of_row[row_at[on_the_way]] += so_far - distance[on_the_way]
        of_column[reached] -= so_far - distance[reached]
        while here >= 0:  # each column on the path goes to the row before it
            before = int(came_from[here])
            row_at[here] = row if before < 0 else row_at[before]
            here = before
    column_of = np.empty(n, dtype=np.int64)
    taken = np.flatnonzero(row_at >= 0)
    column_of[row_at[taken]] = taken
    return column_of
