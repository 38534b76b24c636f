"""Samples of text of the original and of each fold side by side, with the tokens or words in which they differ marked."""

from collections.abc import Sequence
from difflib import SequenceMatcher

from markupsafe import Markup

from .contents import Contents, Continuation, OutputSample, TextSample
from .elements import Section, folded_away, paragraph, subheading, table

_HOW = {
    TextSample: "Each model continues the prompt greedily. The first token at which a fold parts from the original is marked; from there "
    "on both read different texts, so what follows is pale. How often a fold would have chosen another token after the original's own "
    "words says more than where they part.",
    OutputSample: "Each model writes greedily for the same input. Words of a fold that the original does not have there are marked; words "
    "that only the original has are struck through.",
}
"""What a reader has to know of the samples, by their kind."""


def section(contents: Contents) -> Section | None:
    """Return the section; None where no fold was given."""
    if not contents.folds:
        return None
    parts: list[Markup] = []
    if contents.no_samples:
        parts.append(paragraph(contents.no_samples, "absent"))
    if contents.samples:
        parts.append(paragraph(_HOW[type(contents.samples[0])], "note"))
    for number, sample in enumerate(contents.samples, 1):
        parts += _sample(sample, number) if isinstance(sample, TextSample) else _output(sample, number)
    return Section("Samples of text", parts, {}) if parts else None


def _sample(sample: TextSample, number: int) -> list[Markup]:
    original = Markup('<div class="text"><h4>original</h4><p class="written" tabindex="0">{}</p></div>').format(
        "".join(sample.original)
    )
    folds = [_written(name, one, len(sample.original)) for name, one in sample.folds.items()]
    return [
        subheading(f"Sample {number}"),
        Markup('<p class="written prompt" tabindex="0">{}</p>').format(sample.prompt),
        Markup('<div class="texts">{}{}</div>').format(original, Markup("").join(folds)),
    ]


def _output(sample: OutputSample, number: int) -> list[Markup]:
    """Return the texts that the models write for one input."""
    box = Markup('<div class="text"><h4>{}</h4><p class="written" tabindex="0">{}</p>{}</div>')
    boxes = [box.format("in the data", sample.expected.strip(), "")] if sample.expected else []
    boxes.append(box.format("original", sample.original.strip(), ""))
    for name, written in sample.folds.items():
        text, num_other, num_missing = _differences(sample.original.split(), written.split())
        own, theirs = len(written.split()), len(sample.original.split())
        how = f"{num_other} of its {own} words differ; {num_missing} of the original's {theirs} are missing"
        how = how if num_other or num_missing else "writes the same"
        boxes.append(box.format(name, text, paragraph(how, "note")))
    return [
        subheading(f"Sample {number}"),
        Markup('<p class="written prompt" tabindex="0">{}</p>').format(sample.given),
        Markup('<div class="texts">{}</div>').format(Markup("").join(boxes)),
    ]


def _differences(original: Sequence[str], own: Sequence[str]) -> tuple[Markup, int, int]:
    """Return the words of a fold with those marked that differ, how many do, and how many of the original's are not there."""
    parts, num_other, num_missing = [], 0, 0
    for what, first, last, start, end in SequenceMatcher(None, original, own, autojunk=False).get_opcodes():
        theirs, ours = " ".join(original[first:last]), " ".join(own[start:end])
        if what == "equal":
            parts.append(Markup("{}").format(ours))
            continue
        num_other, num_missing = num_other + end - start, num_missing + last - first
        parts += [Markup("<del>{}</del>").format(theirs)] if theirs else []
        parts += [Markup("<mark>{}</mark>").format(ours)] if ours else []
    return Markup(" ").join(parts), num_other, num_missing


def _written(name: str, found: Continuation, num_tokens: int) -> Markup:
    end = found.num_same + 1
    while end < len(found.pieces) and not "".join(found.pieces[found.num_same : end]):
        end += 1  # the beginning of a letter that several tokens make
    same, parting, after = (
        "".join(found.pieces[part]) for part in (slice(found.num_same), slice(found.num_same, end), slice(end, None))
    )
    text = Markup("{}").format(same)
    if parting:
        text += Markup('<mark>{}</mark><span class="after">{}</span>').format(_visible(parting), _visible(after))
    how = f"parts at token {found.num_same + 1}" if parting or found.num_same < num_tokens else "writes the same"
    return Markup('<div class="text"><h4>{}</h4><p class="written" tabindex="0">{}</p>{}{}</div>').format(
        name,
        text,
        paragraph(
            f"{how}; after the original's own words it chooses the same token {found.num_agreeing} of {num_tokens} times",
            "note",
        ),
        _others(name, found.others),
    )


def _others(name: str, others: Sequence[tuple[str, str]]) -> Markup:
    if not others:
        return Markup("")
    rows = [(_visible(theirs), _visible(own)) for theirs, own in others]
    return folded_away("Where it chooses another", table(f"Tokens of {name}", ("original", "this fold"), rows))


def _visible(piece: str) -> str:
    """Return a token with its white space made visible."""
    return piece.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") if not piece.strip() else piece
