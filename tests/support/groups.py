"""Groups of samples as a step gets them, made up."""

from __future__ import annotations

import numpy as np

from populace.workers.batch import ExperienceKind, Sample, ScoredSample, TrainGroup


def group(kind: ExperienceKind | str, *rewards: float, gap: float = 0.0) -> TrainGroup:
    return TrainGroup(
        event_id="e",
        kind=ExperienceKind(kind),
        prompt_ids=np.arange(3, dtype=np.int32),
        prompt_expert_ids=np.ones((3, 2, 2), np.int16),
        samples=tuple(
            ScoredSample(
                sample=Sample(
                    completion_ids=np.arange(4, dtype=np.int32),
                    logprobs=np.full(4, -1.0 + gap * place, np.float32),
                    expert_ids=None if place else np.ones((3, 2, 2), np.int16),
                    finished=bool(place % 2),
                ),
                reward=reward,
                base_logprobs=np.full(4, -1.0, np.float32),
            )
            for place, reward in enumerate(rewards)
        ),
    )
