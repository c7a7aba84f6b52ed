"""The frozen base: found by name, read from a checkpoint, run over packed rows."""
