"""The training loop and what it needs: optimizer, checkpoint, log, schedules, ranks."""
