"""expertprune: turn a general language model into a compact expert, without post-training."""

__version__ = "0.1.0"
