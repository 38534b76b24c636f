"""Make recordings of synthetic speech with transcripts, in several voices, from a text.

    python scripts/synthetic_speech.py TEXT OUT [--clips 400] [--seed 0]

A speech model that is calibrated on one speaker and one subject is folded for those alone; recordings of any text in any voice widen
the calibration. Needs the program `flite` (in Debian: `apt-get install flite`). Clips differ in voice, speed, pitch, level and noise.
OUT gets NAME.wav (16 kHz) with NAME.txt, as `headfold fold --calibration OUT` reads them.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

VOICES = ("kal16", "awb", "rms", "slt")
RATE = 16000


def sentences(text: str) -> list[str]:
    """Return the sentences of a text in WikiText's spelling that a voice can read, without headings."""
    text = re.sub(r" @(.)@ ", r"\1", text).replace("<unk>", "")
    text = re.sub(r" ([.,;:!?%)])", r"\1", re.sub(r"([(]) ", r"\1", text)).replace(" n't", "n't").replace(" 's", "'s")
    lines = (line.strip() for line in text.splitlines())
    found = (one.strip() for line in lines if not line.startswith("=") for one in re.split(r"(?<=[.!?]) ", line))
    return [" ".join(one.split()) for one in found if 30 < len(one) < 180 and one.isascii() and '"' not in one]


def spoken(text: str, voice: str, stretch: float) -> np.ndarray:
    """Return samples in [-1, 1] of a voice that reads a text, so many times slower than usual."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        words = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", file.name]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        with wave.open(file.name) as opened:
            if opened.getframerate() != RATE:
                raise SystemExit(f"flite: voice {voice}: expected {RATE} Hz, got {opened.getframerate()}")
            return np.frombuffer(opened.readframes(opened.getnframes()), "<i2") / 2**15


def varied(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the sound at another pitch and level, every other one with noise."""
    samples = resample_poly(samples, 10, int(random.integers(9, 12))) * 10 ** (random.uniform(-10, 3) / 20)
    if random.random() < 0.5:
        noise = np.sqrt(np.mean(samples**2) / 10 ** (random.uniform(10, 35) / 10))
        samples = samples + noise * random.standard_normal(len(samples))
    return samples.clip(-1, 1)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("text", type=Path, help="a text")
    reader.add_argument("out", type=Path, help="folder of the recordings, which must not be there")
    reader.add_argument("--clips", type=int, default=400, help="number of recordings")
    reader.add_argument("--seed", type=int, default=0, help="seed of what is drawn")
    options = reader.parse_args()
    if shutil.which("flite") is None:
        sys.exit("flite: not found; install it (Debian: apt-get install flite)")
    if options.out.exists():
        sys.exit(f"{options.out}: exists; choose another folder")
    random = np.random.default_rng(options.seed)
    found = sentences(options.text.read_text(encoding="utf-8"))
    if len(found) < options.clips:
        sys.exit(f"{options.text}: expected {options.clips} sentences, found {len(found)}; ask for fewer --clips")
    options.out.mkdir(parents=True)
    for number, chosen in enumerate(random.permutation(len(found))[: options.clips]):
        text = found[chosen]
        samples = varied(spoken(text, VOICES[number % len(VOICES)], random.uniform(0.8, 1.2)), random)
        with wave.open(str(options.out / f"s{number:04d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((samples * (2**15 - 1)).astype("<i2").tobytes())
        (options.out / f"s{number:04d}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
