"""Grouped LoRA products. `lora.lora_product` computes them, `tiles` plans them."""
