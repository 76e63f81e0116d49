"""Benchmarks: scripts that print the project's figures, and the peer methods they compare with."""
