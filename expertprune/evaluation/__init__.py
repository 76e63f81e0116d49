"""Base and expert on the same held-out examples."""
