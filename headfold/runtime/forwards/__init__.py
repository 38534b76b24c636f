"""Own forwards, one page per `model_type` whose stock class hard-wires the head count in a view."""
