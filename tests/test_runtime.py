"""The runtime's laws: a grouped model is the stock model with its K/V heads repeated, caches fewer, and travels on its own."""

import ast
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from torch import Tensor
from transformers import PreTrainedModel

import headfold
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan
from headfold.runtime import modeling_headfold
from headfold.runtime.remote import auto_map, remote_files

HEADS, DIM, WIDTH, VOCABULARY = 6, 10, 60, 61
IDENTITY, EVEN, UNEVEN = (0, 1, 2, 3, 4, 5), (0, 0, 0, 1, 1, 1), (0, 0, 1, 0, 2, 1)
"""Query head → K/V head."""
_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_DECODER = dict(_TOKENS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, max_position_embeddings=64)
_BERT = dict(_DECODER, intermediate_size=72)
_VISION = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=72, image_size=12,
    patch_size=4)  # fmt: skip
_BART = dict(_TOKENS, d_model=WIDTH, encoder_layers=1, decoder_layers=2, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
    encoder_ffn_dim=72, decoder_ffn_dim=72, max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None)  # fmt: skip
_T5 = dict(_TOKENS, d_model=32, d_kv=DIM, num_heads=HEADS, d_ff=48, num_layers=2, decoder_start_token_id=0)

_QUERY = ("query", "key", "value")


FUSE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "segments": lambda q, k, v: torch.cat([q, k, v]),
    "heads": lambda q, k, v: torch.stack([t.unflatten(0, (HEADS, DIM)) for t in (q, k, v)], 1).flatten(0, 2),
    "groups": lambda q, k, v: torch.cat([t.unflatten(0, (2, -1, DIM)) for t in (q, k, v)], 1).flatten(0, 2),
    "conv": lambda q, k, v: torch.cat([q, k, v]).movedim(0, -1),
    "conv-cross": lambda q, k, v: torch.cat([k, v]).movedim(0, -1),
}
"""How stock classes lay out the rows of one projection for all three."""


