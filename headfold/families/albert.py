"""ALBERT: refused, because its layers are one set of weights."""

from .spec import Family

FAMILY = Family(
    model_types=("albert",),
    refuses={"*": "all its layers share one attention, so one choice of heads would have to suit every depth at once"},
)
