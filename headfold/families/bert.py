"""BERT and ELECTRA: learned positions, so K has no position; biases on all projections; the norm is after the attention."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("bert", "electra"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="{model_type}.encoder.layer.{layer}.attention",
            q="self.query",
            k="self.key",
            v="self.value",
            o="output.dense",
            core="self",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
