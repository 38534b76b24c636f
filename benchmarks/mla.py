"""Compare multi-head latent attention with every other layout of as large a cache, and with published conversions to it.

    python benchmarks/mla.py MODEL --name NAME --text SOURCE [--shares 1/4,1/8] [--calibration SOURCE] [--tokens N] [--context N]
        [--windows N] [--rows ROW,ROW] --work DIR

Grouped folds and ours are `headfold fold` as a user runs it, verified by reload. Published conversions (`mla_published.py`) are
measured as the original model with their attention in it, at every split of the cache between latent and rotary key that is tried, of
which the best on the measured text is listed: they are given more than a user has. All use the same statistics. Results go to
benchmarks/results/NAME-mla.json after each row, so an interrupted run resumes.
"""

import argparse
import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from machine import describe
from mla_published import plane_turns, transmla, weight_svd
from torch import Tensor

import headfold
from headfold.conversion.source import open_source, open_stats
from headfold.corpus import open_corpus
from headfold.corpus.windows import token_stream
from headfold.evaluate.perplexity import compare_models, split_windows
from headfold.families.layout import read_heads
from headfold.hf_models import open_model, open_tokenizer
from headfold.latent.attention import LatentAttention
from headfold.latent.site import Latent

RESULTS = Path(__file__).parent / "results"
GROUPED: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "twice the head_dim": {"head_dim_multiple": 2},
    "groups of different sizes": {"group": "swap:unequal=true"},
}
LATENT: dict[str, dict[str, Any]] = {"mla": {}, "mla without refit": {"refit": False}}
PUBLISHED = ("TransMLA", "MHA2MLA", "CARE")
PARTS = (1, 2, 4)
"""TransMLA: head_dim over the dims of the rotary key. MHA2MLA and CARE: planes that a head keeps."""


class Bench:
    """One model, its statistics and its held-out windows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.source = open_source(options.model)
        self.statistics = self.work / "stats.safetensors"
        if not self.statistics.exists():
            headfold.calibrate(
                options.model, self.statistics, calibration=options.calibration, tokens=options.tokens, context=options.context
            )  # fmt: skip
        self.stats = open_stats(self.statistics, self.source)
        stream = token_stream(open_corpus(options.text, seed=0).documents, open_tokenizer(self.source.checkpoint.path))
        whole = [window for window in split_windows(stream, options.context) if len(window) == options.context]
        self.windows = whole[:: max(1, len(whole) // options.windows)][: options.windows]
        self.model = open_model(self.source.checkpoint.path, dtype=torch.float32)
        self.attention = {site.name: self.model.get_submodule(site.module) for site in self.source.sites}
        self.base = compare_models(self.model, None, self.windows).nll

    def folded(self, share: Fraction, how: dict[str, Any]) -> dict[str, Any] | None:
        """Fold as a user does and measure; None where the layout has no fold of this cache."""
        how, out = dict(how), self.work / "fold"
        heads = self.source.num_kv_heads
        if "to" not in how:
            multiple = how.get("head_dim_multiple", 1)
            if (share * heads).denominator != 1 or share * heads < multiple:
                return None
            how["kv_heads"] = int(share * heads)
        started = time.monotonic()
        result: Any = headfold.fold(self.options.model, out, stats=self.statistics, force=True, **how)
        model = headfold.load(out, dtype=torch.float32)
        row = {"loss_increase": compare_models(model, None, self.windows).nll - self.base}
        row |= {"seconds": round(time.monotonic() - started, 1), "kv_bytes_per_token": result.kv_bytes_after}
        if "to" in how:
            row |= {"rank": result.shape.rank, "rotary_dim": result.shape.rotary_dim}
        return row

    def published(self, name: str, share: Fraction) -> dict[str, Any] | None:
        """Return the best split of a published conversion."""
        site = self.source.sites[0]
        cached = int(share * 2 * site.num_kv_heads * site.head_dim)
        found = [self._split(name, cached, part) for part in PARTS]
        whole = [row for row in found if row is not None]
        return min(whole, key=lambda row: row["loss_increase"]) if whole else None

    def _split(self, name: str, cached: int, part: int) -> dict[str, Any] | None:
        site = self.source.sites[0]
        rotary = site.head_dim // part if name == "TransMLA" else 2 * part * site.num_kv_heads
        if rotary >= cached:
            return None
        for each in self.source.sites:
            latent, turns = self._published_site(name, each, cached - rotary, part)
            self.model.set_submodule(each.module, LatentAttention(latent.to(torch.float32), turns))
        increase = compare_models(self.model, None, self.windows).nll - self.base
        for each in self.source.sites:
            self.model.set_submodule(each.module, self.attention[each.name])
        size = cached * len(self.source.sites) * self.source.dtype.itemsize
        return {"loss_increase": increase, "kv_bytes_per_token": size, "rank": cached - rotary, "rotary_dim": rotary}

    def _published_site(self, name: str, site: Any, rank: int, part: int) -> tuple[Latent, Tensor]:
        heads, stats = read_heads(site, self.source.checkpoint.read), self.stats[site.name]
        if name == "TransMLA":
            own = torch.tensor(site.key_freedom.frequencies, dtype=torch.float64)
            return transmla(heads, stats, rank, site.head_dim // part), own[::part]
        latent = weight_svd(heads, stats, rank, part, whitened=name == "CARE")
        return latent, plane_turns(heads, stats, part)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("model")
    reader.add_argument("--name", required=True)
    reader.add_argument("--text", required=True)
    reader.add_argument("--shares", default="1/4,1/8")
    reader.add_argument("--calibration", default="stdlib")
    reader.add_argument("--tokens", type=int, default=65_536)
    reader.add_argument("--context", type=int, default=256)
    reader.add_argument("--windows", type=int, default=64)
    reader.add_argument("--rows", default="")
    reader.add_argument("--work", type=Path, required=True)
    options = reader.parse_args()
    out = RESULTS / f"{options.name}-mla.json"
    kept: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    bench = Bench(options)
    wanted = options.rows.split(",") if options.rows else [*GROUPED, *LATENT, *PUBLISHED]
    for share in options.shares.split(","):
        for name in wanted:
            if any((row["share"], row["row"]) == (share, name) for row in kept):
                continue
            if name in PUBLISHED:
                found = bench.published(name, Fraction(share))
            elif name in LATENT:
                found = bench.folded(Fraction(share), {"to": "mla", "kv_rank": share, **LATENT[name]})
            else:
                found = bench.folded(Fraction(share), GROUPED[name])
            print(share, name, found, flush=True)
            if found is None:
                continue
            kept.append({"share": share, "row": name, "num_seeds": 1, **found})
            settings = {key: getattr(options, key) for key in ("tokens", "context", "windows")}
            settings |= {"calibration": Path(options.calibration).name, "text": Path(options.text).name, "seed": 0}
            facts = {"name": options.name, "nll": bench.base, "settings": settings, "rows": kept, "machine": describe()}
            out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
