"""One module per command: each reads earlier folders of a run and writes one more."""
