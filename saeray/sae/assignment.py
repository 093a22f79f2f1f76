"""The assignment problem: a column for every row of a matrix, so that the sum is the largest."""

from __future__ import annotations

import numpy as np

ROWS_AT_ONCE = 256  # of the matrix, in what is done to all rows


def best_assignment(similarity: np.ndarray) -> np.ndarray:
    """The one-to-one matching of rows to columns with the largest sum of similarities.

    Hungarian matching by shortest augmenting paths, after Jonker and Volgenant (1987): rows bid
    for their best columns first, and only those that are left over search for a path. Ties go to
    the lower column, so the result is a function of the input.

    Args:
        similarity: [L, M] floats with L ≤ M, finite; is not changed.

    Returns:
        The column of each row, int64 [L].

    Raises:
        ValueError: more rows than columns, or a value that is not finite.
    """
    n_rows, n_columns = similarity.shape
    if n_rows > n_columns:
        raise ValueError(
            f"{n_rows} rows and {n_columns} columns: at most as many rows as columns; give it "
            "transposed"
        )
    if not np.isfinite(similarity.sum(axis=1, dtype=np.float64)).all():
        raise ValueError("a value is not finite")
    matching = Matching(similarity)
    matching.bid(np.arange(n_rows))
    for row in np.flatnonzero(matching.column_of < 0):
        matching.augment(int(row))
    return matching.column_of


class Matching:
    """A partial matching with prices: every matched row has its column at the best surplus.

    The surplus of row i at column j is similarity[i, j] - price[j]. Prices are 0 for columns that
    were never matched and never negative, which is what makes a complete matching the best one.
    """

    def __init__(self, similarity: np.ndarray) -> None:
        n_rows, n_columns = similarity.shape
        self.similarity = similarity
        self.price = np.zeros(n_columns)
        self.column_of = np.full(n_rows, -1, dtype=np.int64)
        self.row_of = np.full(n_columns, -1, dtype=np.int64)

    def bid(self, rows: np.ndarray, rounds: int = 1000) -> None:
        """Rows without a column bid for their best one, a round at a time; some are left over.

        A bid is what makes the second best column as good. The highest bid has the column, and the
        row that had it is without one again. A round costs little, and a path a hundred times that.
        """
        for _ in range(rounds):
            best, bids = self.bids(rows)
            # Of several bids for a column the highest, of equal ones that of the first row.
            order = np.lexsort((rows, -bids, best))
            first = np.ones(len(order), dtype=bool)
            first[1:] = best[order][1:] != best[order][:-1]
            won = order[first]
            # A bid of nothing on a column that is taken only passes it on.
            won = won[(bids[won] > 0) | (self.row_of[best[won]] < 0)]
            if not len(won):
                return
            columns, winners = best[won], rows[won]
            before = self.row_of[columns]
            self.column_of[before[before >= 0]] = -1
            self.row_of[columns], self.column_of[winners] = winners, columns
            self.price[columns] += bids[won]
            rows = np.flatnonzero(self.column_of < 0)

    def bids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row its best column, and how much better that is than its second best one."""
        best, bids = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
        for at in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(at, at + ROWS_AT_ONCE)
            surplus = self.similarity[rows[part]] - self.price
            each = np.arange(len(surplus))
            best[part] = surplus.argmax(axis=1)
            most = surplus[each, best[part]]
            surplus[each, best[part]] = -np.inf
            bids[part] = most - surplus.max(axis=1) if surplus.shape[1] > 1 else 0.0
        return best, bids

    def augment(self, row: int) -> None:
        """Gives a row a column, along the path that costs the others least (Dijkstra)."""
        open_price = self.price.copy()  # infinite for columns that the search is done with
        # What it costs to come to each column, and the row from which.
        cost = open_price - self.similarity[row]
        through = np.full(len(cost), row, dtype=np.int64)
        done: list[int] = []
        reached: list[float] = []
        base = -float(cost.min())  # costs count from the row's own best surplus
        cost += base
        new = np.empty_like(cost)
        free = np.flatnonzero(self.row_of < 0)
        while True:
            column = int(cost.argmin())
            least = float(cost[column])
            nearest = int(free[cost[free].argmin()])
            if cost[nearest] <= least:  # of equal ones a free one, or ties would be searched all
                column = nearest
                break
            owner = int(self.row_of[column])
            done.append(column)
            reached.append(least)
            surplus = float(self.similarity[owner, column]) - self.price[column]
            np.subtract(open_price, self.similarity[owner], out=new)
            new += least + surplus
            open_price[column] = cost[column] = np.inf
            new[column] = np.inf
            better = new < cost
            np.copyto(cost, new, where=better)
            through[better] = owner
        self.price[done] += least - np.array(reached)
        while True:
            owner = int(through[column])
            self.row_of[column] = owner
            column, self.column_of[owner] = int(self.column_of[owner]), column
            if owner == row:
                return
