"""Where the population lives: object stores, logs, packs, manifests, the catalog."""
