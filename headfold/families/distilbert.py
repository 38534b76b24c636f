"""DistilBERT: BERT's attention under other names."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("distilbert",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="distilbert.transformer.layer.{layer}.attention",
            q="q_lin",
            k="k_lin",
            v="v_lin",
            o="out_lin",
            layers="n_layers",
            heads="n_heads",
            hidden_size="dim",
            kv_heads="",
        ),
    ),
    defaults={"n_layers": 6, "n_heads": 12, "dim": 768},
)
