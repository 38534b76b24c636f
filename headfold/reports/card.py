"""The README.md of a folded checkpoint: its source, the method, and the predicted error."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.cards import AS_READ, REST, UNTOUCHED
from .tables import count_range, duration, estimate, markdown_table, percent, serving_cost_rows

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the source's card that is copied to the fold's card."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The facts on the card that the source's own card does not have.

    `base_model` is a hub id or a directory. `site_errors` gives, by site, the predicted error of K and of V as shares (0 to 1) of their
    energy; it is None where nothing was measured.
    """

    base_model: str
    family: str
    num_heads: str
    """Like `num_kv_heads_before`, a number or a range as text (`reports.tables.count_range`)."""
    num_kv_heads_before: str
    num_kv_heads_after: int
    num_kv_heads_least: int
    serving_costs: tuple[Any, Any]
    """The serving costs before and after."""
    method: str
    group: str
    refit_by: str
    """What a refit trained together at its end: the "model", each "block" alone, or nothing ("squares"); empty without a refit."""
    healed: int
    """The number of tokens, or items, of training; 0 where nothing was trained."""
    healed_by: str
    """What was trained together: all sites ("model") or one at a time ("block")."""
    calibration: Mapping[str, str]
    command: str
    adapter: str = ""
    """The adapter that was merged into the original before folding: a hub id or a directory; empty where there was none."""
    origin: str = ""
    """What the weights were before folding, where they were decoded or merged; empty where they were a plain checkpoint."""
    quantised_cache: bool = False
    """Whether K and V were rotated for a quantised cache."""
    code: tuple[str, ...] = ()
    """Files of the original's own code that were run, and that the fold needs too; empty where it is of a class of transformers."""
    reach: str = ""
    """One line on how much of the model the calibration data reach; empty where nothing is known."""
    warnings: tuple[str, ...] = ()
    """Lines on what is approximate, and on what is wrong with the calibration data."""
    site_errors: Mapping[str, tuple[float, float]] | None = None
    license: str | None = None
    """Replaces the licence in the source's card."""
    refit_text: Mapping[str, str] = field(default_factory=dict)
    """The data that blocks were refitted or healed on, in the form of `calibration`."""
    verification: str | None = None
    """One line on the comparison of the fold with its twin; None where it was skipped."""
    grouped_class: str = ""
    """The auto class that opens the fold with the code saved beside the weights; empty where the stock class reads the number of K/V
    heads.
    """
    wrapper_class: str = ""
    """The class that opens a fold inside a wrapper; empty where the model is a language model by itself."""
    misread: str = ""
    """On readers that take the fold for another model without an error."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the stages took in the run that ended the job, by stage."""
    estimated: Mapping[str, float] = field(default_factory=dict)
    """The same as estimated before that run."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the card's front matter."""


