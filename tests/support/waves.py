"""Waves of random tokens, for what measures a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    ExperienceKind,
    Sample,
    ScoredSample,
    TrainGroup,
    WaveBatch,
)


def token_ids(number: int, tokens: int, vocabulary: int) -> np.ndarray:
    """`tokens` of them and one before, always the same of a number."""
    return np.random.default_rng([7, number]).integers(2, vocabulary, tokens + 1).astype(np.int32)


def demonstration(number: int, tokens: int, vocabulary: int) -> TrainGroup:
    """A sequence to be learned by likelihood: a prompt of one token and a completion."""
    ids = token_ids(number, tokens, vocabulary)
    sample = Sample(completion_ids=ids[1:], logprobs=None, expert_ids=None, finished=True)
    return TrainGroup(
        event_id=str(number),
        kind=ExperienceKind.DEMONSTRATION,
        prompt_ids=ids[:1],
        prompt_expert_ids=None,
        samples=(ScoredSample(sample=sample, reward=1.0, base_logprobs=None),),
    )


def likelihood_wave(
    keys: Sequence[AdapterKey],
    tokens: int,
    vocabulary: int,
    *,
    groups: int = 1,
    numbers: Mapping[AdapterKey, int] | None = None,
) -> WaveBatch:
    """Every adapter learns `groups` sequences of its own. `numbers`: whose sequences each one gets,
    where that is not its place."""
    return WaveBatch(
        adapters=tuple(
            AdapterBatch(
                adapter=key,
                groups=tuple(
                    demonstration(
                        (place if numbers is None else numbers[key]) * groups + i,
                        tokens,
                        vocabulary,
                    )
                    for i in range(groups)
                ),
            )
            for place, key in enumerate(keys)
        )
    )


class timing:
    """Times the calls of one function of a module; `wait` is called before each look at the
    clock."""

    def __init__(self, module: object, name: str, wait: Callable[[], object] = int) -> None:
        self.module, self.name, self.wait, self.seconds = module, name, wait, []

    def __enter__(self) -> list[float]:
        self.original = original = getattr(self.module, self.name)

        def timed(*arguments: object, **named: object) -> object:
            self.wait()
            start = time.perf_counter()
            result = original(*arguments, **named)
            self.wait()
            self.seconds.append(time.perf_counter() - start)
            return result

        setattr(self.module, self.name, timed)
        return self.seconds

    def __exit__(self, *_: object) -> None:
        setattr(self.module, self.name, self.original)
