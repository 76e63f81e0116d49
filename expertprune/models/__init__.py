"""Models: checkpoints, bases, loading, and passes over layers."""
