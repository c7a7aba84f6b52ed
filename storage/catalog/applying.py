"""How each record of the revision log changes the catalog."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


@functools.cache
def _spec_json(items: tuple[tuple[str, Any], ...]) -> str:
    return json.dumps(dict(items))


def _digests(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 32)
