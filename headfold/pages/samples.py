"""Samples for a page: what the original and its folds write, in the way of their kind, or why there are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError
from ..core.progress import Progress
from ..corpus.samples import kind_of
from ..evaluate import speech, translation
from .contents import Fold, Original, OutputSample, TextSample
from .continuations import NEW_TOKENS, PROMPTS, continuations
from .outputs import outputs

WRITE = ("pairs", "audio")
"""Kinds of models that write for an input; "text" continues one."""


@dataclass(frozen=True, slots=True)
class SamplesRequest:
    """What samples are made of; None stands for a default."""

    prompts: Sequence[str] = ()
    text: str | None = None
    """A source of pairs of text or of recordings."""
    columns: Sequence[str] = ()
    """Of the source; or the languages of pairs of text, which prompts have too."""
    new_tokens: int | None = None

    def check(self, has_original: bool, folds: Sequence[Fold]) -> None:
        """Refuse options that nothing would read.

        Raises:
            UserError: as said.
        """
        for option, value in (("--prompt", self.prompts), ("--text", self.text), ("--columns", self.columns)):
            if value and not has_original:
                raise UserError(f"{option}: expected --original DIR beside it, as both models write for it; give it")
        kinds = {fold.kind for fold in folds}
        if self.columns and self.text is None and not (self.prompts and "pairs" in kinds):  # there they are languages
            raise UserError("--columns: expected --text SOURCE beside it, whose columns they are; give it")
        if self.text is not None and kinds and not kinds & {*WRITE}:
            advice = "give --prompt" if "text" in kinds else "leave it out"
            raise UserError(
                f"--text: expected folds of encoder-decoders or of speech, got models of {kinds.pop()}; {advice}"
            )
        if self.prompts and "audio" in kinds:
            raise UserError("--prompt: expected models that read text, got models of speech; give recordings by --text")
        if self.prompts and self.text is not None:
            raise UserError("report: --prompt and --text exclude each other; give one")


def data_of_samples(config: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of `headfold.report` by which samples are made of the data that a recipe evaluates on, where its model writes
    for them."""
    if kind_of(config) not in WRITE or evaluation is None:
        return {}
    return {name: evaluation[name] for name in ("text", "columns") if name in evaluation}


def samples(
    original: Original | None, folds: Sequence[Fold], request: SamplesRequest, device: str, progress: Progress
) -> tuple[Sequence[TextSample | OutputSample], str]:
    """Return samples of text, or why there are none.

    Raises:
        UserError: as `continuations` or `outputs`.
    """
    if original is None:
        return [], "No samples of text: with --original DIR the original and each fold write for the same inputs."
    kind, paths = folds[0].kind, {fold.name: fold.path for fold in folds}
    if kind == "text":
        prompts, most = request.prompts or PROMPTS, request.new_tokens or NEW_TOKENS
        return continuations(original.path, paths, prompts, new_tokens=most, device=device, progress=progress), ""
    if kind not in WRITE:
        return [], "No samples of text: these models write none."
    if request.text is None and not request.prompts:
        said = "recordings" if kind == "audio" else "pairs of text, or --prompt TEXT"
        return [], f"No samples of text: give --text with {said}."
    most = request.new_tokens or (speech.MAX_NEW_TOKENS if kind == "audio" else translation.MAX_NEW_TOKENS)
    found = outputs(
        original.path, paths, kind, request.text, request.columns, request.prompts, new_tokens=most, device=device, progress=progress
    )  # fmt: skip
    return found, ""
