"""Named sets of configuration defaults."""
