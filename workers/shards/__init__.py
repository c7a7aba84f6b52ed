"""How a base is split over shards, and how they talk in the middle of a pass."""
