"""Benchmarks: the commands that produce the project's figures, their results, and the peer methods they compare with."""
