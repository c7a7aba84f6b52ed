"""Grouped LoRA products. `lora.lora_product` computes them; `plan` plans them on a CPU, `route` on
a CUDA device."""
