"""The reports that each verb prints to stdout for people; `--json` prints the result's own JSON instead."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO, runtime_checkable

from .advice import show_advice
from .tables import cache_row, count_range, duration, percent, serving_cost_rows, show_table, size

BARS = "▁▂▃▄▅▆▇█"
_POSITIONS = {
    "any": "not rotated, so keys merge after any linear change",
    "rope-halves": "rotary (RoPE), so keys merge after a rotation and a scale of each pair of dims",
    "rope-pairs": "rotary (RoPE), so keys merge after a rotation and a scale of each pair of dims",
    "signs": "rotary (RoPE) after a norm, so keys merge exactly after changes of sign alone, and nearly after rotations and scales",
}
"""By the kind of `core.heads.KeyFreedom`: what a merge may do to keys without changing attention."""
_ORDERS = {
    "free": "free, so any heads may share",
    "stack": "one for all layers of a stack, which share their position bias",
    "fixed": "fixed by the position bias of each head (ALiBi), so only neighbours share",
}
COLOURS = ("green4", "chartreuse3", "yellow3", "gold1", "orange1", "dark_orange", "red1", "red3")


@runtime_checkable
class SiteForecast(Protocol):
    """The predicted error of one site by the fraction of K/V heads that is kept, as shares (0 to 1) of the energy."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> Mapping[str, float]: ...
    @property
    def value(self) -> Mapping[str, float]: ...


def show_inspection(found: Any) -> None:
    """Print an inspection: the facts of the model, then the predicted error of every site."""
    rows = [
        ["family", f"{found.family} ({found.architecture})"],
        ["parameters", f"{found.num_parameters:,} in {found.dtype}"],
        ["attention sites", str(found.num_layers)],
        ["query heads", f"{found.num_heads} with head_dim {found.head_dim}"],
        ["K/V heads", str(found.num_kv_heads)],
        *_cache_rows(found),
        ["position in keys", _in_words(_POSITIONS, found.key_freedom)],
        ["order of query heads", _in_words(_ORDERS, found.query_order)],
    ]
    show_table([found.model, ""], rows)
    if found.advice is not None:
        show_advice(found.advice)
    show_predicted_errors(found.sites, found.basis)


def _in_words(words: Mapping[str, str], said: str) -> str:
    """Return what a kind means, and the rest of what was said after it."""
    kind, _, rest = said.partition(" ")
    return f"{words[kind]}{f' ({rest})' if rest else ''}"


def _cache_rows(found: Any) -> list[list[str]]:
    if not found.caches:
        return [["K and V per token, not cached", size(found.kv_bytes_per_token)]]
    context = [] if found.context is None else [["context", f"{found.context:,} tokens"]]
    per_token = found.kv_bytes_per_token
    bytes_rows = [["K/V cache per token", size(per_token)], cache_row(found.context, found.cache_bytes)]
    fastest = [["fastest in engines", found.fastest_in_engines]] if found.fastest_in_engines else []
    return [*context, *bytes_rows, *fastest]


def show_predicted_errors(sites: Sequence[SiteForecast], basis: str, to: TextIO | None = None) -> None:
    """Print the predicted error of every site by the share of K/V heads kept: bars on a terminal, a table of percents elsewhere."""
    to = to or sys.stdout
    title = f"predicted error of K and V, as a share of their energy, from {basis}"
    shares = {fraction for site in sites for fraction in site.key}
    ordered = sorted(shares, key=lambda fraction: int(fraction.partition("/")[2]))
    columns = [(tensor, fraction) for tensor in ("key", "value") for fraction in ordered]
    if to.isatty():
        _print_bars(sites, columns, title, to)
        return
    header = ["site", *(f"{tensor[0].upper()} {fraction}" for tensor, fraction in columns)]
    rows = [
        [site.name, *(_share(getattr(site, tensor).get(fraction)) for tensor, fraction in columns)] for site in sites
    ]
    print(file=to)
    show_table(header, rows, title=f"{title}, by the share of K/V heads kept", to=to)


def _share(error: float | None) -> str:
    return "" if error is None else percent(error)


