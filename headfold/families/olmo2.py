"""OLMo 2 and 3: refused, because one K norm spans all heads."""

from .spec import Family

FAMILY = Family(
    model_types=("olmo2", "olmo3"),
    refuses={"*": "its K norm is taken over all heads at once, so its statistic changes with their number"},
)
