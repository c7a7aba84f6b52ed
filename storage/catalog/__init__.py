"""The catalog: the state of every adapter, derived from the revision logs."""
