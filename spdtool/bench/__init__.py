"""Measuring exported files, and telling what was measured."""
