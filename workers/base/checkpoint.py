"""Where a base's tensors come from: a Hugging Face checkpoint's safetensors files, read lazily, by
name, only what is asked for; or a seed.

Files are memory-mapped and closed again after every read, so that pages which were copied don't
stay resident.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from populace.storage.errors import InvalidInput
from populace.workers.base.families import is_random
from populace.workers.device import Device

_INDEX = "model.safetensors.index.json"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Weights(Protocol):
    """A base's tensors by their names on disk."""

    bytes_read: int
    """Size on disk of everything that was read."""

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Give memory that is there these tensors' values, in its dtype, wherever it is.
        `InvalidInput` names a tensor that isn't there, or has another shape."""


def weights_of(folder: Path, device: Device) -> Weights:
    """The weights of a base, for tensors that are on `device`."""
    if is_random(str(folder)):
        from populace.workers.base.seeded import SeededWeights

        return SeededWeights(folder, device)
    return SafetensorsFolder(folder)


class SafetensorsFolder:
    """Names and places of a folder's tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._file_of: dict[str, str] = {}
        if (folder / _INDEX).is_file():
            self._file_of = json.loads((folder / _INDEX).read_text())["weight_map"]
        else:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    self._file_of |= dict.fromkeys(file.keys(), path.name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file_of)

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, mapped in self._mapped(targets):
            if mapped.shape != targets[name].shape:
                raise InvalidInput(
                    f"tensor {name!r} of base {str(self.folder)!r} has the shape "
                    f"{tuple(mapped.shape)}, and by its config.json {tuple(targets[name].shape)}; "
                    "give it the config.json that the tensors were saved with"
                )
            targets[name].copy_(mapped)

    def _mapped(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name not in self._file_of or not (self.folder / self._file_of[name]).is_file():
                raise InvalidInput(
                    f"base {str(self.folder)!r} has no tensor {name!r}; save it with "
                    "model.save_pretrained(folder)"
                )
        for file_name in sorted({self._file_of[name] for name in names}):
            with safe_open(self.folder / file_name, framework="pt") as file:
                for name in names:
                    if self._file_of[name] == file_name:
                        mapped = file.get_tensor(name)
                        if mapped.dtype not in _DTYPES:
                            raise InvalidInput(
                                f"tensor {name!r} of base {str(self.folder)!r} is {mapped.dtype}; "
                                "convert the "
                                "checkpoint to bfloat16"
                            )
                        self.bytes_read += mapped.nbytes
                        yield name, mapped
