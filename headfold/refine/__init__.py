"""Floor 7: what needs a running model to improve a fold. One block-by-block loop, one page per solver."""
