"""Decoder layers with LoRA as a few large products with hand-written backward, sharing the model's weights."""
