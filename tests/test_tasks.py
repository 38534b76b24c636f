"""Tasks of lm-evaluation-harness: its values are what the model's probabilities say, for folds too, and nothing else is printed."""

import io
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import refused, run  # noqa: F401 (fixtures)
from test_evaluate_modalities import saved, tiny, tokenizer, writer  # noqa: F401 (fixtures)
from tiny import tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import headfold
from headfold.core.errors import UserError
from headfold.evaluate import tasks
from headfold.hf_models import open_model, open_tokenizer
from headfold.metrics import bootstrap

pytest.importorskip("lm_eval", reason="the tasks extra is not installed")

SPECIAL = {"unk_token": "<u>", "bos_token": "<s>", "eos_token": "</s>"}
LETTERS = "etaoinshr dlcumw"
FLOAT32 = 2**10 * torch.finfo(torch.float32).eps
COMMON = {"dataset_path": "json", "test_split": "test"}
CHOICE = COMMON | {
    "task": "my_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}", "target_delimiter": "",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}  # fmt: skip
ROLLING = COMMON | {
    "task": "my_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}  # fmt: skip
WRITING = COMMON | {
    "task": "my_writing", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def words(generator: random.Random, length: int) -> str:
    return "".join(generator.choice(LETTERS) for _ in range(length)).strip() + "e"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files of three kinds over two local files, and no data set left in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    generator, path = random.Random(0), tmp_path / "tasks"
    path.mkdir()
    questions = [
        {"question": words(generator, 8), "choices": [words(generator, n) for n in (3, 6, 4)], "answer": at % 3}
        for at in range(25)
    ]
    texts = [{"text": words(generator, 30) + " " + words(generator, 20)} for _ in range(22)]
    for name, rows in (("questions", questions), ("texts", texts)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for task, name in ((CHOICE, "questions"), (ROLLING, "texts"), (WRITING, "questions")):
        write(path, task | {"dataset_kwargs": {"data_files": {"test": str(path / f"{name}.jsonl")}}})
    return path


def write(folder: Path, task: dict) -> None:
    (folder / f"{task.get('task') or task['group']}.yaml").write_text(json.dumps(task))  # JSON is YAML


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def spelling(path: Path) -> None:
    """A tokenizer of single letters into a checkpoint."""
    core = Tokenizer(
        models.WordLevel({letter: at for at, letter in enumerate(["<u>", "<s>", "</s>", *LETTERS])}, unk_token="<u>")
    )
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL).save_pretrained(path)


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tasks but those of the folder: listing the harness's own takes seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        tasks, "_manager", lambda names, path: TaskManager(include_path=str(path), include_defaults=False)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tiny-llama"
    shutil.copytree(tiny_checkpoint("llama", torch.float32), path)
    spelling(path)
    return path


def log_probabilities(ours: PreTrainedModel, spell: Any, prompt: str, answer: str) -> Tensor:
    """Of every letter of an answer, given all before it."""
    ids = [spell(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    ids[0] = ids[0] or [spell.bos_token_id]
    logits = ours(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1).detach()
    return torch.stack([logits[len(ids[0]) + at - 1, letter] for at, letter in enumerate(ids[1])])


def choices(path: Path, folder: Path, by_length: bool) -> list[float]:
    return chosen(open_model(path, dtype=torch.float64), open_tokenizer(path), folder, by_length)


def chosen(ours: PreTrainedModel, spell: Any, folder: Path, by_length: bool) -> list[float]:
    """Whether the likeliest answer is the right one, per letter or as it is."""
    found = []
    for row in read(folder, "questions"):
        scores = []
        for choice in row["choices"]:
            score = float(log_probabilities(ours, spell, row["question"], choice).sum())
            scores.append(score / (len(choice) if by_length else 1))
        found.append(float(scores.index(max(scores)) == row["answer"]))
    return found


def rolled(ours: PreTrainedModel, spell: Any, folder: Path) -> tuple[float, int, int]:
    """Log-likelihood, words and bytes of all texts."""
    texts = [row["text"] for row in read(folder, "texts")]
    total = sum(float(log_probabilities(ours, spell, "", text).sum()) for text in texts)
    return total, sum(len(re.split(r"\s+", text)) for text in texts), sum(len(text.encode()) for text in texts)


def scores_of(ran) -> dict[tuple[str, str], dict]:
    assert ran.code == 0, ran
    return {(row["task"], row["metric"]): row for row in json.loads(ran.out)["tasks"]}


@pytest.fixture
def fold(run, model: Path, tmp_path: Path) -> Path:  # noqa: F811
    words = ("--kv-heads", 2, "--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
    assert run("fold", model, tmp_path / "fold", *words).code == 0
    return tmp_path / "fold"


def test_values_are_what_the_probabilities_say(run, model, fold, folder):  # noqa: F811
    names = ("--task", "my_choice,my_rolling", "--include-path", folder)
    ran = run("eval", fold, *names, "--reference", model, "--json")
    assert ran.err == ""
    found = scores_of(ran)
    for path, field in ((fold, "value"), (model, "reference")):
        for metric, by_length in (("acc", False), ("acc_norm", True)):
            assert found["my_choice", metric][field] == sum(choices(path, folder, by_length)) / 25
        total, num_words, num_bytes = rolled(open_model(path, dtype=torch.float64), open_tokenizer(path), folder)
        expected = {
            "word_perplexity": math.exp(-total / num_words),
            "byte_perplexity": math.exp(-total / num_bytes),
            "bits_per_byte": -total / num_bytes / math.log(2),
        }
        for metric, value in expected.items():
            assert found["my_rolling", metric][field] == pytest.approx(value, rel=FLOAT32)
    row = found["my_rolling", "bits_per_byte"]
    assert row["low"] < row["value"] < row["high"] and row["num_items"] == 22 and row["lower_is_better"]
    assert not found["my_choice", "acc"]["lower_is_better"] and found["my_choice", "acc"]["num_fewshot"] == 0
    shown = run("eval", fold, *names)
    assert f"{row['value']:.4f}" in shown.out and "my_choice" in shown.out and "requests:" in shown.err


def test_the_harness_alone_says_the_same(model, folder):
    """Its own entry, with examples in the prompt."""
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    ours, spell = open_model(model), open_tokenizer(model)
    names = ["my_choice", "my_rolling", "my_writing"]
    options = {"num_fewshot": 2, "limit": 7}
    with tasks._silenced():
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        lm = HFLM(pretrained=ours, tokenizer=spell, backend="causal", batch_size=4)
        expected = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    found = tasks.run(ours, spell, tasks.load_tasks(names, folder), **options)
    assert {(one.task, one.metric) for one in found} >= {("my_choice", "acc"), ("my_writing", "exact_match")}
    for one in found:
        assert one.total == pytest.approx(expected["results"][one.task][f"{one.metric},none"], rel=FLOAT32)
        assert one.num_fewshot == expected["n-shot"][one.task] == 2 and len(one) == 7


def test_folds_of_our_runtime_are_run_by_it(run, tmp_path, folder):  # noqa: F811
    """GPT-2 has no grouped form in transformers: its fold is a class of ours."""
    path = tmp_path / "gpt2"
    shutil.copytree(tiny_checkpoint("gpt2", torch.float32), path)
    spelling(path)
    words = ("--kv-heads", 2, "--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
    assert run("fold", path, tmp_path / "out", *words).code == 0
    assert "headfold" in json.loads((tmp_path / "out" / "config.json").read_text())
    texts = [row["text"][:20] for row in read(folder, "texts")]  # the context is of 32
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = scores_of(run("eval", tmp_path / "out", "--task", "my_rolling", "--include-path", folder, "--json"))
    total, num_words, _ = rolled(headfold.load(tmp_path / "out", dtype=torch.float64), open_tokenizer(path), folder)
    original = rolled(open_model(path, dtype=torch.float64), open_tokenizer(path), folder)[0]
    assert found["my_rolling", "word_perplexity"]["value"] == pytest.approx(math.exp(-total / num_words), rel=FLOAT32)
    assert abs(original / total - 1) > 1e-3


def test_compare_is_of_the_same_items(run, model, fold, folder):  # noqa: F811
    names = ("--task", "my_choice,my_rolling", "--include-path", folder, "--json")
    alone = [scores_of(run("eval", path, *names)) for path in (model, fold)]
    rows = json.loads(run("eval", "--compare", model, fold, *names).out)
    for at, path in enumerate((model, fold)):
        for key, row in alone[at].items():
            (found,) = [one for one in rows if one["model"] == str(path) and one["metric"] == " ".join(key)]
            assert found["value"] == row["value"] and found["num_units"] == row["num_items"]
    right = [np.array(choices(path, folder, True)) for path in (model, fold)]
    units = [bootstrap.mean_of("acc_norm", "items", each) for each in right]
    (expected,) = bootstrap.differences(units)
    (found,) = [one for one in rows if one["model"] == str(fold) and one["metric"] == "my_choice acc_norm"]
    assert [found[name] for name in ("difference", "low", "high", "p")] == pytest.approx(
        [expected.value, expected.low, expected.high, expected.p], abs=1e-12
    )
    same = json.loads(run("eval", "--compare", fold, fold, *names).out)
    assert all((row["low"], row["high"], row["p"]) == (0, 0, 1) for row in same if row["difference"] is not None)
    refused(run("eval", "--compare", model, fold, "--reference", model, *names), "--reference", "first model")


def test_any_aggregate_is_resampled():
    """Sums where there are some, else the harness's own function on the drawn items."""
    from lm_eval.api.registry import get_aggregation

    generator = np.random.default_rng(0)
    pairs, numbers = list(zip(-generator.gamma(5, size=9), range(3, 12), strict=True)), list(generator.normal(size=9))
    counts = np.random.default_rng(1).multinomial(9, [1 / 9] * 9, size=20)
    for name in ("mean", "perplexity", "median", "weighted_perplexity", "bits_per_byte"):
        aggregate, drawn_from = get_aggregation(name), pairs if name.startswith(("w", "b")) else numbers
        sums = tasks._sums(drawn_from, aggregate)
        assert (sums is None) == (name == "median")
        units = tasks.TaskUnits(
            task="t", metric="m", total=0.0, num_fewshot=0, lower_is_better=False, items=drawn_from, aggregate=aggregate, sums=sums
        )  # fmt: skip
        expected = [aggregate([drawn_from[at] for at in np.repeat(np.arange(9), row)]) for row in counts]
        assert units.resampled(counts).tolist() == pytest.approx(expected, rel=1e-12)
    assert tasks._sums([("a", "b")], get_aggregation("mean")) is None


def test_groups_are_all_their_items(own_tasks, model, folder):  # noqa: F811
    half = CHOICE | {"dataset_kwargs": {"data_files": {"test": str(folder / "half.jsonl")}}, "task": "my_half"}
    (folder / "half.jsonl").write_text("\n".join((folder / "questions.jsonl").read_text().splitlines()[:10]))
    write(folder, half)
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    write(folder, {"group": "my_group", "task": ["my_choice", "my_half"], "aggregate_metric_list": metrics})
    found = tasks.run(open_model(model), open_tokenizer(model), tasks.load_tasks(["my_group"], folder))
    (group,) = [one for one in found if one.task == "my_group"]
    right = choices(model, folder, False)
    assert group.total == pytest.approx((sum(right) + sum(right[:10])) / 35, rel=1e-12) and len(group) == 35


def test_a_task_that_says_no_examples_means_it(model, folder):
    for own, asked, expected in ((0, 3, 0), (None, None, 0), (1, None, 1), (1, 3, 3)):
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
        write(folder, CHOICE | data | ({} if own is None else {"num_fewshot": own}))
        loaded = tasks.load_tasks(["my_choice"], folder)
        found = tasks.run(open_model(model), open_tokenizer(model), loaded, num_fewshot=asked, limit=2)
        assert {one.num_fewshot for one in found} == {expected}


def test_generators_are_left_as_they_were(model, folder):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tasks.run(open_model(model), open_tokenizer(model), tasks.load_tasks(["my_writing"], folder), limit=2)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_streamed_model_says_the_same(model, folder):
    loaded, spell = tasks.load_tasks(["my_rolling"], folder), open_tokenizer(model)
    whole, streamed = (tasks.run(open_model(model, memory_limit=limit), spell, loaded, limit=3) for limit in (None, 0))
    assert [one.total for one in whole] == [one.total for one in streamed]


def test_half_precision_is_not_that_of_the_sums(model, folder):
    """bf16 models: log-probabilities of a text are no multiples of a quarter."""
    ours = open_model(model).to(torch.bfloat16)
    found = tasks.run(ours, open_tokenizer(model), tasks.load_tasks(["my_rolling"], folder))
    assert any(value * 4 % 1 for value, _ in found[0].items)


def test_encoder_decoders_run_tasks(run, saved, folder):  # noqa: F811
    """Likelihoods of targets, teacher-forced, given the question."""
    path, data = saved(writer("t5"), "t5"), {"dataset_kwargs": {"data_files": {"test": str(folder / "pairs.jsonl")}}}
    rows = [{"question": f"w{at} w3", "choices": [f"w{at + 1}", "w5 w6"], "answer": at % 2} for at in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder, CHOICE | data)
    found = scores_of(run("eval", path, "--task", "my_choice", "--include-path", folder, "--json"))
    ours, spell, right = open_model(path), open_tokenizer(path), []
    for row in rows:
        given, scores = torch.tensor([spell(row["question"])["input_ids"]]), []
        for choice in row["choices"]:
            target = torch.tensor([spell(choice, add_special_tokens=False)["input_ids"]])
            logits = ours(input_ids=given, labels=target).logits[0].log_softmax(-1)
            scores.append(float(logits.gather(1, target[0][:, None]).sum()))
        right.append(scores.index(max(scores)) == row["answer"])
    assert found["my_choice", "acc"]["value"] == sum(right) / 20


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--task", "my_choise"), ("my_choise", "did you mean my_choice")),
        (("--task", "my_choice", "--text", "stdlib"), ("--text", "--task")),
        (("--task", "my_choice", "--metric", "rouge"), ("--metric", "--task")),
        (("--task", "broken"), ("broken", "--debug")),
        (("--task", "lost"), ("lost", "cannot be read", "nowhere.jsonl")),
    ],
    ids=lambda words: " ".join(words),
)
def test_bad_requests(run, own_tasks, model, folder, words, expected):  # noqa: F811
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    write(folder, CHOICE | data | {"task": "broken", "doc_to_text": "{{question.nothing.of.it}}"})
    write(folder, CHOICE | {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}})
    refused(run("eval", model, *words, "--include-path", folder), *expected)


def test_what_tasks_are_not_for(run, model, saved, tmp_path):  # noqa: F811
    path = saved(tiny("ViTForImageClassification", "vit"), "vit")
    refused(run("eval", path, "--task", "hellaswag"), "vit", "images", "--text SOURCE")
    refused(run("eval", model, "--task", "x", "--include-path", tmp_path / "nowhere"), "nowhere", "folder")


def test_a_writer_needs_an_end(model, folder):
    spell = open_tokenizer(model)
    spell.eos_token = None
    with pytest.raises(UserError, match="my_writing: the model is to write, but its tokenizer names no eos_token"):
        tasks.run(open_model(model), spell, tasks.load_tasks(["my_writing"], folder))


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'headfold\[tasks\]'"):
        tasks.load_tasks(["hellaswag"])


def test_the_harness_is_silent(capsys):
    with tasks._silenced():
        print("a remark")
        print("a bar", file=sys.stderr)
    print("heard")
    assert capsys.readouterr() == ("heard\n", "") and not isinstance(sys.stdout, io.StringIO)
