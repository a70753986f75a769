"""The task, its optimiser, the pure step, and the loop that owns the state."""
