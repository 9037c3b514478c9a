"""Formats of files of rows: one table for all, and the readers of separated and of Arrow files."""
