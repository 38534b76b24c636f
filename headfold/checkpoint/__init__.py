"""Floor 2: checkpoints as bytes on disk, read lazily and written streaming."""
