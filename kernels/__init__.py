"""Grouped LoRA products. `lora.add_lora` is the only public entry."""
