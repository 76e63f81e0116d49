"""`python -m expertprune`."""

from expertprune.cli import main

main(prog_name="expertprune")
