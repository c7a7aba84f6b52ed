"""Bases of well-known dimensions whose weights are drawn from a seed: for measuring speed and
memory without a checkpoint.

Such a base is a folder like any other, with a config and a tokenizer, and `random.json` where
others have tensors. What is drawn differs from one kind of device to another, so nothing that was
learned on it is worth keeping.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from populace.workers.base.families import RANDOM_FILE
from populace.workers.base.footprint import config_of
from populace.workers.device import Device

SEED = 0
STD = 0.02
"""What most families initialise with; keeps the scale of hidden states at these widths."""
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_seeded(name: str, folder: Path) -> None:
    """Write the base `random:PRESET[:LAYERS]` into `folder`, kilobytes in all. `InvalidInput` for
    another name."""
    config = config_of(name)
    tokenizer = _tokenizer()
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RANDOM_FILE).write_text(json.dumps({"seed": SEED}))


class SeededWeights:
    """The tensors of a folder with a `random.json`, each from its own name and the seed: shards and
    orders of reading don't matter."""

    bytes_read = 0

    def __init__(self, folder: Path, device: Device) -> None:
        self._seed, self._device = json.loads((folder / RANDOM_FILE).read_text())["seed"], device

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Normal values for matrices, ones for norms, zeros for biases."""
        for name, target in targets.items():
            if name.endswith("bias"):
                target.zero_()
            elif target.ndim == 1:
                target.fill_(1.0)
            else:
                digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
                self._device.draw_normal(target, int.from_bytes(digest[:7]), STD)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the two tokens of a chat; other ids of the vocabulary have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={byte: n for n, byte in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_TEMPLATE,
    )
