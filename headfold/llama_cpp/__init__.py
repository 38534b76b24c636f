"""Floor 6: what llama.cpp reads beside the weights of a model, its tokenizer, and what it makes of the vectors of tokens."""
