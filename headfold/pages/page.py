"""The page as one file of HTML: sections, stylesheet, data and script inside, nothing fetched from anywhere."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..core.errors import UserError
from . import costs, engines, grouping, layers, losses, outcome, positions, summary, texts
from .contents import Contents
from .elements import Section, as_script, joined

SECTIONS = (outcome, summary, costs, losses, layers, positions, grouping, texts, engines)
"""The files of the sections, in the order of the page."""
GENERATOR = '<meta name="generator" content="headfold'
"""By which a page that headfold wrote is told from a file of the user's."""
_HERE = Path(__file__).parent
_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{}
<meta http-equiv="Content-Security-Policy" content="{}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{}</title>
<style>{}</style>
</head>
<body>
<header>
<h1>{}</h1>
<nav aria-label="Sections"><ul>{}</ul></nav>
</header>
<main>
{}
</main>
<footer><p>Written by headfold {}. Every figure is from the files that the page was made of.</p></footer>
{}
</body>
</html>
""")


def require_charts() -> None:
    """Check, before anything is run, that the library that draws charts is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError("a page with charts needs vl-convert-python; pip install 'headfold[report]'") from error


def render(contents: Contents, title: str) -> str:
    """Return the page.

    Raises:
        UserError: as `require_charts`, where the page has a chart.
    """
    made = [file.section(contents) for file in SECTIONS]
    sections = [section for section in made if section is not None]
    charts = {anchor: spec for section in sections for anchor, spec in section.charts.items()}
    style, script = (_HERE / "style.css").read_text(), _script() if charts else ""
    # The script alone may run, by its digest; no other code, no style but the page's own, no connection to anywhere.
    policy = f"default-src 'none'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    policy += f"; script-src '{_digest(script)}'" if script else ""
    links = (Markup('<li><a href="#{}">{}</a></li>').format(one.anchor, one.heading) for one in sections)
    return str(
        _PAGE.format(
            Markup(f'{GENERATOR} {version("headfold")}">'),
            policy,
            title,
            Markup(style),
            title,
            joined(links),
            joined(_section(one) for one in sections),
            version("headfold"),
            _scripts(charts, script) if charts else "",
        )
    )


def _section(found: Section) -> Markup:
    parts = joined(found.parts)
    return Markup('<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>\n{2}\n</section>').format(
        found.anchor, found.heading, parts
    )


def _scripts(charts: dict[str, Any], script: str) -> Markup:
    data = Markup('<script type="application/json" id="charts">{}</script>').format(as_script(charts))
    without = Markup("<noscript><p>Charts need JavaScript; the tables below them have the same numbers.</p></noscript>")
    return joined([without, data, Markup("<script>{}</script>").format(Markup(script))])


@functools.cache
def _script() -> str:
    """Return vega, vega-lite and vega-embed with the page's own script, as one script that needs no other file."""
    require_charts()
    import vl_convert

    bundle: str = vl_convert.javascript_bundle((_HERE / "page.js").read_text())
    # Neither may stand in a script element; both can only be part of a text there.
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def titled(names: Sequence[str]) -> str:
    """Return the title of a page on these folds and folders."""
    return f"headfold: {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
