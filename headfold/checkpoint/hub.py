"""The directory or file of a model that the user names by a path or a hub id."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError, suggest
from .entries import check_entries

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
_UNWANTED = ["*/*", "consolidated*", "adapter_model*"]
"""Second copies of the weights in other layouts."""

_PICKLED = ["pytorch_model*.bin"]
"""Fetched where a repository has no safetensors."""
_CODE = ["*.py"]
"""Fetched where the user trusts it."""
_ADAPTER = ["adapter_config.json", "adapter_model*"]
GGUF = ".gguf"
"""How the name of a file ends that holds a whole model for llama.cpp."""

_REASONS = {
    "HFValidationError": "no hub id has such a name",
    "RepositoryNotFoundError": "the hub has no such repository, or not for you",
    "GatedRepoError": "its owner has not given you access",
    "LocalEntryNotFoundError": "it is not in the local cache and the hub cannot be reached",
}
"""What the errors of the hub client mean, by class name, so that the client is imported only when it is used."""


@dataclass(frozen=True, slots=True)
class NamedDirectory:
    """A checkpoint directory of a model that is called otherwise in messages and on cards.

    It is temporary: what is made of it lies beside it, and is removed with it.
    """

    path: Path
    name: str

    def __str__(self) -> str:
        return self.name


def resolve(model: object) -> Path:
    """Return the directory of a model: `model` itself, or a snapshot of that hub id (its weights, json and tokenizer files only).

    Raises:
        UserError: neither a directory nor a hub id that can be downloaded; a directory that leads elsewhere (`check_entries`).
    """
    found = locate(model)
    if not found.is_dir():
        raise UserError(
            f"{model}: expected a checkpoint directory or a hub id here, got a file; fold or calibrate reads it"
        )
    return found


def locate(model: object, code: bool = False) -> Path:
    """Return the directory of a model as `resolve` does, or the GGUF file that `model` names; of a hub id with the `code` beside the
    weights, if that is trusted.

    Raises:
        UserError: as `resolve`, or a file of another kind.
    """
    if isinstance(model, NamedDirectory):
        return model.path
    model = str(model)
    if not model.strip():
        raise UserError("model: expected a checkpoint directory or a hub id, got an empty name; pass one")
    path = Path(model).expanduser()
    if path.is_dir():
        check_entries(path)
        return path
    if path.suffix.lower() == GGUF and path.is_file():
        return path
    if path.exists():
        raise UserError(
            f"{model}: expected a checkpoint directory, a GGUF file or a hub id, got another file; pass the directory that holds it"
        )
    if _is_path(model) or path.suffix.lower() == GGUF:
        raise UserError(f"{model}: no such directory{_neighbour(path)}; check the path")
    wanted = [*_WANTED, *(_CODE if code else [])]
    found = _download(model, wanted, _UNWANTED)
    if not any(found.glob("*.safetensors")):
        found = _download(model, [*wanted, *_PICKLED], _UNWANTED)
    return found


def locate_adapter(adapter: str) -> Path:
    """Return the directory of an adapter: `adapter` itself, or a snapshot of that hub id.

    Raises:
        UserError: as `resolve`.
    """
    path = Path(adapter).expanduser()
    if adapter.strip() and path.is_dir():
        check_entries(path)
        return path
    if not adapter.strip() or path.exists() or _is_path(adapter):
        raise UserError(
            f"--adapter {adapter}: expected the directory of an adapter or a hub id, got none; check the path"
        )
    return _download(adapter, _ADAPTER, ["*/*"])


def cached(repository: str, revision: str | None = None) -> Path | None:
    """Return the snapshot of a hub id that an earlier download left here, of which files may be missing; None where there is none."""
    if _is_path(repository):
        return None
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        check_entries(found)
    except Exception:  # no such snapshot, or no name of one
        return None
    return found


def _is_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.endswith(os.sep) or model.count("/") > 1


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    near = suggest(path.name, (entry.name for entry in path.parent.iterdir() if entry.is_dir()))
    return f"; {near.rstrip('?')}" if near.startswith("did you mean") else ""


def _download(repository: str, wanted: list[str], unwanted: list[str]) -> Path:
    # Imported here: it takes a while, and most models are directories.
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        # Whatever the hub or the network does, the user can only check the name, the connection and the rights.
        raise UserError(
            f"{repository}: neither a directory here nor a hub model that can be fetched ({reason_of(error)}); "
            "check the name, the network and your access"
        ) from error
    check_entries(found)
    return found


def reason_of(error: Exception) -> str:
    """Return what an error of the hub client means, in a few words."""
    said = str(error).strip().partition(chr(10))[0]
    if type(error) is RuntimeError and isinstance(
        error.__cause__, Exception
    ):  # which file could not be uploaded, not why
        return f"{said.rstrip('.')}, {reason_of(error.__cause__)}"
    return _REASONS.get(type(error).__name__) or f"{type(error).__name__}: {said}"
