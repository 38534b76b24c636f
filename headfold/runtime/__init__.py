"""Floor 6: a folded checkpoint as a running model."""
