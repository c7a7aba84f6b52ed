"""What is to become of an event that was read, and where it lies."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from populace.storage.log.records import Position


class EventState(IntEnum):
    """What is to become of an event that was read; the numbers stand in snapshots."""

    PENDING = 1
    """To be trained on."""
    CLASH = 2
    """To be settled: its id was used before with other content."""
    OUT_OF_ORDER = 3
    """To be settled: its id is an integer that doesn't increase."""
    HELD = 4
    """Kept for evaluation."""
    COMMAND = 5
    """To be obeyed; only in snapshots, never in the index."""


REASONS = {
    EventState.CLASH: "event id reused with other content",
    EventState.OUT_OF_ORDER: "event id does not increase: integer ids of a user must",
}


class EventAt(NamedTuple):
    """An event that waits, or is held out."""

    position: Position
    state: EventState
