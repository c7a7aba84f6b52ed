"""Settings: their schema, and how YAML and the command line become one validated value."""
