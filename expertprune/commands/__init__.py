"""Commands that stand in files of their own; `expertprune.cli` adds them."""
