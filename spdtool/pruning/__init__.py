"""Criteria, patterns and masks: which weights are zero, and how they stay zero."""
