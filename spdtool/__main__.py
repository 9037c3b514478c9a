"""`python -m spdtool` is the command line."""

from spdtool.cli.main import main

main()
