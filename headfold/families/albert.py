"""ALBERT: BERT's attention, one for all layers of a group (usually there is one group), folded once for all of them."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("albert",),
    attentions=(
        Attention(
            name="groups.{layer}.self",
            at="albert.encoder.albert_layer_groups.{layer}.albert_layers.0.attention",
            q="query",
            k="key",
            v="value",
            o="dense",
            layers="num_hidden_groups",
            heads="num_attention_heads",
            repeated=True,
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_groups": 1, "num_attention_heads": 64, "hidden_size": 4096},
)
