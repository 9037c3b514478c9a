"""A run is a folder: what it holds (`folder`) and the typed records in it."""
