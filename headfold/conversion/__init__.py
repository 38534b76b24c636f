"""Floor 8: what several verbs share and no user sees by name: the opened source, the running teacher, staging, verification, cost."""
