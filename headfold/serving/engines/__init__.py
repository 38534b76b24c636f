"""One page per serving engine; the folder is the registry."""
