"""MPNet: the attention of BERT with T5's table of relative position bias, one for all layers."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("mpnet",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="mpnet.encoder.layer.{layer}.attention",
            q="attn.q",
            k="attn.k",
            v="attn.v",
            o="attn.o",
            core="attn",
            stack_table="mpnet.encoder.relative_attention_bias",
            stack="encoder",
            order="stack",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
