"""The entry point of the command line: every module of this package registers its commands with `app`."""

from __future__ import annotations

import sys

from spdtool import console, ranks
from spdtool.cli import clean, doctor, export, serve, show, stages, sweep
from spdtool.cli.options import app
from spdtool.errors import SpdError

__all__ = ["app", "clean", "doctor", "export", "main", "serve", "show", "stages", "sweep"]


def main() -> None:
    """Run the `spdtool` script."""
    console.prepare_streams()
    if sys.flags.optimize > 1:
        message = "Python runs without docstrings (PYTHONOPTIMIZE=2 or -OO), and transformers reads its own"
        console.print_error(SpdError(message, "unset PYTHONOPTIMIZE, or set it to 1"))
        sys.exit(SpdError.exit_code)
    # A rank may not end as Python does: see `exit_rank`.
    try:
        app(prog_name="spdtool")
    except SystemExit as end:
        if ranks.world_size() == 1 or not isinstance(end.code, int):
            raise
        ranks.exit_rank(end.code)
