"""Triton's kernels, compiled, against fp64; what had to be compiled that was not brought along."""

from __future__ import annotations

from typing import Any

import triton

from tests.gpu_check.check import Check
from tests.kernels import test_gpu
from tests.support.products import CASES, DTYPES

DRY_CASES = 2
"""Of each kind; the interpreter takes seconds for the larger ones."""


def kernels(check: Check) -> None:
    names, dtypes = [*CASES, *test_gpu.BIG], list(DTYPES)
    if check.dry:
        names, dtypes = names[:DRY_CASES], ["float32"]
    with counting() as compiled, check.device():
        for name in names:
            for dtype in dtypes:
                with check.trying(f"{name} in {dtype} against fp64"):
                    test_gpu.test_values_and_gradients_match_fp64(name, dtype)
        if not check.dry:
            with check.trying("gradients that are added"):
                test_gpu.test_gradients_are_added_when_the_plan_says_so()
            for name in test_gpu.BIG:
                with check.trying(f"the plan of {name}"):
                    test_gpu.test_a_plan_is_the_one_that_a_cpu_makes_and_asks_nothing(name)
                for dtype in ("float32", "bfloat16"):
                    with check.trying(f"bits of {name} in {dtype}"):
                        test_gpu.test_a_segments_bits_are_its_own(name, dtype)
    hits = sum(compiled)
    check.say(f"{len(compiled)} builds of kernels, {len(compiled) - hits} of them compiled here")


class counting:
    """Which builds of kernels were found in the cache: True for each that was."""

    def __enter__(self) -> list[bool]:
        self.hits: list[bool] = []

        def listen(*_: Any, cache_hit: bool, **__: Any) -> None:
            self.hits.append(cache_hit)

        self.before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = listen
        return self.hits

    def __exit__(self, *_: object) -> None:
        triton.knobs.compilation.listener = self.before
