"""The fused step: lessons, losses, forward and backward, the optimizer; and rollouts."""
