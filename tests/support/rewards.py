"""Rewards that tests register."""

from __future__ import annotations

import os
import signal
import time

from populace.population.waves.rewards import Reply


def letters(reply: Reply, *, letter: str = "e") -> float:
    """Share of a letter: spread is certain on a random base."""
    return reply.text.count(letter) / max(1, len(reply.text))


def length(reply: Reply) -> float:
    return len(reply.text) % 7 / 7


def constant(reply: Reply) -> float:
    return 0.5


def raising(reply: Reply) -> float:
    raise RuntimeError("this reward is broken")


def hanging(reply: Reply) -> float:
    time.sleep(3600)
    return 0.0


def not_a_number(reply: Reply) -> float:
    return float("nan")


def dying(reply: Reply) -> float:
    os._exit(1)


def deaf(reply: Reply) -> float:
    """Hangs where no alarm reaches it."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(3600)
    return 0.0
