"""Torture: kills, concurrent commands, full disks and hostile files; what must hold after each of them."""
