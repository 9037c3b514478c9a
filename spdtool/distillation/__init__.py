"""Grafting and the losses: how the student learns from the teacher. Knows nothing of pruning."""
