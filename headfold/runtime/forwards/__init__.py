"""Own forwards, one page per `model_type` whose stock class has a fixed number of heads. Their text is copied into checkpoints.

`self` is an attention of transformers with what `regroup` has set on it, which no type describes.
"""
