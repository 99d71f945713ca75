"""`python -m backbench`: the command `bench`."""

from backbench.harness.cli import main

main()