@dataclass(frozen=True, slots=True)
class Case:
    """One class, where its sites lie, and how its stock form fuses them."""

    model_class: str
    config: Mapping[str, Any]
    modules: Sequence[str]
    names: Sequence[str] = ("q_proj", "k_proj", "v_proj")
    fused: str = ""
    fuse: str = "segments"
    implementations: Sequence[str] = ("sdpa", "eager", "headfold")
    kind: str = "text"
    source_groups: Sequence[int] = IDENTITY
    """Query head → K/V head that the stock class itself has."""

    def sites(self, kv_of_query: Sequence[int]) -> list[dict[str, Any]]:
        num_kv_heads = max(kv_of_query) + 1
        shape = {"heads": HEADS, "kv_heads": num_kv_heads, "head_dim": DIM, **dict(zip("qkv", self.names, strict=True))}
        shape |= {"fused": self.fused} if self.fused else {}
        even = list(kv_of_query) == [head * num_kv_heads // HEADS for head in range(HEADS)]
        shape |= {} if even else {"kv_of_query": list(kv_of_query)}
        crossed = {"q": "q_attn"}
        return [{"module": module, **shape, **(crossed if "cross" in module else {})} for module in self.modules]

    def make_config(self, implementation: str) -> Any:
        import transformers

        config = getattr(transformers, self.model_class).config_class(**self.config)
        config._attn_implementation = implementation
        return config

    def grouped(self, kv_of_query: Sequence[int] = EVEN, implementation: str = "sdpa") -> PreTrainedModel:
        """A random model in float64, whose attention matters."""
        from headfold.runtime import modeling_headfold

        config = self.make_config(implementation)
        config.headfold = {"sites": self.sites(kv_of_query)}
        return _randomize(getattr(modeling_headfold, f"Grouped{self.model_class}")(config).double().eval())

    def twin(self, grouped: PreTrainedModel, kv_of_query: Sequence[int], implementation: str) -> PreTrainedModel:
        """The stock model with the K/V heads of `grouped` repeated."""
        import transformers

        state = dict(grouped.state_dict())
        for site in self.sites(kv_of_query):
            self._expand(state, site, kv_of_query)
        stock = getattr(transformers, self.model_class)(self.make_config(implementation)).double().eval()
        stock.load_state_dict(state)
        return stock

    def _expand(self, state: dict[str, Tensor], site: Mapping[str, Any], kv_of_query: Sequence[int]) -> None:
        # A stock class with fewer K/V heads gets one of each set that shares it.
        kept = [kv_of_query[list(self.source_groups).index(group)] for group in range(max(self.source_groups) + 1)]
        for suffix in ("weight", "bias"):
            names = {role: f"{site['module']}.{site[role]}.{suffix}" for role in "qkv"}
            for role in "kv":
                if names[role] in state:
                    state[names[role]] = state[names[role]].unflatten(0, (-1, DIM))[kept].flatten(0, 1)
            if "fused" in site and names["k"] in state:
                fuse, gone = ("conv-cross", "kv") if site["q"] == "q_attn" else (self.fuse, "qkv")
                state[f"{site['module']}.{site['fused']}.{suffix}"] = FUSE[fuse](
                    *(state[names[role]] for role in "qkv")
                )
                for role in gone:
                    del state[names[role]]


def _randomize(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=2.0 / parameter.shape[-1] ** 0.5)
    return model


def _ids(seed: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _text() -> dict[str, Tensor]:
    """Left-padded."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": _ids(1, 9) * mask, "attention_mask": mask}


def _right_padded() -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in _text().items()}


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": _text,
    "sentences": _right_padded,
    "crossed": lambda: _text() | {"encoder_hidden_states": _random(2, 5, WIDTH)},
    "pairs": lambda: _right_padded() | {"decoder_input_ids": _ids(2, 7)},
    "image": lambda: {"pixel_values": _random(2, 3, 12, 12)},
    "audio": lambda: {"input_features": _random(2, 8, 24), "decoder_input_ids": _ids(2, 7)},
    "both": lambda: _right_padded() | {"pixel_values": _random(2, 3, 12, 12)},
}


def _at(*templates: str) -> list[str]:
    return [template.format(i) for template in templates for i in (range(2) if "{}" in template else [0])]


_EAGER_ONLY = ("eager", "headfold")
_FALCON = dict(_DECODER, num_kv_heads=HEADS, bias=True)
_T5_SITES = _at("decoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.1.EncDecAttention",
    "encoder.block.{}.layer.0.SelfAttention")  # fmt: skip
_BART_SITES = _at(
    "model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.encoder_attn", "model.encoder.layers.0.self_attn"
)
_NEO_LAYERS = dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=4, intermediate_size=72)


CASES: dict[str, Case] = {
    "opt": Case("OPTForCausalLM", dict(_DECODER, ffn_dim=72, word_embed_proj_dim=WIDTH), _at("model.decoder.layers.{}.self_attn")),
    "gpt2": Case("GPT2LMHeadModel", _DECODER, _at("transformer.h.{}.attn"), fused="c_attn", fuse="conv"),
    "gpt2-upcast": Case("GPT2Model", dict(_DECODER, reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
        _at("h.{}.attn"), fused="c_attn", fuse="conv", implementations=("sdpa", "headfold")),
    "gpt2-cross": Case("GPT2LMHeadModel", dict(_DECODER, add_cross_attention=True),
        _at("transformer.h.{}.attn", "transformer.h.{}.crossattention"), fused="c_attn", fuse="conv", kind="crossed"),
    "gpt_neox": Case("GPTNeoXForCausalLM", dict(_DECODER, intermediate_size=72, rotary_pct=0.4),
        _at("gpt_neox.layers.{}.attention"), fused="query_key_value", fuse="heads"),
    "gptj": Case("GPTJForCausalLM", dict(_DECODER, rotary_dim=4), _at("transformer.h.{}.attn"), implementations=_EAGER_ONLY),
    "gpt_neo": Case("GPTNeoForCausalLM", dict(_DECODER, **_NEO_LAYERS), _at("transformer.h.{}.attn.attention"),
        implementations=_EAGER_ONLY),
    "bloom": Case("BloomForCausalLM", _DECODER, _at("transformer.h.{}.self_attention"), fused="query_key_value",
        fuse="heads", implementations=_EAGER_ONLY),
    "falcon-rw": Case("FalconForCausalLM", dict(_FALCON, alibi=True, multi_query=False, parallel_attn=False),
        _at("transformer.h.{}.self_attention"), fused="query_key_value", fuse="heads"),
    "falcon-mq": Case("FalconForCausalLM", dict(_FALCON, multi_query=True), _at("transformer.h.{}.self_attention"),
        fused="query_key_value", source_groups=(0,) * HEADS),
    "falcon-new": Case("FalconForCausalLM", dict(_FALCON, num_kv_heads=2, new_decoder_architecture=True),
        _at("transformer.h.{}.self_attention"), fused="query_key_value", fuse="groups", source_groups=EVEN),
    "mpt": Case("MptForCausalLM", dict(_TOKENS, d_model=WIDTH, n_heads=HEADS, n_layers=2, max_seq_len=64),
        _at("transformer.blocks.{}.attn"), fused="Wqkv", implementations=_EAGER_ONLY),
    "whisper": Case("WhisperForConditionalGeneration", dict(_BART, num_mel_bins=8, max_source_positions=12, max_target_positions=64,
        suppress_tokens=None, begin_suppress_tokens=None), _BART_SITES, kind="audio"),
    "umt5": Case("UMT5ForConditionalGeneration", _T5, _T5_SITES, "qkv", kind="pairs"),
    "t5": Case("T5ForConditionalGeneration", _T5, _T5_SITES, "qkv", kind="pairs"),
    "mt5": Case("MT5ForConditionalGeneration", _T5, _T5_SITES[:4], "qkv", kind="pairs"),
    "bart": Case("BartForConditionalGeneration", _BART, _BART_SITES, kind="pairs"),
    "mbart": Case("MBartForConditionalGeneration", _BART, _BART_SITES, kind="pairs"),
    "marian": Case("MarianMTModel", _BART, _BART_SITES, kind="pairs"),
    "bert": Case("BertForMaskedLM", _BERT, _at("bert.encoder.layer.{}.attention.self"), _QUERY, kind="sentences"),
    "roberta": Case("RobertaForMaskedLM", _BERT, _at("roberta.encoder.layer.{}.attention.self"), _QUERY, kind="sentences"),
    "distilbert": Case("DistilBertForMaskedLM", dict(_TOKENS, dim=WIDTH, n_heads=HEADS, n_layers=2, hidden_dim=72),
        _at("distilbert.transformer.layer.{}.attention"), ("q_lin", "k_lin", "v_lin"), kind="sentences"),
    "vit": Case("ViTForImageClassification", _VISION, _at("vit.layers.{}.attention"), kind="image"),
    "deit": Case("DeiTForImageClassification", _VISION, _at("deit.layers.{}.attention"), kind="image"),
    "dinov2": Case("Dinov2ForImageClassification", _VISION, _at("dinov2.encoder.layer.{}.attention"), kind="image"),
    "clip": Case("CLIPModel", dict(text_config=_BERT, vision_config=_VISION, projection_dim=16),
        _at("text_model.encoder.layers.{}.self_attn", "vision_model.encoder.layers.{}.self_attn"), kind="both"),
}  # fmt: skip


def _logits(model: PreTrainedModel, case: Case, implementation: str) -> Tensor:
    """What the model says, where its tokens are not padding.

    Padding is on the right where stock eager attention runs: in float64 its float32 softmax of a row of padding is NaN.
    """
    inputs = INPUTS[case.kind]()
    if case.kind == "text" and (implementation == "eager" or case.implementations == _EAGER_ONLY):
        inputs = INPUTS["sentences"]()
    output = model(**inputs)
    if "text_embeds" in output:
        return torch.cat([output.text_embeds, output.image_embeds])
    found = output.logits if "logits" in output else output.last_hidden_state
    mask = inputs.get("attention_mask")
    return found[mask.bool()] if mask is not None and "decoder_input_ids" not in inputs else found


RUNS = [
    pytest.param(case, kv_of_query, implementation, id=f"{name}-{max(kv_of_query) + 1}-{implementation}")
    for name, case in CASES.items()
    for kv_of_query in ((IDENTITY, EVEN, UNEVEN) if case.source_groups == IDENTITY else (case.source_groups, (0,) * HEADS))
    for implementation in case.implementations
]  # fmt: skip


def _assert_same(ours: Tensor, stock: Tensor, case: Case, implementation: str) -> None:
    """Tight, but for what many stock classes do in eager: a softmax, or more, in float32 whatever the model's dtype."""
    in_float32 = implementation == "eager" or case.implementations == _EAGER_ONLY
    (assert_tight_through_float32_norms if in_float32 else assert_tight)(ours, stock)


@pytest.mark.parametrize(("case", "kv_of_query", "implementation"), RUNS)
def test_grouped_is_the_expanded_twin(case: Case, kv_of_query: tuple[int, ...], implementation: str) -> None:
    """The logits, bitwise where nothing is grouped or split, and the gradient that reaches the first parameter."""
    grouped = case.grouped(kv_of_query, implementation)
    # Stock eager Falcon adds its ALiBi twice, once inside the mask: there sdpa is the model.
    first = implementation == "headfold" or "alibi" in case.config
    twin = case.twin(grouped, kv_of_query, case.implementations[0] if first else implementation)
    ours, stock = (_logits(model, case, implementation) for model in (grouped, twin))
    if kv_of_query == IDENTITY and not case.fused and implementation != "headfold":
        assert_bitwise(ours, stock)
    _assert_same(ours, stock, case, implementation)
    for logits in (ours, stock):
        (logits.flatten() @ torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)).backward()
    name = next(name for name, parameter in twin.named_parameters() if parameter.grad is not None)
    ours, stock = (model.get_parameter(name).grad for model in (grouped, twin))
    _assert_same(ours, stock, case, implementation)


CAUSAL = ["opt", "gpt2", "gpt_neox", "gptj", "gpt_neo", "bloom", "falcon-rw", "falcon-mq", "falcon-new", "mpt"]
PAIRED = ["whisper", "umt5", "t5", "bart", "marian"]
HOW = {"greedy": {"num_beams": 1}, "beam": {"num_beams": 3}, "sample": {"num_beams": 1, "do_sample": True}}


def _generate(model: PreTrainedModel, case: Case, **how: Any) -> Any:
    """Left-padded prompts in float32, where stock eager has no NaN; the cache comes along."""
    inputs = {name: value for name, value in INPUTS[case.kind]().items() if name != "decoder_input_ids"}
    inputs |= {name: value.float() for name, value in inputs.items() if value.is_floating_point()}
    options = dict(max_new_tokens=6, min_new_tokens=6, use_cache=True, return_dict_in_generate=True, **how)
    torch.manual_seed(3)
    return model.float().generate(**inputs, **options)


@pytest.mark.parametrize("name", [*CAUSAL, *PAIRED])
def test_generation_is_the_twins_and_caches_groups_alone(name: str) -> None:
    case = CASES[name]
    kv_of_query, implementation = EVEN if case.source_groups == IDENTITY else (0,) * HEADS, case.implementations[0]
    twin = case.twin(grouped := case.grouped(kv_of_query, implementation), kv_of_query, implementation)
    for how, options in HOW.items():
        ours, stock = (_generate(model, case, **options) for model in (grouped, twin))
        assert ours.sequences.tolist() == stock.sequences.tolist(), how
        cache = ours.past_key_values
        caches = [getattr(cache, f"{part}_attention_cache", cache) for part in ("self", "cross")]
        assert {layer.keys.shape[1] for part in caches for layer in part.layers} == {max(kv_of_query) + 1}, how


@pytest.mark.parametrize("name", ["opt", "gpt2", "falcon-rw", "whisper", "t5", "bert", "vit", "clip"])
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.grouped(UNEVEN)
    model.save_pretrained(tmp_path)
    # A copy, because products of memory-mapped weights may round otherwise: they are not aligned.
    loaded = copy.deepcopy(headfold.load(tmp_path, attn_implementation="sdpa"))
    assert type(loaded) is type(model) and loaded.dtype == torch.float64 and not loaded.training
    assert loaded.config.architectures == [case.model_class]
    assert_bitwise(_logits(loaded, case, "sdpa"), _logits(model, case, "sdpa"))


ALONE = """
import copy, sys
sys.modules["headfold"] = None  # importing it raises
import torch, transformers

def opened(auto, directory):
    model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True)
    assert type(model).__qualname__.startswith("Grouped"), type(model)
    return copy.deepcopy(model)

for directory, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    inputs = torch.load(directory + "/inputs.pt")
    for auto_class in (auto, "AutoModel"):
        model = opened(auto_class, directory)
        torch.save(model(**inputs)[0], f"{directory}/{auto_class}.pt")
model.save_pretrained("again")
assert torch.equal(opened("AutoModel", "again")(**inputs)[0], model(**inputs)[0])
"""


def test_the_code_beside_the_weights_needs_no_headfold(tmp_path: Path) -> None:
    """A fused causal model, an encoder-decoder, an encoder, an image model: with and without head, saved again too."""
    tasks = {"gpt_neox": "CausalLM", "t5": "Seq2SeqLM", "bert": "MaskedLM", "vit": "ImageClassification"}
    autos = {name: f"AutoModelFor{task}" for name, task in tasks.items()}
    models, words = {name: CASES[name].grouped(UNEVEN) for name in autos}, []
    for name, auto in autos.items():
        config = models[name].config
        config.architectures = [CASES[name].model_class]
        config.auto_map = auto_map(config.to_dict())
        assert config.auto_map[auto] == f"modeling_headfold.Grouped{CASES[name].model_class}"
        models[name].save_pretrained(tmp_path / name)
        torch.save(INPUTS[CASES[name].kind](), tmp_path / name / "inputs.pt")
        words += [str(tmp_path / name), auto]
    ran = subprocess.run([sys.executable, "-c", ALONE, *words], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for name, auto in autos.items():
        model, inputs = models[name], INPUTS[CASES[name].kind]()
        assert_bitwise(torch.load(tmp_path / name / f"{auto}.pt"), model(**inputs)[0])
        base_class = getattr(modeling_headfold, model.config.auto_map["AutoModel"].split(".")[1])
        base = base_class.from_pretrained(tmp_path / name)
        assert_bitwise(torch.load(tmp_path / name / "AutoModel.pt"), copy.deepcopy(base)(**inputs)[0])


PAGES = [path.stem for path in (Path(headfold.__file__).parent / "runtime/forwards").glob("[a-z]*.py")]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_page_makes_a_file_of_its_own(page: str) -> None:
    """Nothing of it is defined twice, and it imports torch and transformers alone."""
    (text,) = remote_files({"model_type": "wrapper", "decoder": {"model_type": page}}).values()
    defined = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(set(defined)) == len(defined) and (f"{page}_forward" in defined or f"\n{page}_forward = " in text)
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


_NATIVE = dict(_DECODER, num_key_value_heads=2, head_dim=DIM, intermediate_size=72)
NATIVE = {
    "llama": ("LlamaForCausalLM", _NATIVE, "sdpa"),
    "mistral-window": ("MistralForCausalLM", dict(_NATIVE, sliding_window=4), "sdpa"),
    "gemma2-softcap": ("Gemma2ForCausalLM", dict(_NATIVE, sliding_window=4, query_pre_attn_scalar=DIM), "eager"),
    "gpt_oss-sinks": ("GptOssForCausalLM", dict(_NATIVE, sliding_window=4, num_local_experts=2, num_experts_per_tok=1), "eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_a_stock_model_takes_headfold_attention(name: str) -> None:
    """Left-padded: without a registered mask the padding would count."""
    class_name, fields, other = NATIVE[name]
    model_class = getattr(transformers, class_name)
    dtype = torch.float64 if other == "sdpa" else torch.float32
    model = model_class._from_config(model_class.config_class(**fields), attn_implementation=other).to(dtype).eval()
    _randomize(model)
    inputs = _text()
    kept = inputs["attention_mask"].bool()
    stock = model(**inputs).logits[kept]
    model.set_attn_implementation("headfold")
    ours = model(**inputs).logits[kept]
    (assert_tight if other == "sdpa" else assert_tight_through_float32_norms)(ours, stock)
    assert_differs(model(inputs["input_ids"]).logits[kept], stock)


def test_disagreements_are_named(tmp_path: Path) -> None:
    CASES["opt"].grouped().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    planned = {f"layers.{i}.self": SitePlan(Groups((0, 1, 2, 0, 1, 2)), "mean", 8) for i in range(2)}
    (tmp_path / "plan.json").write_text(json.dumps(Plan(planned, "contiguous", "0").to_json()))
    with pytest.raises(UserError, match="plan.json says 3 K/V heads at 2 sites, config.json 2 K/V heads at 2 sites"):
        headfold.load(tmp_path)
    (tmp_path / "plan.json").unlink()
    wrong = {
        "expected a list of sites": {"headfold": {"sites": [{"module": "x"}]}},
        "config.json: architectures: .* no model class OPTForNothing; fold again": {"architectures": ["OPTForNothing"]},
        "expected a module": {"headfold": {"sites": [config["headfold"]["sites"][0] | {"module": "model.layers.0"}]}},
    }
    for message, change in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            headfold.load(tmp_path)
