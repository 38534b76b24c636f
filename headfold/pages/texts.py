"""Samples of text of the original and of each fold side by side, with the tokens where they part marked."""

from collections.abc import Sequence

from markupsafe import Markup

from .contents import Contents, Continuation, TextSample
from .elements import Section, folded_away, paragraph, subheading, table


def section(contents: Contents) -> Section | None:
    """Return the section; None where no fold was given."""
    if not contents.folds:
        return None
    parts: list[Markup] = []
    if contents.no_samples:
        parts.append(paragraph(contents.no_samples, "absent"))
    for number, sample in enumerate(contents.samples, 1):
        parts += _sample(sample, number)
    if contents.samples:
        parts.insert(
            0,
            paragraph(
                "Each model continues the prompt greedily. The first token at which a fold parts from the original is marked; from there "
                "on both read different texts, so what follows is pale. How often a fold would have chosen another token after the "
                "original's own words says more than where they part.",
                "note",
            ),
        )
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
