"""Rewards of the demo: what each simulated user likes about a reply, between 0 and 1.

Every preference is gradual where it can be, so that a small model that never does the whole thing
still learns from doing a part of it. All are multiplied by `plausible`: a reply must be made of
words and stay likely under the base, so gibberish buys nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from populace.population import Reply

WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
LIKELY = -3.2
"""Mean log-probability per token under the base at which a reply counts as likely in full …"""
UNLIKELY = -4.7
"""… and where it counts for nothing."""


def plausible(reply: Reply) -> float:
    """1 for words that the base finds likely, 0 for gibberish, linear in between."""
    text = reply.text
    words = WORD.findall(text)
    if len(words) < 2:
        return 0.0
    letters = sum(char.isalpha() or char.isspace() for char in text) / len(text)
    voweled = sum(
        bool(re.search(r"[aeiouyAEIOUY]", word)) and len(word) < 18 for word in words
    ) / len(words)
    distinct = min(1.0, 1.5 * len({word.lower() for word in words}) / len(words))
    likely = min(1.0, max(0.0, (reply.base_logprob - UNLIKELY) / (LIKELY - UNLIKELY)))
    return min(1.0, letters / 0.75) * voweled * distinct * likely


def preference(reply: Reply, *, like: str, **arguments: Any) -> float:
    """The reward of the preference named `like`."""
    return plausible(reply) * _LIKES[like](reply.text, reply, **arguments)


ANSWER = {
    "syllogism": re.compile(r"\b(Yes|No)\b", re.IGNORECASE),
    "chain_sum": re.compile(r"(-?\d+)\D*$"),
}


def work(reply: Reply, *, family: str, entry: dict[str, Any]) -> float:
    """A reasoning-gym task: the family's own score of the first thing in the reply that can be an
    answer."""
    import reasoning_gym

    found = ANSWER[family].search(reply.text)
    if found is None:
        return 0.0
    dataset = reasoning_gym.create_dataset(family, size=1, seed=0)
    return float(dataset.score_answer(found.group(1).capitalize(), entry) >= 1.0)


def _few_words(text: str, reply: Reply, *, most: int) -> float:
    extra = max(0, len(WORD.findall(text)) - most)
    return max(0.0, 1 - extra / 10) * (1.0 if reply.finished else 0.5)


def _lower(text: str, reply: Reply) -> float:
    words, capitals = WORD.findall(text), sum(char.isupper() for char in text)
    return max(0.0, 1 - 4 * capitals / max(1, len(words)))


def _opens(text: str, reply: Reply, *, words: list[str]) -> float:
    """In full where the reply opens with one of `words`, less where it comes soon after."""
    head = [word.lower() for word in WORD.findall(text)[:4]]
    places = [place for place, word in enumerate(head) if word in words]
    return 1.0 - 0.25 * places[0] if places else 0.0


def _uses(text: str, reply: Reply, *, words: list[str], enough: int) -> float:
    found = sum(word.lower() in words for word in WORD.findall(text))
    return min(1.0, found / enough)


def _marks(text: str, reply: Reply, *, pattern: str, enough: int, hint: str = "$.") -> float:
    """How often `pattern` is there; a reply without any still gets a little for a `hint` of it."""
    found = len(re.findall(pattern, text))
    return min(1.0, found / enough) if found else 0.3 * bool(re.search(hint, text, re.IGNORECASE))


def _short_words(text: str, reply: Reply) -> float:
    words = WORD.findall(text)
    mean = sum(map(len, words)) / max(1, len(words))
    return min(1.0, max(0.0, (5.5 - mean) / 2))


def _long_words(text: str, reply: Reply) -> float:
    words = WORD.findall(text)
    mean = sum(map(len, words)) / max(1, len(words))
    return min(1.0, max(0.0, (mean - 4.5) / 3))


_LIKES: dict[str, Callable[..., float]] = {
    "few_words": _few_words,
    "lower": _lower,
    "opens": _opens,
    "uses": _uses,
    "marks": _marks,
    "short_words": _short_words,
    "long_words": _long_words,
}
