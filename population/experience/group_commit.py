"""Group commit: rows of many callers become one segment."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from populace.population.experience.log import ExperienceLog
from populace.population.experience.segments import Row
from populace.storage.errors import InvalidInput, Overloaded

ROWS_PER_SEGMENT = 4096


class GroupCommit:
    """Gathers rows of many callers into segments: one writer per partition, which takes all that
    waits whenever it is free. `linger_s`: how long it lets more come in first."""

    def __init__(
        self, logs: Mapping[int, ExperienceLog], linger_s: float, max_waiting_bytes: int
    ) -> None:
        self._logs, self._linger_s, self._max_waiting_bytes = logs, linger_s, max_waiting_bytes
        self._lock = threading.Condition()
        self._waiting: dict[int, deque[_Entry]] = {}
        self._waiting_bytes = 0
        self._bytes_per_s = 1e6
        """Speed of what was written lately: how long somebody who is refused has to wait."""
        self._closed = False

    def submit(self, rows: Mapping[int, Sequence[Row]]) -> list[Future[None]]:
        """Partition -> rows, all or none; each future is done when its rows are durable.
        `Overloaded` when more waits than `max_waiting_bytes`."""
        entries = {partition: _Entry(own) for partition, own in rows.items() if own}
        size = sum(entry.size_bytes for entry in entries.values())
        with self._lock:
            if self._closed:
                raise InvalidInput("this producer is closed; open another one")
            if self._waiting_bytes and self._waiting_bytes + size > self._max_waiting_bytes:
                retry_after_s = max(0.05, self._waiting_bytes / self._bytes_per_s)
                raise Overloaded(
                    f"{self._waiting_bytes / 1e6:.1f} MB of events wait to be written, at most "
                    f"{self._max_waiting_bytes / 1e6:g} (stream.max_waiting_mb); try again in "
                    f"{retry_after_s:.2f} s",
                    retry_after_s,
                )
            for partition, entry in entries.items():
                if partition not in self._waiting:
                    self._waiting[partition] = deque()
                    name = f"populace-commit-{partition}"
                    threading.Thread(
                        target=self._write, args=(partition,), name=name, daemon=True
                    ).start()
                self._waiting[partition].append(entry)
            self._waiting_bytes += size
            self._lock.notify_all()
        return [entry.written for entry in entries.values()]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def _write(self, partition: int) -> None:
        """The writer of a partition."""
        waiting, log = self._waiting[partition], self._logs[partition]
        while True:
            with self._lock:
                while not waiting and not self._closed:
                    self._lock.wait()
                if not waiting:
                    return
            if self._linger_s:
                time.sleep(self._linger_s)
            group = self._take(waiting)
            started = time.monotonic()
            try:
                rows = [row for entry in group for row in entry.rows]
                for start in range(0, len(rows), ROWS_PER_SEGMENT):
                    log.append(rows[start : start + ROWS_PER_SEGMENT])
                error: BaseException | None = None
            except BaseException as caught:  # every caller is told; the next group is tried anew
                error = caught
            size = sum(entry.size_bytes for entry in group)
            with self._lock:
                self._waiting_bytes -= size
                rate = size / max(1e-6, time.monotonic() - started)
                self._bytes_per_s = max(1e3, 0.8 * self._bytes_per_s + 0.2 * rate)
            for entry in group:
                if error is None:
                    entry.written.set_result(None)
                else:
                    entry.written.set_exception(error)

    def _take(self, waiting: deque[_Entry]) -> list[_Entry]:
        """What goes into the next segment: whole calls, in order."""
        group: list[_Entry] = []
        num_rows = 0
        with self._lock:
            while waiting and (not group or num_rows + len(waiting[0].rows) <= ROWS_PER_SEGMENT):
                group.append(waiting.popleft())
                num_rows += len(group[-1].rows)
        return group


class _Entry:
    """One call's rows for one partition."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.written = rows, Future[None]()
        self.written.set_running_or_notify_cancel()  # who stops waiting for it doesn't stop it
        self.size_bytes = sum(len(row["sealed"]) + 100 for row in rows)
