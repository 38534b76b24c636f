"""Keep the model's own groups (GQA, 2305.13245, section 2.1).

The baseline for every other route: bit for bit the model without a route.
"""

from ...core.methods import RouteMethod
from ...core.routes import Norms, RouteState


def route(state: RouteState, norms: Norms, training: bool, *, seed: int = 0) -> RouteState:
    """Return the state unchanged."""
    return state


ROUTE = RouteMethod(route=route)
