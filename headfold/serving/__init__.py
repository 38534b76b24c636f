"""Serving engines: what each reads, how it is installed and started, and a run of a fold in it."""
