"""Files that belong to a model, in folders and on a model hub."""

from pathlib import Path
from typing import Any


def find_file(name_or_path: str | Path, file: str, what: str, remedy: str, **hub: Any) -> Path:
    """Where `file` lies: in a folder, as a path to itself, or downloaded from a model hub.

    Args:
        what: what it is, for messages, like "sharing".
        remedy: how one gets such a file.
        hub: `revision`, `token` and whatever else `huggingface_hub.hf_hub_download` takes.

    Raises:
        FileNotFoundError: a folder without the file.
        OSError: no such repository can be reached.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / file
    local = path.name == file or path.is_absolute() or str(name_or_path).startswith(".") or len(path.parts) > 2
    if local and not path.exists():
        raise FileNotFoundError(f"there is no {path}; {remedy}, or give the id of a repository that has one")
    if path.exists():
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name_or_path), file, **hub))
    except OSError as error:
        raise OSError(
            f"{what} {str(name_or_path)!r} is no folder, and no repository with {file} that can be reached"
        ) from error


def push_file(content: bytes, file: str, repo_id: str, **hub: Any) -> None:
    """Uploads a file to a model repository, which is created if it is not there.

    Args:
        hub: `token`, `private` (of a new repository), `revision` and `commit_message`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=hub.pop("token", None))
    api.create_repo(repo_id, private=hub.pop("private", None), exist_ok=True)
    api.upload_file(path_or_fileobj=content, path_in_repo=file, repo_id=repo_id, **hub)
