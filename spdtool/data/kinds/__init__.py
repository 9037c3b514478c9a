"""Rows that are more than texts with a label: one module for each kind of task."""
