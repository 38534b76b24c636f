"""Floor 7: what is shown to people: tables, the model card, plots."""
