"""What makes a user's bits independent of who shares the batch, and the probe that this machine keeps it."""

from __future__ import annotations

ROW_MULTIPLE = {"invariant": 8, "fast": 1}
"""Row counts of every product of the base are multiples of this. MKL and oneDNN take other paths, with other
bits, for a few odd small counts only."""
