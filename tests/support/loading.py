"""What loading a shard of a base adds to a process, which has loaded a tiny one before: in a
process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from populace.workers.base.model import BaseModel
from populace.workers.device import Device


def measure(folder: Path, rank: int, num_shards: int, tiny: Path) -> dict[str, int]:
    """Bytes: `grown`, the peak of memory above what was there before; `held` in tensors; `read`
    from the checkpoint."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.loading",
            str(folder),
            str(rank),
            str(num_shards),
            str(tiny),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status(field: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _main(folder: str, rank: str, num_shards: str, tiny: str) -> None:
    device = Device(torch.float32)
    BaseModel(Path(tiny), device)  # code and allocator, before anything is counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    model = BaseModel(Path(folder), device, int(rank), int(num_shards))
    tensors = [*model.decoder.parameters(), model.head_VD, model.embeddings_VD]
    for layer in model.decoder.layers:
        tensors += [layer.mlp.experts.gate_up_EOD, layer.mlp.experts.down_EDI]
    held = sum(tensor.numel() * 4 for tensor in tensors)
    print(json.dumps({"grown": _status("VmHWM") - before, "held": held, "read": model.bytes_read}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
