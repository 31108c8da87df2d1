"""The training loop with its schedules, validation, and the cache of a frozen backbone."""
