"""The report: what an expert kept and lost, and why, on one HTML page that stands alone."""

from __future__ import annotations

from expertprune.reporting.page.document import PlacedNumber, headline_rows, headline_table, render, report

__all__ = ["PlacedNumber", "headline_rows", "headline_table", "render", "report"]
