"""Upload an output directory to a repository on the hub."""

from fnmatch import fnmatch
from pathlib import Path

from ..core.errors import UserError
from .hub import reason_of
from .staging import JOB

_STALE = [
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "consolidated*.safetensors"),
    *("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
]
"""Names of weights that belong to an earlier model of the repository where this one has none of that name: readers would take them."""


def check_upload(repository: str | None) -> None:
    """Check, before any work, that the name can be one of a repository and that the hub knows the user.

    Raises:
        UserError: it cannot, or the hub does not or cannot be reached.
    """
    if repository is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except Exception as error:  # as for a download: whatever the client and the network do
        raise UserError(
            f"--push-to-hub {repository}: expected a repository to write to, got: {reason_of(error)}; check the name, the network "
            "and your token (hf auth login)"
        ) from error


def upload(directory: Path, repository: str) -> str:
    """Upload a directory in one commit, the last request, and return a line that says where it is.

    A repository that does not exist is made with the visibility that the account or organisation has by default, as
    `transformers.PreTrainedModel.push_to_hub` makes it. Weights of an earlier model go, as its history keeps them; other files stay.

    Raises:
        UserError: the hub refuses, or cannot be reached; the directory stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {file.relative_to(directory).as_posix(): file for file in sorted(directory.rglob("*")) if file.is_file()}
    files.pop(JOB, None)
    try:
        hub = HfApi()
        made = hub.create_repo(repository, exist_ok=True)
        stale = [name for name in hub.list_repo_files(made.repo_id) if name not in files and _is_stale(name)]
        # Not `upload_folder`, which commits in several parts where there are many files or a commit fails: readers would meet a model of
        # new and old shards.
        hub.create_commit(
            made.repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, file) for name, file in files.items()),
            ],
            commit_message="Upload a fold by headfold",
        )
    except Exception as error:
        raise UserError(
            f"--push-to-hub {repository}: {directory} is whole, but was not uploaded: {reason_of(error)}; run the same command again, "
            "which then uploads it and does nothing else"
        ) from error
    return f"uploaded to {made}"


def _is_stale(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _STALE)
