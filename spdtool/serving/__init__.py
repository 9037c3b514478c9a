"""A bundle at work: predictions from the command line, an HTTP server, and the check before either."""
