"""Floor 6: running a folded checkpoint: loading, attention, cache, and routes."""
