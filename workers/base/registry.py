"""Bases by name: making `smollm2-moe`, registering local checkpoints, finding both again. Reads
JSON and hashes files; a model is loaded only where one is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from populace.storage.errors import Damaged, InvalidInput
from populace.workers.base.families import RANDOM, check_checkpoint

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
    if name_or_path.startswith(RANDOM):
        return _prepare_seeded(name_or_path, progress)
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
    if name_or_path == SMOLLM2 or name_or_path.startswith(RANDOM):
        raise InvalidInput(
            f"base {name_or_path!r} is not prepared; run `populace base prepare {name_or_path}`"
        )
    folder = Path(name_or_path).absolute()
    check_checkpoint(folder)
    return PreparedBase(name=folder.name, digest=digest_folder(folder), folder=str(folder))


def find_prepared(name: str) -> PreparedBase | None:
    """A base that was prepared or registered under this name; `Damaged` if its files changed."""
    entry = cache_folder() / "bases" / f"{name}.json"
    if os.sep in name or not entry.is_file():
        return None
    try:
        base = PreparedBase(**json.loads(entry.read_text()))
    except (ValueError, TypeError):
        raise Damaged(
            f"{entry} is not what was registered; delete it and prepare base {name!r} again"
        ) from None
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
    from populace.workers.base.upcycle import save_smollm2

    return _make(SMOLLM2, lambda folder: save_smollm2(folder, progress))


def _prepare_seeded(name: str, progress: Progress) -> PreparedBase:
    from populace.workers.base.seeded import save_seeded

    progress("writing its config and tokenizer")
    return _make(name, lambda folder: save_seeded(name, folder))


def _make(name: str, save: Callable[[Path], None]) -> PreparedBase:
    """Have `save` write a base into a folder in the cache, and register it."""
    bases = cache_folder() / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=bases, prefix="."))
    try:
        save(made)
        digest = digest_folder(made)
        folder = bases / f"{name.replace(':', '-')}-{digest[:16]}"
        _put_in_place(made, folder, digest)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    base = PreparedBase(name=name, digest=digest, folder=str(folder))
    _register(base)
    return base


def _put_in_place(made: Path, folder: Path, digest: str) -> None:
    """Move what was made to where it belongs, unless it is there, in place of what is damaged
    there. Whoever makes the same at the same time may be faster."""
    made.chmod(0o755)
    for _ in range(2):
        if folder.is_dir() and digest_folder(folder) == digest:
            return
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_file():
            folder.unlink()
        with contextlib.suppress(OSError):  # somebody else's is there by now: look at it
            made.rename(folder)
            return
    raise Damaged(f"{folder} can't be replaced; delete it and prepare the base again")
