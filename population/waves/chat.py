"""Text to tokens and back, by the base's own tokenizer and chat template."""

from __future__ import annotations

import hashlib

import numpy as np
from transformers import AutoTokenizer

from populace.population.experience.events import Messages, messages_of
from populace.workers.batch import Ints


class Chat:
    """The tokenizer of one base."""

    def __init__(self, base_folder: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base_folder, local_files_only=True)
        self.num_tokens = len(self._tokenizer)
        self.eos_ids = frozenset({int(self._tokenizer.eos_token_id)})

    def prompt_ids(self, prompt: str | Messages) -> Ints:
        """Token ids up to where the assistant's answer begins."""
        encoded = self._tokenizer.apply_chat_template(
            messages_of(prompt), add_generation_prompt=True, return_dict=True
        )
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def completion_ids(self, text: str) -> Ints:
        """Token ids of an answer, its end of turn included."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray([*ids, self._tokenizer.eos_token_id], dtype=np.int32)

    def text(self, completion_ids: Ints) -> str:
        """An answer's text, without special tokens and space around it."""
        decoded: str = self._tokenizer.decode(completion_ids.tolist(), skip_special_tokens=True)
        return decoded.strip()

    def template_digest(self) -> str:
        """sha256 of the chat template: manifests name it among their materials."""
        template = str(self._tokenizer.chat_template)
        return hashlib.sha256(template.encode()).hexdigest()
