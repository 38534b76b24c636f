"""GPT-J: the first dims of every head rotate; a frequency plane is two neighbouring dims."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("gptj",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.h.{layer}.attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            layers="n_layer",
            heads="n_head",
            hidden_size="n_embd",
            input_norm="ln_1",
            kv_heads="",
        ),
    ),
    position=Rope(interleaved=True, dim="rotary_dim"),
    defaults={"n_layer": 28, "n_head": 16, "n_embd": 4096, "rotary_dim": 64},
)
