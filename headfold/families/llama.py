"""Llama 1–3, TinyLlama, Yi, DeepSeek-LLM and all other models of type llama; Arcee has the same attention."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("llama", "arcee"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
        ),
    ),
    position=Rope(),
)
