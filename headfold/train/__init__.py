"""Floor 7: training of a folded model as a whole: data, objectives, and a transformers Trainer."""
