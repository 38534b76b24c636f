"""What each verb shows to people. Results go to stdout; the machines' form is the result's own JSON."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

from .tables import counts, duration, percent, price_rows, show_table, size

FRACTIONS = ("1/2", "1/4", "1/8")
BLOCKS = "▁▂▃▄▅▆▇█"
COLOURS = ("green4", "chartreuse3", "yellow3", "gold1", "orange1", "dark_orange", "red1", "red3")


class SiteForecast(Protocol):
    """Predicted error of one site by the fraction of K/V heads that stays, as shares of the energy."""

    name: str
    key: Mapping[str, float]
    value: Mapping[str, float]


def show_inspection(found: Any) -> None:
    """A `recipe.Inspection`: the facts, then the heat strips of K and V."""
    rows = [
        ["family", f"{found.family} ({found.architecture})"],
        ["parameters", f"{found.num_parameters:,} in {found.dtype}"],
        ["attentions", str(found.num_layers)],
        ["query heads", f"{found.num_heads} of {found.head_dim}"],
        ["K/V heads", str(found.num_kv_heads)],
        ["K/V cache per token", size(found.kv_bytes_per_token)],
        ["K/V cache at 32k tokens", size(found.kv_bytes_32k)],
        ["free on K", found.key_freedom],
        ["order of query heads", found.query_order],
    ]
    show_table([found.model, ""], rows)
    show_strips(found.sites, found.basis)


def show_strips(sites: Sequence[SiteForecast], basis: str, to: TextIO | None = None) -> None:
    """One cell per layer; rows are what share of the K/V heads stays. Blocks with colour on a terminal, digits elsewhere."""
    to = to or sys.stdout
    print(f"\npredicted error by layer, from {basis}", file=to)
    if to.isatty():
        print("cell height is the square root of the error as a share of its energy", file=to)
    else:
        print("digit d: at least d² percent of its energy (1: 1 %, 3: 9 %, 5: 25 %, 7: 49 %)", file=to)
    for tensor in ("key", "value"):
        for fraction in FRACTIONS:
            errors = {site.name: getattr(site, tensor)[fraction] for site in sites if fraction in getattr(site, tensor)}
            if errors:
                _print_strip(f"{tensor[0].upper()} {fraction}", errors, to)


def _print_strip(label: str, errors: Mapping[str, float], to: TextIO) -> None:
    worst = max(errors, key=errors.__getitem__)
    middle = sorted(errors.values())[len(errors) // 2]
    tail = f"median {percent(middle)}, worst {percent(errors[worst])} at {worst}"
    if not to.isatty():
        print(f"{label}  {''.join(str(level(error, 10)) for error in errors.values())}  {tail}", file=to)
        return
    from rich.console import Console
    from rich.text import Text

    cells = [(BLOCKS[level(error, 8)], COLOURS[level(error, 8)]) for error in errors.values()]
    Console(file=to).print(Text.assemble(f"{label}  ", *cells, f"  {tail}"), soft_wrap=True)


def level(share: float, num_levels: int) -> int:
    """The square root of a share, in `num_levels` equal steps: small errors stay apart."""
    return min(num_levels - 1, int(num_levels * math.sqrt(max(share, 0.0)) + 1e-9))


def show_fold(result: Any) -> None:
    """A `recipe.FoldResult`."""
    rows = [
        ["K/V heads", str(result.kv_heads_before), counts(result.kv_heads_least, result.kv_heads_after)],
        *price_rows(result.before, result.after),
    ]
    show_plan_errors(result.plan)
    show_table([f"{result.family}, {result.num_heads} query heads", "before", "after"], rows)
    for note in result.notes:
        print(f"note: {note}")
    print(_verification(result.verification))
    print("time: " + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result.seconds.items()))
    print(f"wrote {result.out}")


def _verification(found: Any) -> str:
    if found is None:
        return "not verified: the check against the head-repeated twin was skipped"
    return (
        f"verified: logits are the head-repeated twin's to {found.max_abs_difference:.2g} "
        f"(tolerance {found.tolerance:.2g} in {found.dtype})"
    )


def show_plan_errors(plan: Any) -> None:
    """A `core.plan.Plan`: predicted error per site, K and V apart; nothing where there were no statistics."""
    rows = [[name, *_shares(site), *_members(site)] for name, site in plan.sites.items() if site.error is not None]
    if rows:
        title = "predicted error of what the groups share, every frequency plane on its own, as shares of the energy"
        show_table(["attention", "K", "V", "groups"][: len(rows[0])], rows, title=title)
    else:
        print("no statistics, so no predicted error: run headfold calibrate and pass --stats to see it")


def show_plan(plan: Any, serving_costs: Any) -> None:
    """A `core.plan.Plan` and the pair of `recipe.price.ServingCost` around it."""
    show_plan_errors(plan)
    show_table(["", "before", "after"], price_rows(*serving_costs))


def _shares(site: Any) -> list[str]:
    return [percent(site.error.key / site.energy.key), percent(site.error.value / site.energy.value)]


def _members(site: Any) -> list[str]:
    """The heads of each group; nothing where there are more than a line takes."""
    written = " ".join(",".join(map(str, members)) for members in site.groups.members)
    return [written] if len(written) <= 50 else []


def show_route(result: Any) -> None:
    """A `recipe.routing.RouteResult`."""
    rows = [[name, " + ".join(map(str, sizes))] for name, sizes in result.sizes.items()]
    said = result.calibration
    amount = f"{said['tokens']} {'tokens' if said['kind'] == 'text' else 'items'}"
    title = f"{result.route}, settled on {amount} of {said['source']}"
    show_table(["attention", "query heads of each K/V head"], rows, title=title)
    for note in result.notes:
        print(f"note: {note}")
    if result.batch_dependent:
        print("note: as published this route depends on the batch that an item is in; settled as here, on none")
    print(
        f"verified: the checkpoint says what the routed model says to {result.difference:.2g} (tolerance {result.tolerance:.2g})"
    )
    print(f"wrote {result.out}")


def show_uptraining(result: Any) -> None:
    """A `recipe.uptraining.UptrainResult`."""
    recipe, unit = result.recipe, "tokens" if result.kind == "text" else "items"
    begun = f", from step {result.resumed_at:,} on" if result.resumed_at else ""
    rows = [
        ["trained", f"{result.train}: {result.num_trained:,} of {result.num_parameters:,} parameters"],
        ["data", f"{result.tokens:,} {unit} of {result.data}"],
        ["steps", f"{recipe.steps:,} of {recipe.batch} items{begun}"],
        ["optimizer", f"{recipe.optimizer}, rate {recipe.learning_rate:g}, {recipe.schedule}, warm-up {recipe.warmup}"],
        ["speed", f"{result.tokens_per_second:,.0f} {unit}/s, {duration(result.seconds)}"],
    ]
    for name, label in (("loss", "loss"), ("kl", "KL to the original"), ("site_error", "error of the attentions")):
        found = [entry[name] for entry in result.curve if name in entry]
        rows += [[label, f"{found[0]:.4f} first, {found[-1]:.4f} last"]] if found else []
    show_table([str(result.out), ""], rows)
    print(
        f"verified: the checkpoint says what the trained model says to {result.difference:.2g} (tolerance {result.tolerance:.2g})"
    )
    print(f"wrote {result.out}")


def show_calibration(result: Any) -> None:
    """A `recipe.CalibrationResult`."""
    print(f"{result.tokens:,} tokens of {result.source} through {result.sites} sites in {duration(result.seconds)}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {result.path}")


_MEASURES = (
    ("NLL (nats per target token)", "{:.4f}", "nll"),
    ("BLEU", "{:.2f}", "bleu"),
    ("ROUGE-1", "{:.2f}", "rouge1"),
    ("ROUGE-2", "{:.2f}", "rouge2"),
    ("ROUGE-L", "{:.2f}", "rougeL"),
    ("ROUGE-Lsum", "{:.2f}", "rougeLsum"),
    ("accuracy", "{:.2%}", "accuracy"),
    ("cross-entropy (nats)", "{:.4f}", "cross_entropy"),
    ("KL(reference || model)", "{:.4f}", "kl"),
    ("same class", "{:.2%}", "agreement"),
    ("cosine to the reference, mean", "{:.4f}", "cosine"),
    ("cosine to the reference, lowest", "{:.4f}", "worst_cosine"),
    ("rank correlation of similarities", "{:.4f}", "rank_correlation"),
)
"""Label, form and field of what a measurement may hold; `reference_FIELD` is the reference's."""


