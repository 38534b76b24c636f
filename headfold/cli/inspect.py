"""headfold inspect."""

from typing import Annotated

from .options import WHERE, Adapter, Debug, Json, Model, StatsFile, TrustRemoteCode, option
from .output import answered

SERVED = "How it is served"
EXAMPLES = (
    "headfold inspect my-model --stats stats.safetensors --json",
    "headfold inspect my-model --context 4096 --batch 16 --gpu l4",
)


def inspect(
    model: Model,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    stats: StatsFile = None,
    context: Annotated[
        int | None,
        option(
            "--context", panel=SERVED, metavar="N",
            help="Tokens of context. Default: the model's own, at most 32768.",
        ),
    ] = None,
    batch: Annotated[int | None, option("--batch", panel=SERVED, metavar="N", help="Sequences at once. Default: 1.")] = None,
    memory: Annotated[
        str | None,
        option("--memory", panel=SERVED, metavar="SIZE", help="Memory of the device: 24GiB. Default: what it has."),
    ] = None,
    gpu: Annotated[
        str | None,
        option(
            "--gpu", panel=WHERE, metavar="NAME",
            help="Use the published figures of a GPU: t4, a10, l4, l40s, 3090, 4090, 5090, a100-40gb, a100-80gb, h100, h100-pcie, h200, "
            "b200 or mi300x. Default: this machine, measured.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Show heads, cache size and the predicted cost of folding.

    Below the facts it shows the predicted error of keeping a half, a quarter … of the K/V heads, site by site: bars on a terminal, numbers
    elsewhere. With --context, --batch, --memory or --gpu it first says what fits at each number of K/V heads, how much of a decoding step
    the cache takes, whether folding pays, and the command to begin with."""
    from ..reports import views
    from ..reports.progress import ProgressReport
    from ..verbs import inspect as verb

    with ProgressReport(brief=as_json) as progress:
        found = verb.inspect(
            model, stats=stats, context=context, batch=batch, memory=memory, gpu=gpu, adapter=adapter, progress=progress,
            trust_remote_code=trust_remote_code, say=progress.say,
        )  # fmt: skip
    if not answered(found.to_json(), as_json):
        views.show_inspection(found)
