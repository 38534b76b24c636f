"""headfold inspect."""

from .options import Adapter, Debug, Json, Model, StatsFile
from .output import answered

EXAMPLES = ("headfold inspect meta-llama/Llama-2-7b-hf", "headfold inspect my-model --stats stats.safetensors --json")


def inspect(
    model: Model, adapter: Adapter = None, stats: StatsFile = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Show heads, cache size and the predicted cost of folding.

    Below the facts it shows the predicted error of keeping 1/2, 1/4 and 1/8 of the K/V heads, site by site: bars on a terminal, numbers
    elsewhere."""
    from ..report import views
    from ..report.progress import ProgressReport
    from ..verbs import inspect as verb

    with ProgressReport(silent=as_json) as progress:
        found = verb.inspect(model, stats=stats, adapter=adapter, progress=progress, say=progress.say)
    if not answered(found.to_json(), as_json):
        views.show_inspection(found)
