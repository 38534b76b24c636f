"""Floor 10: one file per verb, the whole job told in one function. The command line and the API say the same words."""
