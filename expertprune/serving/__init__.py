"""Experts behind vLLM: checks and engine arguments, server processes, one endpoint for several, throughput."""
