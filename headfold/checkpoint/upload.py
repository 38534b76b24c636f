"""Upload an output directory to a repository on the hub."""

from pathlib import Path

from ..core.errors import UserError
from .hub import reason_of

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
    """Upload a directory and return a line that says where it is.

    A repository that does not exist is made with the visibility that the account or organisation has by default, as
    `transformers.PreTrainedModel.push_to_hub` makes it. Weights of an earlier model go, as its history keeps them; other files stay.

    Raises:
        UserError: the hub refuses, or cannot be reached; the directory stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        made = hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id, folder_path=directory, commit_message="Upload a fold by headfold", repo_type="model",
            delete_patterns=_STALE,
        )  # fmt: skip
    except Exception as error:
        raise UserError(
            f"--push-to-hub {repository}: {directory} is whole, but was not uploaded: {reason_of(error)}; try again with hf upload "
            f"{repository} {directory}"
        ) from error
    return f"uploaded to {made}"
