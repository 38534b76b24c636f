"""Floor 4: descents: Adam in coordinates of the inputs, and the schedule by which weights are trained and kept."""
