"""The command line: a thin skin over functions that Python can call. Importing it costs little more than typer."""
