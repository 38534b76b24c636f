"""Floor 7: train a folded model on, as a whole: data, objectives, and the transformers Trainer around them."""