def _print_bars(sites: Sequence[SiteForecast], columns: Sequence[tuple[str, str]], title: str, to: TextIO) -> None:
    """Print a row of bars, one bar per site, for every tensor and fraction."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=to)
    console.print(f"\n{title}", highlight=False)
    console.print("one bar per site in order; a full bar is 100 %, a half bar 25 %, a quarter 6 %", style="dim")
    for tensor, fraction in columns:
        errors = {site.name: error for site in sites if (error := getattr(site, tensor).get(fraction)) is not None}
        worst = max(errors, key=errors.__getitem__)
        median = sorted(errors.values())[len(errors) // 2]
        bars = [(BARS[level(error)], COLOURS[level(error)]) for error in errors.values()]
        tail = f"  median {percent(median)}, worst {percent(errors[worst])} at {worst}"
        console.print(Text.assemble(f"{tensor[0].upper()} {fraction}  ", *bars, tail), soft_wrap=True)


def level(share: float) -> int:
    """Return the bar of an error: its square root in eight equal steps, so that small errors remain distinguishable."""
    return min(len(BARS) - 1, int(len(BARS) * math.sqrt(max(share, 0.0)) + 1e-9))


def show_fold(result: Any) -> None:
    """Print the result of a fold: predicted errors, serving costs, notes, verification and times."""
    rows = [
        [
            "K/V heads",
            str(result.num_kv_heads_before),
            count_range(result.num_kv_heads_least, result.num_kv_heads_after),
        ],
        *serving_cost_rows(result.before, result.after),
    ]
    show_plan_errors(result.plan)
    show_table([f"{result.family}, {result.num_heads} query heads", "before", "after"], rows)
    for note in result.notes:
        print(f"note: {note}")
    print(_verification(result.verification))
    print("time: " + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result.seconds.items()))
    print(f"wrote {result.out}")


def show_latent_fold(result: Any) -> None:
    """Print the result of a fold to MLA: predicted errors, the cache, notes, verification and times."""
    shape = result.shape
    rows = [
        ["K and V", f"{result.num_kv_heads_before} heads", f"latent {shape.rank}, rotary key {shape.rotary_dim}"],
        ["cache per token", f"{result.kv_bytes_before:,} bytes", f"{result.kv_bytes_after:,} bytes"],
    ]
    show_table(["site", "error"], [[site, percent(error)] for site, error in result.site_errors.items()])
    show_table([f"{result.family}, {result.num_heads} query heads", "before", "after"], rows)
    for note in result.notes:
        print(f"note: {note}")
    checked = result.verification
    said = "not verified" if checked is None else (
        f"verified: logits of the stock class differ from a plain computation of the same weights by at most "
        f"{checked.max_abs_difference:.2g} (tolerance {checked.tolerance:.2g} in {checked.dtype})"
    )  # fmt: skip
    print(said)
    print("time: " + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result.seconds.items()))
    print(f"wrote {result.out}")


def _verification(found: Any) -> str:
    if found is None:
        return "not verified: the check against the head-repeated twin was skipped"
    return (
        "verified: the files compute the planned fold: logits differ from those of its head-repeated twin by at most "
        f"{found.max_abs_difference:.2g} (tolerance {found.tolerance:.2g} in {found.dtype})"
    )


def show_plan_errors(plan: Any) -> None:
    """Print the predicted error of each site of a plan, K and V separately; a hint where the plan was made without statistics."""
    rows = [[name, *_shares(site), *_members(site)] for name, site in plan.sites.items() if site.error is not None]
    if rows:
        title = "predicted error of each site as a share of its energy, before merge and refit"
        show_table(["site", "K", "V", "groups"][: len(rows[0])], rows, title=title)
    else:
        print("no predicted error without statistics: run headfold calibrate and pass --stats")


def show_plan(plan: Any, serving_costs: Any, in_nats: bool) -> None:
    """Print a plan, the serving costs before and after it, and the loss increase where sites were measured.

    `in_nats` says that the model has logits, so that its losses are KL to the original and not changes of hidden states.
    """
    show_plan_errors(plan)
    before, after = [site.groups.num_heads for site in plan.sites.values()], plan.num_kv_heads.values()
    heads = ["K/V heads", count_range(min(before), max(before)), count_range(min(after), max(after))]
    show_table(["", "before", "after"], [heads, *serving_cost_rows(*serving_costs)])
    if plan.predicted_loss_increase is not None:
        print(f"predicted {_predicted(plan.predicted_loss_increase, in_nats)}")
        print(
            "the sum of what each site, folded alone, was measured to lose; what they lose together differs: headfold eval measures it"
        )


def _predicted(loss: float, in_nats: bool) -> str:
    if in_nats:
        return f"loss increase: {loss:.3g} nats (KL to the original, per token or item)"
    return f"change of the output: {percent(loss)} of its energy"


def _shares(site: Any) -> list[str]:
    return [percent(site.error.key / site.energy.key), percent(site.error.value / site.energy.value)]


def _members(site: Any) -> list[str]:
    """Return the heads of each group as one cell, or no cell where it would be too long."""
    written = " ".join(",".join(map(str, members)) for members in site.groups.members)
    return [written] if len(written) <= 50 else []


def show_route(result: Any) -> None:
    """Print the result of freezing a route."""
    rows = [[name, " + ".join(map(str, sizes))] for name, sizes in result.sizes.items()]
    calibration = result.calibration
    amount = f"{calibration['tokens']} {'tokens' if calibration['kind'] == 'text' else 'items'}"
    title = f"{result.route}, frozen on {amount} of {calibration['source']}"
    show_table(["site", "query heads of each K/V head"], rows, title=title)
    for note in result.notes:
        print(f"note: {note}")
    if result.batch_dependent:
        print("note: the published form of this route depends on the batch; frozen, it does not")
    print(
        f"verified: the checkpoint's outputs differ from the routed model's by at most {result.difference:.2g} "
        f"(tolerance {result.tolerance:.2g})"
    )
    print(f"wrote {result.out}")


def show_uptraining(result: Any) -> None:
    """Print the result of training a fold."""
    how, unit = result.training, "tokens" if result.kind == "text" else "items"
    begun = f", from step {result.resumed_at:,} on" if result.resumed_at else ""
    rows = [
        ["trained", f"{result.train}: {result.num_trained:,} of {result.num_parameters:,} parameters"],
        ["data", f"{result.tokens:,} {unit} of {result.data}"],
        ["steps", f"{how.steps:,} of {how.batch} items{begun}"],
        ["optimizer", f"{how.optimizer}, rate {how.learning_rate:g}, {how.schedule}, warm-up {how.warmup}"],
        ["speed", f"{result.tokens_per_second:,.0f} {unit}/s, {duration(result.seconds)}"],
    ]
    for name, label in (
        ("loss", "loss"),
        ("kl", "KL(original ‖ model)"),
        ("site_error", "relative error of attention outputs"),
    ):
        found = [entry[name] for entry in result.curve if name in entry]
        rows += [[label, f"{found[0]:.4f} at the start, {found[-1]:.4f} at the end"]] if found else []
    show_table([str(result.out), ""], rows)
    print(
        f"verified: the checkpoint's outputs differ from the trained model's by at most {result.difference:.2g} "
        f"(tolerance {result.tolerance:.2g})"
    )
    print(f"wrote {result.out}")


def show_calibration(result: Any) -> None:
    """Print what was calibrated on and where the statistics were written."""
    print(f"{result.tokens:,} tokens of {result.source} through {result.sites} sites in {duration(result.seconds)}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {result.path}")


def show_detection(found: Any, out: Any = None) -> None:
    """Print the result of a detection: the findings, the laws, and the family literal unless it was written to `out`."""
    print(f"{found.model_type} ({found.architecture})")
    for line in found.findings:
        print(f"  {line}")
    if found.family is None:
        print(f"not foldable: {found.reason}")
        return
    rows = [[law, f"{moved:.1g}" if moved else "0"] for law, moved in found.laws.items()]
    show_table(["law", "change of the logits"], rows, title="all laws hold; changes are relative to the largest logit")
    print(f"\n{found.source}" if out is None else f"wrote {out}")


def show_methods(summaries: Mapping[str, Mapping[str, str]], to: TextIO | None = None) -> None:
    """Print option, method and summary of all methods: a table on a terminal, plain text elsewhere."""
    to = to or sys.stdout
    if not to.isatty():
        longest = max(len(name) for methods in summaries.values() for name in methods)
        for option, methods in summaries.items():
            print(option, file=to)
            for name, summary in methods.items():
                print(f"  {name.ljust(longest)}  {summary}", file=to)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("option", "method", "summary"):
        table.add_column(column, no_wrap=column != "summary")
    for option, methods in summaries.items():
        for at, (name, summary) in enumerate(methods.items()):
            last = at == len(methods) - 1
            table.add_row("" if at else option, name, summary, end_section=last)
    Console(file=to).print(table)


def show_page(option: str, name: str, page: str, options: Mapping[str, Any]) -> None:
    """Print the page of one method and its options with their defaults."""
    print(f"{option} {name}\n\n{page}\n")
    if options:
        print("options, with their defaults:")
        for key, default in options.items():
            print(f"  {key}={str(default).lower() if isinstance(default, bool) else default}")
    else:
        print("no options")
