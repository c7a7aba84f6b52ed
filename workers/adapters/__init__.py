"""Adapters in memory: slots, tiers, sealed blobs on the local disk."""
