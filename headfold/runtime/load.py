"""Opens what `fold` wrote, after checking that the directory is complete and consistent."""

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..adapted import with_adapter
from ..checkpoint.config import read_config
from ..checkpoint.entries import check_entries
from ..checkpoint.refusals import refuse_remote_code
from ..core.errors import UserError
from ..core.plan import Plan
from ..families import family_of, is_known
from ..families.folded import kv_heads_by_layer
from ..families.spec import COUNTS, Family, read_field
from ..families.wrapped import is_in_language_model, is_of_tower, language_config
from ..hf_models import quiet
from ..hf_models.building import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(directory: str | Path, *, adapter: str | Path | None = None, **keywords: Any) -> "PreTrainedModel":
    """Return the model of a folded checkpoint, of the class that its config names, in eval mode and in its own dtype.

    This is the stock class where it reads its number of K/V heads from the config, else a class made from it: a grouped class, or
    one with the counts of the layouts per-layer and decilm. `keywords` are passed to `from_pretrained` (`dtype`, `device_map`,
    `attn_implementation` …). Unless `attn_implementation` is among them, attention is `headfold`, which decodes without copying K
    and V, and `generate` uses caches that grow in place. `adapter` is a LoRA of peft that was trained on this fold.

    Raises:
        UserError: there is no checkpoint, it is unfinished, its config and plan disagree, or it does not load; the adapter was made for
            the original of the fold.
    """
    directory = Path(directory)
    config = read_checked_config(directory)
    if not keywords.get("trust_remote_code"):
        refuse_code(config, directory, "read it, then pass trust_remote_code=True to headfold.load")
    with library_errors(directory, "transformers does not load this checkpoint"), quiet():
        model = _model_class(config, directory).from_pretrained(
            directory, **{"dtype": "auto", "local_files_only": True, **keywords}
        )
    model = _decoding_fast(model, keep_attention="attn_implementation" in keywords)
    return model if adapter is None else with_adapter(model, directory, adapter)


def refuse_code(config: Mapping[str, Any], directory: Path, advice: str) -> None:
    """Refuse a checkpoint that neither a class of headfold nor one of transformers opens, but code that it brings; `advice` is what to do.

    Raises:
        UserError: it is one.
    """
    if own_class(config, directory) is None and not _is_stock(config):
        refuse_remote_code(config, f"{directory}/config.json", advice)


def _decoding_fast(model: "PreTrainedModel", *, keep_attention: bool) -> "PreTrainedModel":
    """Set the attention `headfold` where the class takes attention by name, and caches that grow in place; return the model."""
    from .attention import NAME
    from .cache import generate_in_place

    if not keep_attention and takes_attention(model):
        model.set_attn_implementation(NAME)
    return generate_in_place(model) if model.can_generate() else model


def takes_attention(model: "PreTrainedModel") -> bool:
    """Return whether the class takes attention by name: it supports `sdpa`, or the attention interface where sdpa lacks a feature
    (Gemma 2).
    """
    return bool(model._supports_sdpa or getattr(model, "_supports_attention_backend", False))


def _model_class(config: Mapping[str, Any], where: Path) -> Any:
    """Return the class that `architectures` names, one of headfold's where the checkpoint needs it."""
    import transformers

    name = (config.get("architectures") or [""])[0]
    return own_class(config, where) or getattr(transformers, name, None) or transformers.AutoModelForCausalLM


