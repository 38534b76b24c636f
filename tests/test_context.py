"""The context length that a config names is that of the longest input that the model takes."""

from typing import Any

import pytest
import torch
import transformers

from headfold.families.context import context_length

SMALL: dict[str, Any] = dict(vocab_size=30, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=20)  # fmt: skip
BOXES: dict[str, Any] = dict(coordinate_size=4, shape_size=4, max_2d_position_embeddings=8, visual_embed=False)
PADDED_FIRST: dict[str, dict[str, Any]] = {
    "RobertaModel": {},
    "RobertaPreLayerNormModel": {},
    "XLMRobertaModel": {},
    "XLMRobertaXLModel": {},
    "CamembertModel": {},
    "XmodModel": dict(default_language="en_XX"),
    "LongformerModel": dict(attention_window=4),
    "Data2VecTextModel": {},
    "IBertModel": {},
    "LukeModel": dict(entity_vocab_size=5),
    "EsmModel": dict(position_embedding_type="absolute"),
    "LayoutLMv3Model": BOXES,
    "AltCLIPTextModel": dict(project_dim=16),
    "ClapTextModel": {},
    "LiltModel": dict(max_2d_position_embeddings=8),
    "MarkupLMModel": dict(max_depth=2),
}
"""Models by class whose first token is at the position after the padding token."""
OTHERS: dict[str, dict[str, Any]] = {
    "MPNetModel": {},
    "BertModel": {},
    "DistilBertModel": dict(dim=24, n_heads=2, n_layers=1, hidden_dim=16),
    "OPTModel": dict(ffn_dim=16, word_embed_proj_dim=24),
    "GPT2Model": {},
}
ALL = PADDED_FIRST | OTHERS


def config_of(model_class: str, **fields: Any) -> Any:
    made = getattr(transformers, model_class).config_class
    return made(**{"pad_token_id": 3, **SMALL, **ALL[model_class], **fields})


def longest_input(config: Any, model_class: str) -> int:
    """The tokens of the longest input that runs, by trying all lengths."""
    model = getattr(transformers, model_class)(config).eval()
    length = 0
    while length < 2 * SMALL["max_position_embeddings"]:
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length + 1), 5))
        except (IndexError, RuntimeError):  # a table, or a buffer of positions, that is too short
            break
        length += 1
    return length


@pytest.mark.parametrize("model_class", ALL)
def test_context_length_is_the_longest_input(model_class: str) -> None:
    config = config_of(model_class)
    assert context_length(config.to_dict()) == longest_input(config, model_class)


@pytest.mark.parametrize("model_class", PADDED_FIRST)
def test_padding_token_that_the_config_leaves_out(model_class: str) -> None:
    """As in a config.json with the fields that differ from the defaults of the class alone."""
    config = config_of(model_class)
    default = type(config)().pad_token_id
    named = {name: value for name, value in config.to_dict().items() if name != "pad_token_id"}
    assert context_length(named) == SMALL["max_position_embeddings"] - 1 - (1 if default is None else default)


def test_a_wrapper_has_the_context_of_its_text_model() -> None:
    inner = config_of("RobertaModel", max_position_embeddings=514, pad_token_id=1).to_dict()
    assert context_length({"model_type": "clip", "pad_token_id": 7, "text_config": inner}) == 512
    assert context_length({"model_type": "a wrapper", "text_config": {"model_type": "t5", "n_positions": 512}}) is None


def test_rotary_positions_have_no_table() -> None:
    """ESM-2 rotates: no position is lost, and longer inputs run too."""
    config = config_of("EsmModel", position_embedding_type="rotary")
    assert context_length(config.to_dict()) == SMALL["max_position_embeddings"] < longest_input(config, "EsmModel")
