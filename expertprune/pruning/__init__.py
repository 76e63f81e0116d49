"""A plan and a base to an expert."""
