"""Profiles to a plan. No model runs here."""
