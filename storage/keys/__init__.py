"""Keys: who may write a population's history, and who can read its users."""
