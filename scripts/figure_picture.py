"""The picture of the README: perplexity against K/V bytes per token, as SVG text that depends on the results alone."""

import math

from figure_data import SOURCE_KV_HEADS, rows

MODEL = "bundled"
CURVES = {
    "mean": ("mean pooling", "#c0504d"),
    "procrustes+norm": ("procrustes, norm", "#d98f1f"),
    "absorb+refit": ("headfold default", "#2a6fbb"),
    "absorb-wide+refit": ("headfold, head_dim × 2", "#2f8f5b"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 210, 40, 52
TICKS = (30, 50, 100, 200, 500)


def curves() -> tuple[tuple[int, float], dict[str, list[tuple[int, float]]]]:
    """The original's point, and the points of each method: K/V bytes per token and perplexity."""
    points = {
        name: sorted((r["kv_bytes_per_token"], math.exp(r["value"])) for r in rows(f"{MODEL}-methods", method=name))
        for name in CURVES
    }
    one = rows(f"{MODEL}-methods", method="mean")[0]
    whole = one["kv_bytes_per_token"] * SOURCE_KV_HEADS[MODEL] // one["num_kv_heads"]
    return (whole, math.exp(one["original"])), points


def svg() -> str:
    original, points = curves()
    every = [original, *(point for line in points.values() for point in line)]
    x_of = [math.log2(x) for x, _ in every]
    y_of = [math.log(y) for _, y in every]
    low_x, high_x, low_y, high_y = min(x_of) - 0.2, max(x_of) + 0.2, min(y_of) - 0.15, max(y_of) + 0.15

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x = LEFT + (math.log2(point[0]) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (math.log(point[1]) - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    right = WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#333">',
        "<title>Perplexity against K/V bytes per token of the bundled model, original and folds without training</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="15">The bundled model folded without training: perplexity against K/V bytes per token</text>',
        f'<text x="4" y="{TOP - 8}">perplexity</text>',
    ]
    for tick in TICKS:
        y = place((original[0], tick))[1]
        if TOP <= y <= HEIGHT - BOTTOM:
            parts.append(
                f'<path d="M{LEFT} {y}H{right}" stroke="#ddd"/><text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick}</text>'
            )
    for amount in sorted({x for x, _ in every}):
        x, below = place((amount, original[1]))[0], HEIGHT - BOTTOM
        parts.append(f'<path d="M{x} {TOP}V{below}" stroke="#eee"/>')
        parts.append(f'<text x="{x}" y="{below + 18}" text-anchor="middle">{amount:,}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{right}" fill="none" stroke="#666"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">K/V bytes per token</text>')
    level = place(original)[1]
    parts.append(f'<path d="M{LEFT} {level}H{right}" stroke="#333" stroke-dasharray="4 4"/>')
    for at, (name, (label, colour)) in enumerate(CURVES.items()):
        line = [place(point) for point in [*points[name], original]]
        path = " ".join(f"{x},{y}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in line[:-1]]
        y = TOP + 14 + 22 * at
        parts.append(
            f'<path d="M{right + 16} {y}h18" stroke="{colour}" stroke-width="2"/><text x="{right + 40}" y="{y + 4}">{label}</text>'
        )
    x, y = place(original)
    parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#333"/><text x="{x + 10}" y="{y - 8}">original</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
