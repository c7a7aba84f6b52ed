"""What may have killed a controller: it is tried again in small waves, then alone, then parked."""

from __future__ import annotations

SUSPECTS_SHARE = 8
"""What died in a full wave is tried again in waves of this part of one."""
