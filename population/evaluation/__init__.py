"""Held-out evidence is measured, and tips are judged by it."""
