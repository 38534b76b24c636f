"""DINOv3: a ViT with RoPE over rows and columns of patches; no bias of K; transformers adds a component to its names on loading."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("dinov3_vit",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="layer.{layer}.attention",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            model_at="model.layer.{layer}.attention",
            input_norm="norm1",
            kv_heads="",
        ),
    ),
    position=Rope(),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 6, "hidden_size": 384},
)
