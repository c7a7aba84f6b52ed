"""What follows from an event or a user alone: held out or not, and the partition."""

from __future__ import annotations

import numpy as np

from populace.population.experience.events import is_held_out
from populace.population.experience.segments import partition_of


def test_the_heldout_share_is_kept_and_depends_on_the_id_alone() -> None:
    held = [is_held_out(f"event-{number}", b"k" * 32, 0.2) for number in range(5000)]
    assert 0.17 < sum(held) / 5000 < 0.23
    assert held == [is_held_out(f"event-{number}", b"k" * 32, 0.2) for number in range(5000)]


def test_partitions_are_even_and_fixed() -> None:
    counts = np.bincount([partition_of(f"user-{n}", 4) for n in range(4000)], minlength=4)
    assert counts.min() > 850
    assert partition_of("ada", 4) == partition_of("ada", 4)
