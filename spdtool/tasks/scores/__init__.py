"""Scores: metrics, how sure they are, and probabilities that mean something."""
