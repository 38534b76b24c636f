"""The README.md of a fold to MLA."""

from collections.abc import Mapping

from ..conversion.source import Source
from ..reports.card import INHERITED, model_name, source_metadata
from ..reports.tables import markdown_table, percent
from .result import LatentResult


def latent_card(source: Source, found: LatentResult, command: str, calibration: Mapping[str, str]) -> str:
    """Return the text of the card."""
    import yaml

    stated, name, shape = source_metadata(source.checkpoint.path), model_name(found.base_model), found.shape
    adapter, origin = source.plain.adapter and model_name(source.plain.adapter), source.plain.origin
    merged = f" with the LoRA adapter `{adapter}` merged into it, and" if adapter else ""
    metadata = {key: stated[key] for key in INHERITED if stated.get(key)} | {
        "base_model": name, "base_model_relation": "finetune", "library_name": "transformers", "tags": ["mla", "headfold"],
    }  # fmt: skip
    fitted = (
        "then `W_q` (where there were data enough), `W_o` and the values' up-projection were refitted to the original"
    )
    rows = [
        ["class", found.family, "deepseek_v3"],
        [
            "K/V heads",
            str(found.num_kv_heads_before),
            f"a latent of {shape.rank} and a rotary key of {shape.rotary_dim}",
        ],
        ["cache per token", f"{found.kv_bytes_before:,} bytes", f"{found.kv_bytes_after:,} bytes"],
    ]
    checked = found.verification
    verified = "no, it was skipped" if checked is None else (
        f"largest difference of logits between the stock class and a plain computation of the same weights "
        f"{checked.max_abs_difference:.2g} (tolerance {checked.tolerance:.2g}, {checked.num_tokens} tokens, {checked.dtype})"
    )  # fmt: skip
    facts = ", ".join(f"{key} {value}" for key, value in calibration.items() if key not in ("source", "model"))
    parts = (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {name}{f' + {adapter}' if adapter else ''} with multi-head latent attention",
        f"This is `{name}`{merged} with one latent for keys and values of all heads, folded by headfold (docs/mla.md): its "
        f"cache is {found.kv_bytes_before / found.kv_bytes_after:.3g} times smaller. Latent and rotary key were fitted in closed form"
        f"{', ' + fitted if found.refitted else ''}. Nothing was trained.",
        markdown_table(["", "original", "this"], rows),
        (f"- Original: {origin}\n" if origin else "")
        + f"- Calibration: `{calibration.get('source', 'unknown')}` ({facts})\n"
        f"- Verified: {verified}",
        "## Use\n\nA stock checkpoint of `DeepseekV3ForCausalLM`, in which no layer has experts: no code besides transformers, or an "
        "engine that serves this class.\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this")\n```\n\n'
        "The latents are written small, so that the norm of the class multiplies them by a constant. Keep `rms_norm_eps`, and store the "
        "weights in bfloat16 or float32: in float16 and in formats with float16 scales the latents have no precision.",
        "## Predicted error\n\nSquared error of the outputs of a site, before the refit, as a share of what its keys and values "
        "contribute.\n\n"
        + markdown_table(["site", "error"], [[site, percent(e)] for site, e in found.site_errors.items()]),
        f"## Made by\n\n```\n{command}\n```",
    )
    return "\n\n".join(parts) + "\n"
