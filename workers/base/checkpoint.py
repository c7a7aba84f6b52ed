"""A Hugging Face checkpoint's safetensors files, read lazily: by name, only what is asked for.

Files are memory-mapped and closed again after every read, so that pages which were copied don't
stay resident.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from populace.storage.errors import InvalidInput
from populace.workers.device import Device

_INDEX = "model.safetensors.index.json"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SafetensorsFolder:
    """Names and places of a folder's tensors."""

    def __init__(self, folder: Path, device: Device | None = None) -> None:
        """`device`: where tensors are read to; needed to read any."""
        self.folder, self._device = folder, device
        self.bytes_read = 0
        """Size on disk of everything that was read."""
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

    def read(self, wanted: Mapping[str, torch.dtype]) -> list[Tensor]:
        """Copies of these tensors in these dtypes; `InvalidInput` names one that isn't there."""
        assert self._device is not None
        found: dict[str, Tensor] = {}
        for name, mapped in self._mapped(wanted):
            found[name] = self._device.place(mapped, wanted[name])
        return [found[name] for name in wanted]

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read a tensor straight into memory that is there."""
        for name, mapped in self._mapped(targets):
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