def _is_stock(config: Mapping[str, Any]) -> bool:
    """Return whether transformers has the class of a checkpoint."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def own_class(config: Mapping[str, Any], where: str | Path = "the checkpoint") -> Any:
    """Return headfold's class for the checkpoint `where`, so that no code from its directory is run; None where a stock class opens it.

    Raises:
        UserError: transformers has no model of the class that was folded.
    """
    name = (config.get("architectures") or [""])[0]
    if "headfold" in config:
        from .modeling_headfold import grouped_class  # and with it the attention `headfold`

        try:
            return grouped_class(name)
        except AttributeError as error:
            raise UserError(
                f"{where}: config.json: architectures: {error}; fold again, or correct the config"
            ) from error
    module = _code_of_ours(config)
    if module is None:
        return None
    if "AutoConfig" in config["auto_map"]:
        from transformers import AutoConfig

        config_class = getattr(module, config["auto_map"]["AutoConfig"].rpartition(".")[2])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    return getattr(module, name, None)


def _code_of_ours(config: Mapping[str, Any]) -> ModuleType | None:
    """Return the module here of which a layout's checkpoint holds a copy: `auto_map` names a file `modeling_*.py` of this folder."""
    named = str((config.get("auto_map") or {}).get("AutoModelForCausalLM", ""))
    file = named.rpartition("--")[2].partition(".")[0]
    known = {path.stem for path in Path(__file__).parent.glob("modeling_*.py")}
    return importlib.import_module(f".{file}", __package__) if file in known else None


def read_checked_config(directory: Path) -> dict[str, Any]:
    """Return the config of a checkpoint directory after checking that the fold is finished and that plan and config agree.

    Raises:
        UserError: there is no checkpoint, it is unfinished, it leads elsewhere (`check_entries`), or config and plan disagree.
    """
    if directory.name.endswith(".partial"):
        raise UserError(f"{directory}: an unfinished fold; run the same headfold fold again to continue it")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: expected a checkpoint directory, found no config.json there; check the path")
    check_entries(directory)
    config = read_config(directory)
    sites = _listed_sites(config, directory)
    if (directory / "plan.json").is_file():
        plan = Plan.load(directory / "plan.json")
        counts = [site["kv_heads"] for site in sites] or kv_heads_by_layer(config)
        if sites and not any(is_in_language_model(config.get("model_type"), site["module"]) for site in sites):
            tower = {name: site for name, site in plan.sites.items() if is_of_tower(name)}
            language = {name: site for name, site in plan.sites.items() if name not in tower}
            _check_counts(directory, replace(plan, sites=tower), [site["kv_heads"] for site in sites])
            _check_fields(directory, replace(plan, sites=language), config)
        elif counts:
            _check_counts(directory, plan, counts)
        else:
            _check_fields(directory, plan, config)
    return config


def _listed_sites(config: Mapping[str, Any], directory: Path) -> list[Mapping[str, Any]]:
    """Return the grouped sites listed in a config; none for a stock class."""
    if "headfold" not in config:
        return []
    if not (listed := (config["headfold"] or {}).get("sites")):
        raise UserError(f"{directory}/config.json: headfold: expected a list of sites, got none; fold again")
    return listed


def _check_counts(directory: Path, plan: Plan, counts: list[int]) -> None:
    planned, found = Counter(plan.num_kv_heads.values()), Counter(counts)
    # Sites that keep all their heads need not be listed.
    same = Counter(s.groups.num_kv_heads for s in plan.sites.values() if s.groups.num_kv_heads == s.groups.num_heads)
    if found - planned or planned - found - same:
        raise UserError(
            f"{directory}: plan.json says {_counts(planned)}, config.json {_counts(found)}; "
            "one was changed after the fold; fold again"
        )


def _counts(sites: Mapping[int, int]) -> str:
    return " and ".join(f"{num_kv_heads} K/V heads at {num} sites" for num_kv_heads, num in sorted(sites.items()))


def _check_fields(directory: Path, plan: Plan, config: dict[str, Any]) -> None:
    # An architecture without a literal was detected when it was folded; of those only code of a checkpoint has another name for it.
    known = is_known(config.get("model_type"))
    family = family_of(config, f"{directory}/config.json") if known else Family(())
    named = {attention.kv_heads for attention in family.attentions if attention.kv_heads}
    named = named if known else {next((name for name in COUNTS if name in config), COUNTS[0])}
    planned, language = sorted(set(plan.num_kv_heads.values())), language_config(config)
    for field in named:
        if [read_field(family, language, field)] != planned:
            raise UserError(
                f"{directory}: plan.json says {' and '.join(map(str, planned))} K/V heads, config.json {field} = "
                f"{read_field(family, language, field)!r}; one was changed after the fold; fold again"
            )
