"""Compiles every Triton kernel for GPUs that are not here, and checks what came out. `make aot`
writes the table.

Needs a process without TRITON_INTERPRET. No driver, no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from populace.kernels import triton_experts, triton_lora
from populace.kernels.route import SHORT, TALL
from populace.kernels.triton_lora import CHUNK, block_of_rank, config_of

ARCHITECTURES = (80, 90, 100)
RANKS = (8, 16, 32, 64, 128)
"""Both kinds of rank that are computed as 16: strides of multiples of 16 are loaded otherwise."""
EXPERTS = "Y = X Wᵀ of experts"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_REGISTERS = 255
MAX_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Build:
    """One kernel as one product uses it."""

    product: str
    kernel: str
    height: int
    rank: int
    dtype: str
    architecture: int

    def __str__(self) -> str:
        return (
            f"{self.product} height {self.height} rank {self.rank} {self.dtype} "
            f"sm_{self.architecture}"
        )


@dataclass(frozen=True)
class Result:
    build: Build
    registers: int
    stack: int
    shared: int
    mma: str
    problems: tuple[str, ...]


# Which of the adapter's tensors: A is [R, D], B is [F, R].
PRODUCTS = {
    "S = X Aᵀ": ("reduce", "a"),
    "dS = dY B": ("reduce", "b"),
    "Y += S Bᵀ": ("spread", "b"),
    "dX += dS A": ("spread", "a"),
    "dA = dSᵀ X": ("outer", "a"),
    "dA += dSᵀ X": ("outer", "a"),
    "dB = dYᵀ S": ("outer", "b"),
    "dB += dYᵀ S": ("outer", "b"),
}


def builds(architectures: Sequence[int], ranks: Sequence[int]) -> Iterator[Build]:
    for product, (kernel, _) in PRODUCTS.items():
        for architecture in architectures:
            for dtype in DTYPES:
                for rank in ranks:
                    for height in (TALL,) if kernel == "outer" else (SHORT, TALL):
                        yield Build(product, kernel, height, rank, dtype, architecture)
    for architecture in architectures:
        for dtype in DTYPES:
            yield Build(EXPERTS, "experts", TALL, 0, dtype, architecture)


def compile_and_check(build: Build) -> Result:
    function, constants, options = _how(build)
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = _type_of(name, build)
            # Rows of S are as wide as the widest rank.
            is_rank = name in ("s_stride", "out_stride", "most")
            attributes[place,] = [] if is_rank and build.rank % 16 else [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", build.architecture, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (
        int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK")
    )  # type: ignore[union-attr]
    ptx = compiled.asm["ptx"]
    mma = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "fma")
    shared = compiled.metadata.shared
    return Result(
        build,
        registers,
        stack,
        shared,
        mma,
        tuple(_problems(build, ptx, registers, stack, shared, mma)),
    )


def _how(build: Build) -> tuple[Any, dict[str, object], dict[str, object]]:
    """The kernel, its constants and the compiler's options."""
    if build.kernel == "experts":
        constants: dict[str, object] = {
            "w_stride_k": 1, "HEIGHT": TALL, "BLOCK": triton_experts.BLOCK,
            "STEP": triton_experts.STEP,
        }  # fmt: skip
        return triton_experts.experts_kernel, constants, triton_experts.OPTIONS
    config = config_of(build.kernel, build.height, block_of_rank(build.rank), DTYPES[build.dtype])
    constants = {
        "IS_B": PRODUCTS[build.product][1] == "b", "BLOCK": config.block, "BLOCK_R": config.block_r
    }  # fmt: skip
    if build.kernel == "outer":
        constants |= {"ACCUMULATES": "+=" in build.product, "CHUNK": CHUNK}
    else:
        constants["HEIGHT"] = build.height
    return getattr(triton_lora, f"{build.kernel}_kernel"), constants, config.options


def _type_of(name: str, build: Build) -> str:
    if name in ("x", "s", "y", "p", "out", "w"):
        return f"*{build.dtype}"
    if name == "scale_S":
        return "*fp32"
    if name == "tiles":
        return "*i32"
    return "*i64" if name in ("addresses_S", "rank_S") else "i32"


def expected_mma(build: Build) -> str:
    """Tensor cores of the architecture wherever a tile is as tall as they want; fp32 stays
    exact."""
    if build.dtype == "fp32":
        return "fma"
    if build.architecture == 80 or build.height == SHORT:
        return "mma.sync"
    return {90: "wgmma", 100: "tcgen05.mma"}[build.architecture]


def _problems(
    build: Build, ptx: str, registers: int, stack: int, shared: int, mma: str
) -> Iterator[str]:
    if stack:
        yield f"{stack} bytes of stack: registers spill"
    if registers > MAX_REGISTERS:
        yield f"{registers} registers"
    if shared > MAX_SHARED_BYTES[build.architecture]:
        yield f"{shared} bytes of shared memory"
    if re.search(r"\b(atom|red)\.(global|shared)", ptx):
        yield "atomics"
    if build.dtype == "fp32" and "tf32" in ptx:
        yield "TF32 in an fp32 build"
    if mma != expected_mma(build):
        yield f"{mma} instead of {expected_mma(build)}"


def main(path: Path) -> int:
    results = []
    with ProcessPoolExecutor() as pool:
        for result in pool.map(compile_and_check, builds(ARCHITECTURES, RANKS)):
            results.append(result)
            print(result.build, *result.problems, flush=True)
    failed = [result for result in results if result.problems]
    path.write_text(_table(results, failed))
    print(f"{len(results)} builds, {len(failed)} with problems; {path}")
    return bool(failed)


def _table(results: Sequence[Result], failed: Sequence[Result]) -> str:
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Written by `make aot` with Triton {triton.__version__}: {len(results)} builds for GPUs "
        "that were not there, "
        f"{len(failed)} with problems. Checked: no stack (no spills), at most {MAX_REGISTERS} "
        "registers, shared memory "
        "within the architecture, no atomics, no TF32 in fp32, the expected matrix instructions. "
        "Nothing is timed.",
        "",
        "| product | tile height | rank | dtype | sm | registers | stack | shared KiB | "
        "instructions | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        build = result.build
        lines.append(
            f"| {build.product} | {build.height} | {build.rank} | {build.dtype} | "
            f"{build.architecture} | "
            f"{result.registers} | {result.stack} | {result.shared / 1024:.0f} | {result.mma} | "
            f"{'; '.join(result.problems)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
