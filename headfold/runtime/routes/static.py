"""The model's own groups, whatever the keys say: no route at all (GQA, 2305.13245, section 2.1).

What every other route is compared with, bit for bit the model without one.
"""

from ...core.methods import RouteMethod
from ...core.routes import Norms, RouteState


def route(state: RouteState, norms: Norms, training: bool, *, seed: int = 0) -> RouteState:
    """The state as it is."""
    return state


ROUTE = RouteMethod(route=route)