def show_scores(found: Any) -> None:
    """A `recipe.scoring.Scores`: what it measured, and the same of its reference."""
    rows = []
    for label, form, field in _MEASURES:
        if getattr(found.measured, field, None) is not None:
            beside = getattr(found.measured, f"reference_{field}", None)
            rows.append([label, *_numbers(form, getattr(found.measured, field), beside)])
    title = f"{found.measured.num_items:,} {found.kind} of {found.source}, computed in {found.dtype}"
    headers = ["", found.model] + ([] if found.reference is None else [found.reference])
    show_table(headers, [row[: len(headers)] for row in rows], title=title)


def show_evaluation(found: Any) -> None:
    """An `evaluate.perplexity.Evaluation`, beside its reference where it has one; or, for what is no text, `Scores`."""
    if hasattr(found, "measured"):
        return show_scores(found)
    title = f"{found.num_tokens:,} tokens of {found.text}, context {found.context}, computed in {found.dtype}"
    rows = [
        ["K/V cache per token", size(found.kv_bytes_per_token), _size(found.reference_kv_bytes_per_token)],
        ["NLL (nats per token)", *_numbers("{:.4f}", found.nll, found.reference_nll)],
        ["perplexity", *_numbers("{:.3f}", found.perplexity, found.reference_perplexity)],
        ["KL(reference || model)", *_numbers("{:.4f}", found.kl, None)],
        ["same first token", "" if found.top1_agreement is None else percent(found.top1_agreement), ""],
    ]
    if found.reference is None:
        show_table(["", found.model], [row[:2] for row in rows[:3]], title=title)
    else:
        show_table(["", found.model, found.reference], rows, title=title)


