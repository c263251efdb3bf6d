"""Decoder layers with LoRA as few large matrix products and hand-written backward passes, sharing the model's weights."""
