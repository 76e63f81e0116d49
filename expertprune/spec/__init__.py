"""The spec: what a user writes."""
