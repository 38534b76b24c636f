"""Floor 9: models and data that a Python program has in memory, for the verbs, which read and write directories."""
