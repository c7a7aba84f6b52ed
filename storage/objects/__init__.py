"""Object stores: the contract, its backends, and what is built on it alone."""
