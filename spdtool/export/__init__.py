"""One module per deployment target."""