def model_card(source: Path, facts: CardFacts) -> str:
    """Return the text of the card. `source` is the checkpoint directory that was folded; licence and language come from its card."""
    name, kv_heads = model_name(facts.base_model), count_range(facts.num_kv_heads_least, facts.num_kv_heads_after)
    parts = (
        f"---\n{_yaml(_metadata(source, facts))}---",
        f"# {name}{f' + {model_name(facts.adapter)}' if facts.adapter else ''} with {kv_heads} K/V head{'' if kv_heads == '1' else 's'}",
        _summary(name, facts),
        _facts_table(facts),
        _load(facts),
        _errors(facts),
        f"## Made by\n\n```\n{facts.command}\n```",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def routed_card(
    card: str, name: str, route: str, sizes: Mapping[str, tuple[int, ...]], calibration: Mapping[str, str]
) -> str:
    """Return the card of a checkpoint with a frozen route: the card of the fold, `name`, with a section on the query heads of each
    K/V head.
    """
    rows = [[site, " + ".join(map(str, each))] for site, each in sizes.items()]
    text = (
        f"Query heads, in their order, were divided among the K/V heads by `{route}` (headfold methods {route.partition(':')[0]}), "
        f"frozen on {_calibration(calibration)}: outputs do not depend on the batch. The weights of "
        f"`{name}` are untouched, byte for byte."
    )
    section = f"## Route\n\n{text}\n\n{markdown_table(['site', 'query heads of each K/V head'], rows)}"
    before, heading, after = (card or f"# {name}, routed").partition("\n## Made by")
    return f"{before.rstrip()}\n\n{section}\n{heading and chr(10)}{heading.lstrip()}{after}"


def uptrained_card(card: str, name: str, facts: Mapping[str, str]) -> str:
    """Return the card of a checkpoint that was trained after folding: the card of the fold, `name`, with a section on the training."""
    section = f"## Uptrained\n\nFrom `{name}`.\n\n{markdown_table(['', 'this'], [[key, value] for key, value in facts.items()])}"
    text = re.sub(
        r"(?:No block was trained|Nothing (?:else )?was trained|"
        r"((?:Every attention block was|All attention blocks were) then trained .*?)); "
        rf"(?:{REST.pattern})\.",
        lambda found: f"{found[1] + '. ' if found[1] else ''}The whole model was then trained (see below).",
        card or f"# {name}, uptrained",
    )
    before, heading, after = text.partition("\n## Made by")
    return f"{before.rstrip()}\n\n{section}\n{heading and chr(10)}{heading.lstrip()}{after}"


_ADAPTERS = (
    "those made for the original (LoRA) do not belong on this model, also where their shapes fit: its heads are merged and turned; merge "
    "them into the original before folding (`headfold fold --adapter`)"
)


def model_name(base_model: str) -> str:
    """Return a hub id unchanged, and only the last component of a path, so that no card contains a path of the machine it was made
    on.
    """
    is_hub_id = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    return base_model if is_hub_id else Path(base_model).resolve().name


def source_metadata(source: Path) -> dict[str, Any]:
    """Return the front matter of the source's card; empty where there is none or it is not a mapping in YAML."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        found: Any = metadata_load(source / "README.md")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _metadata(source: Path, facts: CardFacts) -> dict[str, Any]:
    stated = source_metadata(source)
    inherited = {key: stated[key] for key in INHERITED if stated.get(key)}
    if facts.license:
        inherited["license"] = facts.license
    own = {
        "base_model": model_name(facts.base_model),
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["gqa" if facts.num_kv_heads_after > 1 else "mqa", "headfold"],
    }
    return {**inherited, **own, **facts.metadata}


def _yaml(metadata: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)


_REFIT = {
    "block": "'s attention and output, block by block",
    "squares": "'s attention and output by least squares, block by block",
    "model": ": to its attention block by block, then all together to the model's output, in one pass over the calibration data",
}


def _summary(name: str, facts: CardFacts) -> str:
    merged = f" with the LoRA adapter {_linked(model_name(facts.adapter))} merged into it, and" if facts.adapter else ""
    refit = (
        f", then all projections of every block were refitted to the original{_REFIT[facts.refit_by]}"
        if facts.refit_by
        else ""
    )
    rotated = " K and V were then rotated for a quantised cache (`--quantised-cache`)." if facts.quantised_cache else ""
    after = count_range(facts.num_kv_heads_least, facts.num_kv_heads_after)
    before, now = facts.serving_costs
    return (
        f"This is {_linked(name)}{merged} with {after} instead of {facts.num_kv_heads_before} key/value heads per layer, folded by "
        f"headfold: its KV cache is {before.kv_bytes_per_token / now.kv_bytes_per_token:.3g} times smaller. Heads were grouped by "
        f"`{facts.group}` and merged by `{facts.method}`{refit}.{rotated} {_training(facts)}; "
        f"{AS_READ if facts.origin else UNTOUCHED}."
    )


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def _training(facts: CardFacts) -> str:
    if not facts.healed:
        return "Nothing else was trained" if facts.refit_by else "Nothing was trained"
    amount = f"on {facts.healed:,} tokens or items"
    if facts.healed_by == "model":
        return f"All attention blocks were then trained together, {amount}, to reproduce the original's output"
    return f"Every attention block was then trained alone, {amount}, to reproduce the output of the original's"


def _facts_table(facts: CardFacts) -> str:
    rows = [
        ["query heads", facts.num_heads, facts.num_heads],
        ["K/V heads", facts.num_kv_heads_before, count_range(facts.num_kv_heads_least, facts.num_kv_heads_after)],
        *serving_cost_rows(*facts.serving_costs),
    ]
    lines = [f"- Original: {facts.origin}"] if facts.origin else []
    lines += (
        [f"- Code of the checkpoint that was run (`--trust-remote-code`): {', '.join(facts.code)}"]
        if facts.code
        else []
    )
    lines += [f"- Family: {facts.family}", f"- Calibration: {_calibration(facts.calibration)}"]
    lines += [f"- Calibration reaches: {facts.reach}"] if facts.reach else []
    lines += [f"- Note: {warning}" for warning in facts.warnings]
    if facts.refit_text and facts.refit_text.items() - facts.calibration.items():
        lines.append(f"- {'Healed' if facts.healed else 'Refitted'} on: {_calibration(facts.refit_text)}")
    lines.append(f"- Verified: {facts.verification or 'no, it was skipped'}")
    lines += [f"- Time: {_time(facts)}"] if facts.seconds else []
    lines.append(f"- Adapters: {_ADAPTERS}")
    return markdown_table(["", "original", "this"], rows) + "\n\n" + "\n".join(lines)


def _time(facts: CardFacts) -> str:
    """Return the time of every stage, and what was estimated."""
    taken = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in facts.seconds.items())
    estimated = f"; estimated before: {estimate(facts.estimated)}" if facts.estimated else ""
    return f"{duration(sum(facts.seconds.values()))}: {taken}{estimated}"


def _calibration(facts: Mapping[str, str]) -> str:
    """Return one line on the data: the source first, then the other facts. The model's fingerprint is left to plan.json."""
    rest = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("source", "model"))
    return f"`{facts.get('source', 'unknown')}` ({rest})" if facts else "none"


