"""A GGUF file for llama.cpp and what builds on it (Ollama, LM Studio, llama-cpp-python).

The architecture is `llama`, or `deci` where the number of heads differs between layers, because llama.cpp reads numbers per layer there.
Groups of different sizes are filled up with zero query heads to the largest of their layer. Every table of rotary frequencies but the
plain one is written as factors per frequency (`rope_freqs`), which holds the tables of larger heads too. With `--quantise q4_0`, K, V,
O and embeddings are q8_0, as the heads that remain are read by more queries; with q4_0-pure they are q4_0 as well.
"""

from collections.abc import Callable
from pathlib import Path

from ...checkpoint.reader import Checkpoint
from ...llama_cpp.tokens import tokenizer_note, tokenizer_why_not
from ..folded import Folded
from ..formats import EngineFormat, Written
from ..gguf_file import write_file
from ..gguf_model import MODEL_TYPES, NUMBER_TYPES, described, model_why_not


def why_not(checkpoint: Checkpoint, source: Folded) -> str | None:
    """Return why llama.cpp cannot run the fold as headfold does."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return "the format needs gguf: pip install 'headfold[gguf]'"
    if not source.entries:
        return "expected a model that generates text, or a BERT without a task; llama.cpp's own converter writes the others"
    return model_why_not(checkpoint, source) or tokenizer_why_not(checkpoint.path)


def write(
    checkpoint: Checkpoint, source: Folded, path: Path, number_type: str | None, progress: Callable[[int, int], None]
) -> Written:
    """Write the file, one tensor at a time in memory."""
    model = described(checkpoint, source, number_type)
    write_file(model, checkpoint, path, progress)
    said = f"GGUF of architecture {model.architecture}, {model.number_type}: {model.heads}"
    return Written(model.architecture, "; ".join(filter(None, (said, tokenizer_note(checkpoint.path)))))


FORMAT = EngineFormat(
    name="gguf",
    suffix=".gguf",
    model_types=MODEL_TYPES,
    number_types=NUMBER_TYPES,
    why_not=why_not,
    write=write,
)
