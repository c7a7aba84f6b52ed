"""Fills Triton's cache with the binaries that the check will want on an H100 or H200, on a machine
without a GPU: `TRITON_CACHE_DIR=FOLDER python -m tests.gpu_check.cache`, with the Triton that is
there.

The check's own launches are made, on a pretended device: they compile for sm_90 under the very keys
that they will have there, and run nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget

from populace.configs.schema import TrainSettings
from populace.workers.shapes import AdapterSpec
from tests.gpu_check.check import Check, pretended
from tests.gpu_check.kernels import counting
from tests.gpu_check.large import ATTENTION, EVERYTHING, open_bench
from tests.gpu_check.small import SPEC, engine, keys_of, request_of, train
from tests.kernels import test_gpu
from tests.support import tiny
from tests.support.parity import two_steps
from tests.support.products import CASES, DTYPES
from tests.support.waves import likelihood_wave

TARGET = GPUTarget("cuda", 90, 32)


class Compiles:
    """A driver of Triton's whose kernels are compiled and never run."""

    launcher_cls = staticmethod(lambda *_: lambda *_: None)
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda *_: (0, 0, 0, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launches(check: Check, folder: Path) -> list[Callable[[], Any]]:
    """Everything that launches kernels. What comes out of it is nothing: no kernel runs."""
    cases = [
        lambda name=name, dtype=dtype: test_gpu.test_values_and_gradients_match_fp64(name, dtype)
        for name in (*CASES, *test_gpu.BIG)
        for dtype in DTYPES
    ]
    cases.append(test_gpu.test_gradients_are_added_when_the_plan_says_so)
    cases += [
        lambda name=name, dtype=dtype: test_gpu.test_a_segments_bits_are_its_own(name, dtype)
        for name in test_gpu.BIG
        for dtype in ("float32", "bfloat16")
    ]
    bases = {family: tiny.build(family, folder / family) for family in tiny.FAMILIES}
    for base in bases.values():
        for dtype in ("float32", "bfloat16"):
            for rows in (4096, 16):  # 16: gradients of later passes are added
                cases.append(
                    lambda base=base, dtype=dtype, rows=rows: list(
                        two_steps(engine(base, "cuda", dtype, slots=4, max_rows=rows))
                    )
                )
    cases += [lambda spec=spec: large(check, spec) for spec in (ATTENTION, EVERYTHING)]
    cases += [
        lambda dtype=dtype, spec=spec: alike(bases["qwen3_moe"], dtype, spec)
        for dtype in ("float32", "bfloat16")
        for spec in (SPEC, replace(SPEC, rank=4, expert_rank=1))
    ]
    return cases


def alike(base: Path, dtype: str, spec: AdapterSpec) -> None:
    """Adapters of one rank: a rank of 1 is a build of its own."""
    there = engine(base, "cuda", dtype, max_rows=16)
    keys = keys_of(3)
    train(there, keys, 20, spec)
    there.roll_out([request_of(key, 3) for key in keys])


def large(check: Check, spec: AdapterSpec) -> None:
    """One layer of the base of real size, with passes that add and one that doesn't."""
    own = open_bench(check, "random:qwen3-30b-a3b:1", spec, 2)
    for rows in (4096, 16):
        keys = own.admit(2)
        passes = TrainSettings(max_rows_per_pass=rows, kl_coefficient=0.0)
        own.engine.settings = replace(own.engine.settings, train=passes)
        own.engine.train_wave(likelihood_wave(keys, 20, own.vocabulary))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    triton.runtime.driver.set_active(Compiles())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, counting() as hits:
        check = Check(dry=False, out=Path(name), seconds=3600.0)
        os.environ["POPULACE_CACHE"] = name
        with pretended().here():
            for launch in launches(check, Path(name)):
                # Numbers that no kernel wrote are wrong; its build is in the cache by then.
                with suppress(AssertionError):
                    launch()
    print(
        f"{len(hits)} builds for sm_90 with Triton {triton.__version__}, "
        f"{len(hits) - sum(hits)} of them new, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
