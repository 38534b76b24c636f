"""Floor 2: checkpoints as bytes on disk; tensors are read one at a time, and shards are written as a stream."""
