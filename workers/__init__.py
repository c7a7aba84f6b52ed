"""What runs beside the base model: layout, slabs, the fused step, rollouts, the Ray actor."""
