"""Authenticated encryption: AES-256-GCM, bound to a context."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from populace.storage.errors import Damaged

NONCE_BYTES = 12

OVERHEAD_BYTES = NONCE_BYTES + 16
"""What sealing adds: nonce in front, authentication tag behind (NIST SP 800-38D)."""

UNOPENED = "{} does not decrypt: its bytes or its key were changed"


def seal(key: bytes, plain: bytes, context: str) -> bytes:
    """AES-256-GCM with a random nonce: nonce, ciphertext, tag."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, context.encode())


def unseal(key: bytes, sealed: bytes, context: str) -> bytes:
    """Raises `Damaged` if these bytes were not sealed with this key for this context."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context.encode())
    except (InvalidTag, ValueError):
        raise Damaged(UNOPENED.format(context)) from None
