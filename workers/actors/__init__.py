"""One shard free of Ray, its actor, and all actors of a base as one group."""
