"""The commands, one file each; `terminal` holds what they share, and `cli` gathers them."""
