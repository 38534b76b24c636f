"""Floor 7: what people see: tables, progress, pictures and model cards. Reports read results as they are and compute nothing of their
own.
"""
