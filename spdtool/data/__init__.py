"""From files to batches: rows in, tokens out."""
