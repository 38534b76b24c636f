"""Floor 7: measuring models: loss and perplexity, accuracy, embeddings, generated text, tasks, and how far a fold is from its
original.
"""
