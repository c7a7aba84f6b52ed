"""Experience from a caller's hand to the pending index: records, checks, sealing, the log, its
reading end."""
