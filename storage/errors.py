"""The tree of every error that Populace raises on purpose. Each text tells the user what to do
next.

    PopulaceError
    ├── InvalidInput            also a ValueError: a value can't be used; nothing was written
    ├── Overloaded              temporary: nothing was written, send again later
    ├── StoreUnavailable        temporary: nothing was written, the store is away or full
    ├── OutcomeUnknown          temporary: whether it was written isn't known; send it again
    ├── OwnerAlive              another controller is at work
    ├── Fenced                  another controller took over
    ├── Forgotten               the user was erased
    ├── Damaged                 stored bytes are not the committed ones
    ├── UnsafeStore             the store can't keep what commits rest on
    ├── ObjectNotFound          of an object store
    ├── AlreadyExists           of an object store
    ├── ShardGroupLost          temporary: shards died (`workers/actors/group.py`)
    ├── ExchangeBroken          a shard lost the others (`workers/shards/exchange.py`)
    └── NotTheOwner             a shard was asked by a controller that isn't its own

"Temporary" errors have `is_temporary` set: the same call may succeed later, with nothing changed.
"""

from __future__ import annotations


class PopulaceError(Exception):
    """Root of all; picklable, so that it crosses Ray unchanged."""

    is_temporary = False
    """Whether the same may work later, with nothing changed."""


class InvalidInput(PopulaceError, ValueError):
    """A value from outside is impossible. Names the field, the value and the way out; nothing was
    written."""


class ObjectNotFound(PopulaceError):
    """No object has this key."""


class AlreadyExists(PopulaceError):
    """A create found an object there; it doesn't say whose."""


class OutcomeUnknown(PopulaceError):
    """The store did not say whether the write landed."""

    is_temporary = True


class StoreUnavailable(PopulaceError):
    """The store does not answer, or can't write; nothing was written. Try again when it is back."""

    is_temporary = True


class Overloaded(PopulaceError):
    """More was sent than can be written right now; nothing of it was written. Send it again after
    `retry_after_s`."""

    is_temporary = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class UnsafeStore(PopulaceError):
    """A store breaks a promise that commits or erasure rest on; names which."""


class Fenced(PopulaceError):
    """Another controller claimed the partition: this one must stop writing to it."""


class OwnerAlive(PopulaceError):
    """A partition belongs to a controller whose heartbeat is seen."""


class Damaged(PopulaceError):
    """Stored bytes are not what their record says."""


class Forgotten(PopulaceError):
    """This user was erased: nothing of theirs can be read or written again."""
