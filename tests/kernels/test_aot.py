"""The Triton kernels compile for GPUs that are not here. A few of the builds; `make aot` does all
of them."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
from tests.support.aot import builds, compile_and_check
chosen = [b for b in builds((80, 90, 100), (16,)) if b.height != 16]
for build in chosen:
    result = compile_and_check(build)
    print(build, *result.problems or ("ok",), sep=": ")
"""


def test_every_kernel_compiles_for_every_architecture_without_spills_atomics_or_tf32() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.count(": ")]
    assert len(lines) == 54
    assert [line for line in lines if not line.endswith(": ok")] == []
