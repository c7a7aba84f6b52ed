"""The tables of a device's plan, made with NumPy on the host, one segment after another: the truth
for `kernels/route.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from populace.kernels.route import SHORT, TALL

Table = NDArray[np.int64]


def order_of(expert_TK: Table, slot_T: Table, num_slots: int) -> Table:
    """Which (row, k) pair lies at each place: by expert, then by slot, rows without one last."""
    num_rows, top_k = expert_TK.shape
    pairs = [(row, k) for row in range(num_rows) for k in range(top_k)]

    def key(pair: tuple[int, int]) -> tuple[int, int]:
        row, k = pair
        slot = int(slot_T[row])
        return int(expert_TK[row, k]), slot if slot >= 0 else num_slots

    return np.array([row * top_k + k for row, k in sorted(pairs, key=key)], np.int64)


def segments_of(expert_R: Table, slot_R: Table) -> Table:
    """[G, 4] first row, rows, slot, expert of neighbouring rows that share slot and expert."""
    found: list[list[int]] = []
    for row, (expert, slot) in enumerate(zip(expert_R.tolist(), slot_R.tolist(), strict=True)):
        if slot < 0:
            continue
        if found and found[-1][0] + found[-1][1] == row and found[-1][2:] == [slot, expert]:
            found[-1][1] += 1
        else:
            found.append([row, 1, slot, expert])
    return np.array(found, np.int64).reshape(-1, 4)


def tiles_of(segment_G4: Table, heights: Sequence[int] = (SHORT, TALL)) -> dict[int, Table]:
    """Tiles by height: a segment is cut into tiles of the lowest height that holds it, else of the
    largest."""
    found: dict[int, list[list[int]]] = {height: [] for height in heights}
    for first, count, slot, expert in segment_G4.tolist():
        height = next((height for height in heights if count <= height), heights[-1])
        for offset in range(0, count, height):
            found[height].append([first + offset, min(height, count - offset), slot, expert])
    return {height: np.array(own, np.int64).reshape(-1, 4) for height, own in found.items()}