def _load(facts: CardFacts) -> str:
    if facts.code:
        return (
            f"## Use\n\nThe class is that of the original, whose code lies beside the weights (`{facts.code[0]}`): read it before you let "
            "transformers run it.\n\n```python\nfrom transformers import AutoModelForCausalLM\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this", trust_remote_code=True)\n```'
        )
    if not facts.grouped_class:
        opener = facts.wrapper_class or "AutoModelForCausalLM"
        reader = "AutoProcessor" if facts.wrapper_class else "AutoTokenizer"
        return (
            "## Use\n\nA stock checkpoint: no code besides transformers (or any engine that reads it).\n\n```python\n"
            f"from transformers import {opener}, {reader}\n"
            f'model = {opener}.from_pretrained("path/to/this")\n'
            f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("path/to/this")\n```'
            + (f"\n\nNot every reader: {facts.misread}." if facts.misread else "")
        )
    return (
        "## Use\n\nThe stock class of this architecture has one K/V head per query head, so a grouped class is saved beside the "
        "weights (`modeling_headfold.py`; needs torch and transformers alone).\n\n```python\n"
        f"from transformers import {facts.grouped_class}{', AutoProcessor' if facts.wrapper_class else ''}\n"
        f'model = {facts.grouped_class}.from_pretrained("path/to/this", trust_remote_code=True)\n'
        + ('processor = AutoProcessor.from_pretrained("path/to/this")\n' if facts.wrapper_class else "")
        + "```\n\n"
        'Where headfold is installed, `headfold.load("path/to/this")` opens it without remote code.'
    )


def _errors(facts: CardFacts) -> str:
    """Return the table of predicted errors, or an empty string where nothing was measured."""
    if not facts.site_errors:
        return ""
    rows = [[site, percent(key), percent(value)] for site, (key, value) in facts.site_errors.items()]
    text = (
        "## Predicted error\n\nThe error of sharing K/V heads in these groups, before merge and refit, on the calibration text: squared "
        "error of the attention logits (K) and of the block's output (V), as shares of their energy."
    )
    return f"{text}\n\n{markdown_table(['site', 'K', 'V'], rows)}"
