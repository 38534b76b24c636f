"""Floor 7: how fast a model decodes on this machine, how much memory it takes, and where the time goes."""
