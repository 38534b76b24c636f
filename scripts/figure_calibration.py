"""Tables of what little calibration costs, and calibration on text of another kind."""

from figure_data import rows
from figure_tables import Block, interval, number, table

RESULTS = "calibration_amount"
DIMS = 192
"""Input dims of the bundled model."""
KINDS = {
    "stdlib": "Python, as the model was trained on",
    "valid": "English prose, which it had never seen",
}


def amounts() -> str:
    """Loss increase by the number of tokens, with and without a refit."""
    found = {(row["tokens"], row["refit"]): row for row in rows(RESULTS, rows="tokens")}
    lines = [
        [f"{tokens:,}", f"{tokens / DIMS:.1f}", *(interval(found[tokens, refit]) for refit in (True, False))]
        for tokens in sorted({tokens for tokens, _ in found})
        if {(tokens, True), (tokens, False)} <= found.keys()
    ]
    return table(["tokens", "per input dim", "loss increase (nats)", "without a refit"], lines)


def windows() -> str:
    """Loss increase by the length of the calibration windows, the longest those of the other table."""
    shorter = rows(RESULTS, rows="windows")
    every = [*shorter, *rows(RESULTS, rows="tokens", tokens=shorter[0]["tokens"], refit=True)]
    return table(
        ["tokens of a window", "tokens", "loss increase (nats)"],
        [[str(row["window"]), f"{row['tokens']:,}", interval(row)] for row in every],
    )


def kinds() -> str:
    """Loss increase by the kind of text, and how far the text is from the model's own."""
    return table(
        ["calibration text", "tokens", "perplexity", "loss beyond the expected one (nats)", "loss increase (nats)"],
        [
            [KINDS[row["name"]], f"{row['tokens']:,}", number(row["perplexity"]), number(row["excess"]), interval(row)]
            for row in rows(RESULTS, rows="kinds")
        ],
    )


TEXTS = {
    "stdlib": "Python",
    "valid": "Wikipedia (WikiText-2)",
    "input": "Shakespeare",
    "letters": "letters drawn at random",
}


def surprises() -> str:
    """How far texts are from what models write, by model."""
    return table(
        ["model", "text", "perplexity", "expected", "loss beyond the expected one (nats)"],
        [
            [
                row["model"],
                TEXTS[row["name"]],
                number(row["perplexity"]),
                number(row["expected_perplexity"]),
                number(row["excess"]),
            ]
            for row in rows(RESULTS, rows="texts")
        ],
    )


CALIBRATION = {
    "calibration-surprises": Block(surprises, (RESULTS,)),
    "calibration-amounts": Block(amounts, (RESULTS,)),
    "calibration-windows": Block(windows, (RESULTS,)),
    "calibration-kinds": Block(kinds, (RESULTS,)),
}
