"""Which partitions a controller should claim and release. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def share_out(
    me: str, holders: Mapping[int, str | None], living: Collection[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The partitions that `me` should claim, and those that it should release. `holders`: partition
    -> who holds it, None for nobody alive; `living`: controllers whose heartbeat is seen.

    Everybody gets as many as everybody else, give or take one. Only what nobody holds is claimed,
    and what is above the fair share is released only while somebody has less than its own."""
    controllers = sorted({*living, me})
    fair, extra = divmod(len(holders), len(controllers))
    targets = {name: fair + (rank < extra) for rank, name in enumerate(controllers)}
    held = {
        name: sorted(p for p, holder in holders.items() if holder == name) for name in controllers
    }
    free = sorted(p for p, holder in holders.items() if holder is None)
    wanted = targets[me] - len(held[me])
    if wanted > 0:
        # Controllers take from different ends of what is free, in the order of their names.
        start = sum(max(0, targets[name] - len(held[name])) for name in controllers if name < me)
        return tuple((free[start:] + free[:start])[:wanted]), ()
    somebody_waits = any(targets[name] > len(held[name]) for name in controllers if name != me)
    surplus = held[me][targets[me] :] if somebody_waits and not free else []
    return (), tuple(surplus)
