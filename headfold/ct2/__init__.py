"""Floor 6: models as CTranslate2 describes them: filled with tensors, with their tokens, and compared in it."""
