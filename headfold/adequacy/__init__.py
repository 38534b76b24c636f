"""Floor 7: whether calibration data were enough, and of the kind of text that the model writes."""
