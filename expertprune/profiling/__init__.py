"""Passes over a corpus that measure how much each unit matters."""
