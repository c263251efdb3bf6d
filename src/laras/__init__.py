"""Laras fine-tunes language models on one GPU: a file of examples in, a tuned model with an honest score out."""

__version__ = "0.1.0"
