"""Programs beside a run: capacity plans, simulations, replays, reports, exports."""
