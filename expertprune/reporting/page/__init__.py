"""What an expert kept and lost, and why: one HTML file that needs nothing else, the model card, and the headline."""

from __future__ import annotations

from expertprune.reporting.page.document import Number, headline_rows, headline_table, render, report

__all__ = ["Number", "headline_rows", "headline_table", "render", "report"]
