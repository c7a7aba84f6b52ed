"""Evidence: what a revision learned from, as it is stored."""

from __future__ import annotations

import dataclasses

import numpy as np

from populace.workers.evidence import decode_evidence, encode_evidence
from tests.support.groups import group


def test_evidence_comes_back_whole() -> None:
    groups = (group("task", 0.0, 1.0), dataclasses.replace(group("trajectory", 0.5), event_id="f"))
    again = decode_evidence(encode_evidence(groups))
    assert encode_evidence(again) == encode_evidence(groups)
    assert [item.kind for item in again] == ["task", "trajectory"]
    np.testing.assert_array_equal(again[0].samples[0].sample.expert_ids, np.ones((3, 2, 2)))
    assert again[0].samples[1].sample.expert_ids is None
