"""`python -m spdtool` is the command line."""

from spdtool.cli import main

main()
