"""Draw docs/assets/report.png: the section on the loss of a report on a fold of the bundled model, as Chromium shows it.

    python scripts/report_picture.py

It needs the extra `report`, playwright, pillow and Chromium, and takes about a minute.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import headfold
from headfold.verbs.evaluate import facts

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "report.png"
WIDTH, HEIGHT, COLOURS = 1200, 838, 64


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(Path(folder))
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            opened = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
            opened.goto(page.as_uri())
            opened.wait_for_function("document.documentElement.dataset.drawn === 'true'")
            opened.evaluate("document.getElementById('loss').scrollIntoView({behavior: 'instant'})")
            shot = opened.screenshot()
            browser.close()
    # A palette: the page has few colours, and the file is a quarter of the size.
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size} bytes)")


def write_page(folder: Path) -> Path:
    """Fold the bundled model, compare a few methods on it, measure both, and write the page."""
    original = Path(shutil.copytree(ROOT / "headfold" / "bundled", folder / "my-model"))
    fold, compared, evaluation = folder / "my-model-gqa", folder / "my-model.compare", folder / "eval.json"
    stats = folder / "stats.safetensors"
    headfold.calibrate(original, stats, calibration="stdlib", tokens=16_384)
    headfold.fold(original, fold, kv_heads="1/2", stats=stats, verify=False)
    methods = ("mean", "procrustes", "absorb")
    headfold.compare(original, ["4", "2", "1"], methods=methods, stats=stats, limit=4096, out=compared)
    found = headfold.eval(fold, reference=original, limit=8192)
    evaluation.write_text(json.dumps(facts(found)))
    headfold.report([fold, compared, evaluation], original=original, out=folder / "report.html")
    return folder / "report.html"


if __name__ == "__main__":
    main()
