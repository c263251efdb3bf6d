"""Searching settings by trials that the validation set alone compares."""
