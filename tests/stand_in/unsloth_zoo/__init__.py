"""Stands in for unsloth_zoo, which is looked for and not used."""
