"""ViT: learned positions, biases; transformers 5 renames its projections on loading."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("vit",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="vit.encoder.layer.{layer}.attention",
            q="attention.query",
            k="attention.key",
            v="attention.value",
            o="output.dense",
            model_at="vit.layers.{layer}.attention",
            model_names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
            kv_heads="",
        ),
    ),
)
