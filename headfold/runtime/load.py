"""Open what `fold` wrote, after a look at whether it is whole."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.plan import Plan
from ..families import family_of
from ..families.spec import read_field
from ..stock import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(directory: str | Path, **keywords: Any) -> "PreTrainedModel":
    """The causal language model of a folded checkpoint, as stock transformers opens it: in eval mode, in its own dtype.

    `keywords` go to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `attn_implementation` …).

    Raises:
        UserError: no checkpoint there, an unfinished one, one whose config and plan disagree, or one that does not load.
    """
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    check(directory)
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                directory, **{"dtype": "auto", "local_files_only": True, **keywords}
            )
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory}: transformers does not load this checkpoint: {line}") from error


def check(directory: Path) -> None:
    """Refuse a directory that no finished fold can be: what the plan says and what the config says must agree."""
    if directory.name.endswith(".partial"):
        raise UserError(f"{directory}: an unfinished fold; run the same headfold fold again, it goes on from there")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: expected a checkpoint directory, found no config.json there; check the path")
    if not (directory / "plan.json").is_file():
        return
    plan = Plan.load(directory / "plan.json")
    config = json.loads((directory / "config.json").read_text())
    family = family_of(config, f"{directory}/config.json")
    for field in {attention.kv_heads for attention in family.attentions}:
        if read_field(family, config, field) != plan.num_groups:
            raise UserError(
                f"{directory}: plan.json says {plan.num_groups} K/V heads, config.json {field} = "
                f"{read_field(family, config, field)!r}; one was changed after the fold, fold again"
            )
