"""Corpora: from names in a spec to documents and token batches."""
