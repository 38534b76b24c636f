"""What the graphs of a directory compute in onnxruntime, beside what a model computes at once and without a cache."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..divergence import difference_and_tolerance
from ..families.context import context_length
from ..hf_models.building import one_line
from .graph import CACHED, DECODER, DECODER_WITH_PAST, ENCODER, answers, encoder_masks
from .inputs import model_inputs, random_tokens

SHAPES = ((1, 9), (3, 12))
"""Numbers of items and of tokens that are compared; neither is a size that was traced."""


class Runner:
    """Runs the graphs of a directory in onnxruntime on the CPU, each opened at its first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sessions: dict[str, Any] = {}

    def session(self, file: str) -> Any:
        """Return the session of a graph."""
        import onnxruntime

        if file not in self.sessions:
            path = str(self.directory / file)
            with _errors(self.directory / file):
                self.sessions[file] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return self.sessions[file]

    def run(self, file: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of a graph by name; it takes those inputs that it has."""
        session = self.session(file)
        outputs = [output.name for output in session.get_outputs()]
        given = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        with _errors(self.directory / file):
            said = session.run(outputs, given)
        return dict(zip(outputs, map(torch.from_numpy, said), strict=True))

    def no_past(self, file: str, batch: int) -> dict[str, Tensor]:
        """Return inputs that hold a cache without tokens."""
        cached = [one for one in self.session(file).get_inputs() if one.name.startswith(CACHED)]
        return {one.name: torch.zeros(batch, one.shape[1], 0, one.shape[3]) for one in cached}


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each of its own type, without a common one
        raise UserError(
            f"{path}: expected a graph that onnxruntime runs, got {one_line(error)}; export again with another version of it"
        ) from error


@torch.no_grad()
def compare_graphs(model: Any, directory: Path, advance: Callable[[int], None]) -> tuple[float, float]:
    """Return the largest difference between outputs of the graphs and of a float32 model, and its tolerance; of several outputs those
    of the one that differs most for its tolerance.

    `advance` is called after each of `SHAPES`.
    """
    runner, found = Runner(directory), []
    for batch, tokens in SHAPES:
        tokens = min(tokens, context_length(model.config.to_dict()) or tokens)
        pairs = _outputs(model, runner, batch, tokens)
        found += [difference_and_tolerance(said, expected, torch.float32) for said, expected in pairs]
        advance(1)
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])


def _outputs(model: Any, runner: Runner, batch: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs of the graphs with those of the model."""
    inputs = model_inputs(model, batch, tokens)
    if not model.can_generate():
        said, found = model(**inputs), runner.run("model.onnx", inputs)
        yield from ((found[name], said[name]) for name in answers(said))
    elif model.config.is_encoder_decoder:
        ids = random_tokens(model.config, batch, tokens)
        yield _decoded(runner, inputs, ids), model(**inputs, decoder_input_ids=ids, use_cache=False).logits
    else:
        counted = inputs["attention_mask"].bool()
        yield _continued(runner, inputs)[counted], model(**inputs, use_cache=False).logits[counted]


def _steps(ids: Tensor) -> tuple[slice, ...]:
    """Return the positions that are read together: all but three, then one, then two."""
    end = ids.shape[1]
    return slice(0, end - 3), slice(end - 3, end - 2), slice(end - 2, end)


def _continued(runner: Runner, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (batch, token, vocabulary) of a language model's graph, which reads the tokens in `_steps`."""
    past, logits = runner.no_past("model.onnx", len(inputs["input_ids"])), []
    for step in _steps(inputs["input_ids"]):
        new = {name: tensor[:, step] for name, tensor in inputs.items()}
        mask = {"attention_mask": inputs["attention_mask"][:, : step.stop]}
        said = runner.run("model.onnx", new | mask | past)
        logits.append(said["logits"])
        past = {name: said[name.replace(CACHED, "present")] for name in past}
    return torch.cat(logits, 1)


def _decoded(runner: Runner, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return the logits (batch, token, vocabulary) of an encoder-decoder's graphs, which read the decoder's tokens in `_steps`."""
    given = {"encoder_hidden_states": runner.run(ENCODER, inputs)["last_hidden_state"]}
    given |= encoder_masks(inputs)
    file, logits = DECODER, []
    for step in _steps(ids):
        said = runner.run(file, given | {"input_ids": ids[:, step]})
        logits.append(said.pop("logits"))
        given |= {name.replace("present", CACHED): tensor for name, tensor in said.items()}
        file = DECODER_WITH_PAST
    return torch.cat(logits, 1)
