"""Who may touch which memory when: streams, events and the host as vector clocks.

Every stream counts what it was asked to do, and knows how far others had come when it waited for
them. Touching what somebody else touched, without knowing that it is over, is a hazard: on a real
device it happens now and then, here always.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

HOST = "host"
Clock = dict[str, int]


def merge(into: Clock, other: Clock) -> None:
    for name, tick in other.items():
        into[name] = max(into.get(name, 0), tick)


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    _numbers = itertools.count()

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"stream {next(self._numbers)}"
        self.knows: Clock = {}
        self.ticks = 0

    def wait_stream(self, other: Stream) -> None:
        merge(self.knows, other.now())

    def wait_event(self, event: Event) -> None:
        merge(self.knows, event.knows)

    def now(self) -> Clock:
        return {**self.knows, self.name: self.ticks}


class Event:
    """Stands in for `torch.cuda.Event`."""

    host: Stream
    on_wait: Callable[[str], None]

    def __init__(self, enable_timing: bool = False) -> None:
        self.knows: Clock = {}

    def record(self, stream: Stream) -> None:
        self.knows = stream.now()

    def synchronize(self) -> None:
        if any(self.host.knows.get(name, 0) < tick for name, tick in self.knows.items()):
            self.on_wait("Event.synchronize")
        merge(self.host.knows, self.knows)

    def query(self) -> bool:
        return all(self.host.knows.get(name, 0) >= tick for name, tick in self.knows.items())


@dataclass(slots=True)
class Memory:
    """One storage."""

    place: str
    """`device`, `pinned` or `pageable`."""
    born: str
    """The stream that it was allocated on, and whose it is again when it is freed."""
    ref: StorageWeakRef
    first: int
    size: int
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)
    kept_for: set[str] = field(default_factory=set)
    """Streams that `record_stream` named."""


class Hazards:
    """All memory that was ever tagged, and what went wrong with it."""

    def __init__(self, on_hazard: Callable[[str], None]) -> None:
        self._memory: dict[int, Memory] = {}
        self._crossing: dict[int, Memory] = {}
        """What more than one stream has touched: looked at when it dies."""
        self._on_hazard = on_hazard
        self.streams: dict[str, Stream] = {}

    def of(self, tensor: Tensor) -> Memory | None:
        """None: memory of the host that nobody tagged."""
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        # The weak reference keeps the address from being given to another storage.
        return None if memory is None or memory.ref.expired() else memory

    def tag(self, tensor: Tensor, place: str, stream: Stream) -> Memory:
        storage = tensor.untyped_storage()
        memory = self._memory[storage._cdata] = Memory(
            place, stream.name, StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()
        )
        return memory

    def at(self, address: int) -> Memory | None:
        """The live memory of the device that holds this address."""
        for memory in self._memory.values():
            is_inside = memory.first <= address < memory.first + memory.size
            if is_inside and memory.place == "device" and not memory.ref.expired():
                return memory
        return None

    def touch(self, stream: Stream, read: Iterable[Memory], written: Iterable[Memory]) -> None:
        """`stream` does one thing that reads and writes these."""
        self.sweep()
        stream.ticks += 1
        for memory, is_write in [*((m, False) for m in read), *((m, True) for m in written)]:
            before = dict(memory.written)
            if is_write:
                merge(before, memory.read)
            for other, tick in before.items():
                if other != stream.name and stream.knows.get(other, 0) < tick:
                    verb = "writes" if is_write else "reads"
                    self._on_hazard(f"{stream.name} {verb} what {other} may still use")
            (memory.written if is_write else memory.read)[stream.name] = stream.ticks
            if memory.place == "device" and stream.name != memory.born:
                self._crossing[id(memory)] = memory

    def sweep(self) -> None:
        """Forget dead memory; what another stream than its own may still use went too early."""
        for number, memory in list(self._crossing.items()):
            if not memory.ref.expired():
                continue
            del self._crossing[number]
            owner = self.streams[memory.born]
            for name, tick in {**memory.read, **memory.written}.items():
                is_known = name == memory.born or owner.knows.get(name, 0) >= tick
                if not is_known and name not in memory.kept_for:
                    self._on_hazard(f"freed while {name} may still use it")
        if len(self._memory) > 4096:
            self._memory = {k: m for k, m in self._memory.items() if not m.ref.expired()}
