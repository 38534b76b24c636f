"""RoBERTa, XLM-RoBERTa and CamemBERT: the attention of BERT."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("roberta", "xlm-roberta", "camembert"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="roberta.encoder.layer.{layer}.attention",
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
