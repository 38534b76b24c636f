"""Which kind of data a model takes, and that the real sources suit the real models."""

import random
from pathlib import Path

import pytest

from headfold.corpus.samples import draw_sample, kind_of

SHARED = Path(__file__).parents[2] / "shared"

KINDS = {
    "text": ["LlamaForCausalLM:llama", "GPT2LMHeadModel:gpt2", "GPT2Model:gpt2", "BartForCausalLM:bart", "BloomModel:bloom", ":opt"],
    "pairs": ["T5ForConditionalGeneration:t5", "BartForConditionalGeneration:bart", "MarianMTModel:marian", "T5Model:t5"],
    "sentences": ["BertModel:bert", "RobertaForMaskedLM:roberta", "DistilBertForSequenceClassification:distilbert",
                  "T5EncoderModel:t5", "CLIPTextModel:clip_text_model", "LlamaForSequenceClassification:llama", ":mpnet",
                  ":modernbert", "EuroBertForMaskedLM:eurobert", ":esm", "ElectraForPreTraining:electra", "AlbertModel:albert"],
    "images": ["ViTForImageClassification:vit", "DeiTModel:deit", "Dinov2Model:dinov2", "CLIPVisionModel:clip_vision_model",
               "DINOv3ViTModel:dinov3_vit", "SiglipVisionModel:siglip_vision_model", "SiglipForImageClassification:siglip"],
    "audio": ["WhisperForConditionalGeneration:whisper", "WhisperModel:whisper", "MoonshineForConditionalGeneration:moonshine"],
    "sound": ["Wav2Vec2ForCTC:wav2vec2", "HubertModel:hubert"],
}  # fmt: skip
PAIRED = {"t5", "bart", "marian", "whisper"}


@pytest.mark.parametrize(("kind", "named"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_kind_follows_the_config(kind, named):
    head, family = named.split(":")
    config = {"architectures": [head] if head else None, "model_type": family, "is_encoder_decoder": family in PAIRED}
    assert kind_of(config) == kind


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and data are not here")
def test_real_sources_fit_real_models():
    data, trained = SHARED / "data", SHARED / "models"
    source = f"{data}/multi30k/val.en.gz,{data}/multi30k/val.de.gz"
    sample = draw_sample("pairs", source, path=trained / "multi30k-t5", num_items=64, context=128, seed=0)
    assert len(sample["labels"]) == 64 and (sample["labels"] == 1).sum(1).eq(1).all()  # one end of text each
    source, path = str(data / "cifar10" / "test.parquet"), trained / "cifar10-vit"
    sample = draw_sample("images", source, path=path, num_items=200, context=0, seed=random.Random(0).randrange(99))
    assert sample["pixel_values"].shape == (200, 3, 32, 32) and sample["labels"].bincount().min() > 5
    assert sample["pixel_values"].min() == -1 and sample["pixel_values"].max() == 1
