"""Benchmarks: the commands behind the project's figures, their results, and peer methods."""
