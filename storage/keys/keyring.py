"""Signing and master keys of this process. They stay with the operator, in a folder or in the
environment, never in the store.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from populace.storage.errors import InvalidInput
from populace.storage.objects.files import sync_folder

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

# securesystemslib loads the SDK of every cloud that is installed: it is imported where something is
# signed, because whoever only enqueues signs nothing.


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """The public half of an Ed25519 signing key."""

    public: str
    """Hex."""

    @property
    def keyid(self) -> str:
        """sha256 of the key itself: whoever pins the id has pinned the key."""
        return hashlib.sha256(bytes.fromhex(self.public)).hexdigest()

    def as_json(self) -> dict[str, str]:
        return {"keyid": self.keyid, "public": self.public}

    def as_key(self) -> SSlibKey:
        from securesystemslib.signer import SSlibKey

        return SSlibKey(self.keyid, "ed25519", "ed25519", {"public": self.public})


class Keyring:
    """This process's signing and master keys: $POPULACE_SIGNING_KEY (PEM) and $POPULACE_MASTER_KEY
    (NAME:HEX), then the files in $POPULACE_KEYS, by default ~/.config/populace/keys."""

    def __init__(self, folder: Path | None = None) -> None:
        default = Path.home() / ".config" / "populace" / "keys"
        self.folder = folder or Path(os.environ.get("POPULACE_KEYS") or default)

    def new_signing_key(self) -> PublicKey:
        """Make a signing key; its private half stays in the folder."""
        from securesystemslib.signer import CryptoSigner

        signer = CryptoSigner.generate_ed25519()
        key = public_of(signer)
        self._write(f"signing-{key.keyid[:16]}.pem", signer.private_bytes)
        return key

    def signer(self, key: PublicKey) -> CryptoSigner:
        """The private half of `key`; `InvalidInput` says where it was looked for."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner

        path = self.folder / f"signing-{key.keyid[:16]}.pem"
        for pem in (os.environ.get("POPULACE_SIGNING_KEY", "").encode(), _read(path)):
            if not pem:
                continue
            try:
                private = load_pem_private_key(pem, None)
                if public_of(CryptoSigner(private)) == key:
                    return CryptoSigner(private, key.as_key())
            except (ValueError, TypeError) as error:
                raise InvalidInput(
                    f"$POPULACE_SIGNING_KEY or {path} holds no PEM private key: {error}"
                ) from None
        raise InvalidInput(
            f"the signing key {key.keyid[:16]} of this population is neither in "
            f"$POPULACE_SIGNING_KEY nor in {path}; "
            "copy it there from where the population was created"
        )

    def new_master_key(self) -> str:
        """Make a master key; returns its name."""
        name = secrets.token_hex(8)
        self._write(f"master-{name}.key", secrets.token_hex(32).encode())
        return name

    def master_key(self, name: str) -> bytes:
        path = self.folder / f"master-{name}.key"
        given, _, value = os.environ.get("POPULACE_MASTER_KEY", "").partition(":")
        text = value if given == name else _read(path).decode()
        if not text:
            raise InvalidInput(
                f"the master key {name!r} of this population is neither in $POPULACE_MASTER_KEY "
                f"nor in {path}; copy it "
                "there from where the population was created: without it no user's data can be read"
            )
        try:
            key = bytes.fromhex(text.strip())
        except ValueError:
            key = b""
        if len(key) != 32:
            raise InvalidInput(
                f"master key {name!r} is not 64 hexadecimal digits; restore it from a copy"
            )
        return key

    def discard(self, *, signing: PublicKey | None = None, master: str | None = None) -> None:
        """Remove keys that protect nothing."""
        if signing is not None:
            (self.folder / f"signing-{signing.keyid[:16]}.pem").unlink(missing_ok=True)
        if master is not None:
            (self.folder / f"master-{master}.key").unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(
            os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
        ) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)


def public_of(signer: CryptoSigner) -> PublicKey:
    return PublicKey(public=signer.public_key.keyval["public"])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InvalidInput(
            f"{path} can't be read: {error}; $POPULACE_KEYS must name a folder"
        ) from None
