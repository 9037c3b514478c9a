"""The training loop and what it needs: optimizer, snapshots, log, schedules, ranks."""
