"""The revision log: records, their signed form, reading, owning, verifying."""
