"""What only holders of the master key may know of a population."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from populace.storage import paths
from populace.storage.errors import Damaged
from populace.storage.keys.keyring import Keyring
from populace.storage.keys.sealing import seal, unseal
from populace.storage.objects.contract import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What only holders of the master key may know of a population."""

    master: str
    """Name of the key that wraps this, and new users' keys."""
    pseudonym_key: str
    """Hex. Keys the pseudonyms and event tags that stand in the logs."""

    def wrap(self, population: str, keyring: Keyring) -> bytes:
        """The secrets as they lie in the store, wrapped with the master key."""
        sealed = seal(
            keyring.master_key(self.master),
            bytes.fromhex(self.pseudonym_key),
            f"{population}/secrets",
        )
        return json.dumps(
            {"master": self.master, "sealed": base64.b64encode(sealed).decode()}
        ).encode()

    @staticmethod
    def read(store: ObjectStore, population: str, keyring: Keyring) -> Secrets:
        """A population's secrets; `InvalidInput` without the master key."""
        path = paths.secrets(population)
        body = parse_wrapped(store.get(path), path)
        sealed = base64.b64decode(body["sealed"])
        plain = unseal(keyring.master_key(body["master"]), sealed, f"{population}/secrets")
        return Secrets(master=body["master"], pseudonym_key=plain.hex())


def parse_wrapped(body: bytes, path: str) -> dict[str, str]:
    """A wrapped key or an erasure's marker as JSON; `Damaged` for anything else."""
    try:
        parsed: dict[str, str] = json.loads(body)
        if not (
            parsed.get("forgotten") or (parsed["master"] and base64.b64decode(parsed["sealed"]))
        ):
            raise ValueError("neither a key nor a marker")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is not a wrapped key: {error}; restore it from a copy") from error
    return parsed
