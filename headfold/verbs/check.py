"""Run a fold in the engines that serve it, and compare what they compute with headfold's runtime."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..core.progress import Progress, counter, no_progress
from ..exports.folded import Folded, open_folded
from ..exports.formats import check_format, engine_formats
from ..families.cached import stored_kv_bytes_per_token
from ..latent.gguf import is_latent
from ..parallel import main_only
from ..serving.ask import Installed, Refusal, ask, installed
from ..serving.code import refuse_foreign_code
from ..serving.engine import Engine, all_engines, engine_named, quoted
from ..serving.expected import Expected, expected
from ..serving.likeness import likeness
from ..serving.result import CheckResult, CheckRow
from ..sources.plain import open_plain

NEW_TOKENS = 64
TEXT = Path(__file__).parents[1] / "bundled" / "heldout.txt"
FLOAT32 = 4
"""Bytes."""


@main_only
def check(
    model: str | Path,
    *,
    engines: Sequence[str] | Mapping[str, str | Path | None] = (),
    text: str | Path | None = None,
    tokens: int | None = None,
    new_tokens: int = NEW_TOKENS,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Run a language model in serving engines, and compare their logits and greedy tokens with those of headfold's runtime.

    All compute in float32, on one processor. What an engine reads files of is exported to a temporary place first, also in float32.

    Args:
        model: A checkpoint directory that `headfold.fold` wrote, or an original.
        engines: Names of engines, or name → the Python that has the engine (None for this one). Without any nothing is run, and the
            rows say how each engine is installed and how it serves the model.
        text: A text file to compute on; by default Python source that comes with the package.
        tokens: Tokens of the text that logits are compared on; by default 240, or what the model takes.
        new_tokens: Greedy tokens after them, at least 2.
        adapter: A LoRA adapter of peft that is merged into the model first.
        trust_remote_code: Let engines run code that lies beside the weights, though headfold did not write it.
        progress: Called with (stage, done, total).

    Raises:
        UserError: no language model, an unknown engine, one that is not installed, code of another's, or a text that is too short.
    """
    progress = progress or no_progress
    path = Path(model) if adapter is None else open_plain(str(model), str(adapter), progress).path
    pythons = dict(engines) if isinstance(engines, Mapping) else dict.fromkeys(engines)
    if is_latent(path):
        raise UserError(
            f"{path}: check: expected a model with K/V heads, got one with latents (MLA); docs/mla.md says what engines compute of those"
        )
    checkpoint, source = open_folded(path)
    _refuse_others(source)
    found = [installed(engine_named(name), None if at is None else Path(at)) for name, at in pythons.items()]
    if found and not trust_remote_code:
        refuse_foreign_code(checkpoint)
    if found:
        advance = counter(progress, "check", 1 + len(found))
        wanted = expected(checkpoint, Path(text or TEXT), tokens, new_tokens)
        advance(1)
        rows = []
        for one in found:
            rows.append(_run(one, checkpoint, source, wanted))
            advance(1)
        tokens = len(wanted.request.tokens)
    else:
        rows = [CheckRow(engine, _serving(engine, checkpoint, source)) for engine in all_engines().values()]
    kv_bytes = stored_kv_bytes_per_token(checkpoint.config, checkpoint.tensors, FLOAT32)
    return CheckResult(path, tuple(rows), kv_bytes, tokens, new_tokens if found else None)


def _refuse_others(source: Folded) -> None:
    named = source.config.get("architectures") or ["no class"]
    if not str(named[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise UserError(
            f"{source.where}: expected a language model, which engines are compared on by its next tokens, got {named[0]}; headfold "
            "export --layout onnx and ct2 compare what they write for others"
        )


def _serving(engine: Engine, checkpoint: Checkpoint, source: Folded) -> str:
    """Return the command that serves a model, after the export where the engine reads another form; or why there is none."""
    path = Path(os.path.abspath(checkpoint.path)) if checkpoint.path.name in ("", "..") else checkpoint.path
    layout = engine.reads or _instead(engine, checkpoint)
    if layout is None:
        return engine.serve(path, source.config)
    form = engine_formats().get(layout)
    out = path.with_name(f"{path.name}{form.suffix if form and form.suffix else f'-{layout}'}")
    try:
        if form is not None:
            check_format(checkpoint, source, layout, out, None)
    except UserError as error:
        return f"not served: {error}"
    return f"headfold export {quoted(path)} {quoted(out)} --layout {layout} && {engine.serve(out, source.config)}"


def _run(one: Installed, checkpoint: Checkpoint, source: Folded, wanted: Expected) -> CheckRow:
    """Return what one engine makes of the model."""
    serve = _serving(one.engine, checkpoint, source)
    with tempfile.TemporaryDirectory(prefix="headfold-check-") as folder:
        try:
            read = _as_read(one.engine, checkpoint, source, Path(folder))
        except UserError as error:
            return CheckRow(one.engine, serve, one.version, refused=f"cannot be written for it: {error}")
        answer = ask(one, read, wanted.request)
    if isinstance(answer, Refusal):
        return CheckRow(one.engine, serve, one.version, refused=answer.reason + _advice(one.engine, checkpoint))
    per_token = answer.seconds_per_token
    return CheckRow(
        one.engine,
        serve,
        one.version,
        found=likeness(answer, wanted),
        tokens_per_second=1 / per_token if per_token else None,
        kv_bytes_per_token=answer.kv_bytes_per_token,
    )


def _instead(engine: Engine, checkpoint: Checkpoint) -> str | None:
    """Return the layout to export a checkpoint in that an engine does not read; None where headfold knows none."""
    return next((layout for field, layout in engine.instead.items() if field in checkpoint.config), None)


def _advice(engine: Engine, checkpoint: Checkpoint) -> str:
    layout = _instead(engine, checkpoint)
    return f"; headfold export {quoted(checkpoint.path)} OUT --layout {layout} writes what it reads" if layout else ""


def _as_read(engine: Engine, checkpoint: Checkpoint, source: Folded, folder: Path) -> Path:
    """Return the model in the form that an engine reads: itself, or what is exported of it into a folder.

    Raises:
        UserError: the form does not hold it.
    """
    if engine.reads is None:
        return checkpoint.path
    out = folder / f"model{engine_formats()[engine.reads].suffix}"
    form = check_format(checkpoint, source, engine.reads, out, engine.number_type)
    if not form.suffix:
        out.mkdir()
    form.write(checkpoint, source, out, engine.number_type, lambda done, total: None)
    return out
