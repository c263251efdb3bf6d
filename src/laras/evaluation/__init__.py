"""Exact metrics, independent of batch size."""
