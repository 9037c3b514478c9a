"""Checks of a checkpoint when it is opened: whether it is what it says, before anything is spent on it."""