def _numbers(form: str, *values: float | None) -> list[str]:
    return ["" if value is None else form.format(value) for value in values]


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else size(num_bytes)


def show_probe(found: Any, out: Any = None) -> None:
    """A `detect.Detection`: what was found, the laws, and the literal, unless it was written to `out`."""
    print(f"{found.model_type} ({found.architecture})")
    for line in found.findings:
        print(f"  {line}")
    if found.family is None:
        print(f"not foldable: {found.reason}")
        return
    rows = [[law, f"{moved:.1g}" if moved else "0"] for law, moved in found.laws.items()]
    show_table(["law", "logits moved by"], rows, title="every law holds; changes relative to the largest logit")
    print(f"\n{found.source}" if out is None else f"wrote {out}")


def show_methods(summaries: Mapping[str, Mapping[str, str]]) -> None:
    """Axis → method → its one line."""
    width = max(len(name) for methods in summaries.values() for name in methods)
    for option, methods in summaries.items():
        print(option)
        for name, summary in methods.items():
            print(f"  {name.ljust(width)}  {summary}")


def show_page(option: str, name: str, page: str, options: Mapping[str, Any]) -> None:
    """One method: its page and its options with their defaults."""
    print(f"{option} {name}\n\n{page}\n")
    if options:
        print("options, with their defaults:")
        for key, default in options.items():
            print(f"  {key}={str(default).lower() if isinstance(default, bool) else default}")
    else:
        print("no options")
