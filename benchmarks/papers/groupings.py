"""Group heads as published: QCQA (2406.10247) and AsymGQA (2406.14963) beside neighbours, before and after fine-tuning.

    python -m benchmarks.papers.groupings MODEL --train EN.gz,DE.gz --validation EN.gz,DE.gz --test EN.gz,DE.gz --work DIR [--bf16]

The same as in the papers: heads grouped by NSGA-II on the weight-sharing error, in equal groups (EC) or any (AC), or by swaps that raise
the similarity of activations (`asymgqa-unequal`: by moves as well); K and V pooled by mean, everything fine-tuned alike. The rows of
neighbours (GQA), the original and ours, trained by the same options, are those of `benchmarks.papers.wgqa`. Not the same: a T5 of 3 + 3
layers of 8 heads to 4 K/V heads on Multi30k English → German (there Llama-2 and OPT on multiple choice), decoder self-attention in one
partition for the whole stack, as its layers share their position bias, AdamW at 1e-3 falling linearly to zero, and every layer is grouped
(QCQA's second stage is left out).
"""

from typing import Any

from benchmarks.papers.runs import Data, Folds, Table, mean_and_deviation, parser, recipe_of, settings, train

NUM_KV_HEADS = 4
RATE = 1e-3
OTHER_RATES = (3e-4, 3e-3)
ROWS = ("qcqa-ec", "qcqa-ac", "asymgqa", "asymgqa-unequal")
PUBLISHED = {
    "qcqa": "2406.10247, abstract, Llama2-7B at a similar cache: accuracy +20 % over GQA before, +10.55 % after fine-tuning",
    "asymgqa": "2406.14963, Llama-2-7B at equal size after task fine-tuning: MMLU +7.5 % over neighbours",
}  # fmt: skip


def run(data: Data, folds: Folds, how: str, rate: float | None, seed: int) -> dict[str, Any]:
    """Measure one row: as opened where there is no rate, else trained."""
    model, found = folds.open(how, NUM_KV_HEADS), {}
    if rate is not None:
        found = train(model, data.stream(seed), recipe_of(folds.options, rate, seed), folds.options.work)
        if seed == 0:
            found["validation_nll"] = data.validation_loss(model)
    return found if rate in OTHER_RATES else found | data.measure(model)


def rows(table: Table) -> list[dict[str, Any]]:
    """Return the table."""
    listed = []
    for how in ROWS:
        after = [found for key, found in table.runs.items() if key[:2] == (how, RATE)]
        before = table.runs.get((how, "before", 0))
        row: dict[str, Any] = {"row": how, "published": PUBLISHED.get(how.partition("-")[0])}
        for quantity in ("bleu", "nll"):
            row[f"{quantity}_before"] = before and before[quantity]
            row[quantity] = mean_and_deviation(found[quantity] for found in after) if after else None
        listed.append(row | table.by_rate(how, "validation_nll"))
    return listed


def main() -> None:
    options = parser(__doc__).parse_args()
    data = Data(options)
    folds = Folds(options, data.kind)
    asked = {
        **settings(options),
        "num_kv_heads": NUM_KV_HEADS,
        "rate": RATE,
        "optimizer": "adamw",
        "schedule": "linear",
    }
    facts = {"paper": "2406.10247, 2406.14963", "settings": asked, "published": PUBLISHED}
    table = Table(f"groupings-{options.model.name}", facts)
    wanted = [(how, RATE, seed) for seed in range(options.seeds) for how in ROWS]
    wanted += [(how, rate, 0) for rate in OTHER_RATES for how in ROWS]
    for how, rate, seed in wanted:
        if seed == 0:
            table.run((how, "before", 0), lambda how=how: run(data, folds, how, None, 0))
        table.run((how, rate, seed), lambda how=how, rate=rate, seed=seed: run(data, folds, how, rate, seed))
        table.write(rows=rows(table))


if __name__ == "__main__":
    main()
