"""One file per format of an engine that reads no Hugging Face checkpoint: its `FORMAT` record and the function that writes it."""
