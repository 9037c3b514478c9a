"""The command line: a thin skin over functions that Python can call too."""
