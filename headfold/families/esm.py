"""ESM-1b and ESM-2, protein language models: BERT's attention after a norm, with RoPE in ESM-2."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("esm",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="esm.encoder.layer.{layer}.attention",
            q="self.query",
            k="self.key",
            v="self.value",
            o="output.dense",
            core="self",
            input_norm="attention.LayerNorm",
            kv_heads="",
        ),
    ),
    position=Rope(unless="position_embedding_type=absolute"),
    defaults={
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_size": 768,
        "position_embedding_type": "absolute",
    },
)
