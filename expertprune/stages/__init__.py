"""One verb a module: what the command line calls."""
