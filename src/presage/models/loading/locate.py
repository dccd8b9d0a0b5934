"""From a model's name to a path: bundled model, local folder or .gguf file, else the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from presage.bundled import bundled_path
from presage.core.errors import CheckpointError

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
CONNECT_SECONDS = 5.0


def resolve(name: str | Path, revision: str | None = None, *, weights: bool = True, need_config: bool = True) -> Path:
    """Path of a checkpoint: a folder with config.json, or a .gguf file.

    ``name`` is tried as a bundled model ("presage-tiny"), a local path, a hub file ("org/repo/file.gguf") and a hub repository.
    ``weights=False`` fetches only configuration and tokenizer; ``need_config=False`` takes folders without config.json.
    HF_HUB_OFFLINE, HF_TOKEN and HF_HOME are honoured by huggingface_hub.
    Raises CheckpointError in one line that says what was tried.
    """
    text = str(name)
    bundled = bundled_path(text)
    if bundled is not None:
        return bundled
    path = Path(name).expanduser()
    if path.is_dir():
        return _inside(path, need_config)
    if path.is_file():
        return _local_file(path)
    if text.startswith(("/", ".", "~")) or not _is_hub_name(text):
        raise CheckpointError(f"{text}: no such folder or .gguf file")
    return _from_hub(text, revision, weights)


def _inside(folder: Path, need_config: bool = True) -> Path:
    """A folder that holds only one GGUF file and no config.json means that file."""
    if (folder / "config.json").exists():
        return folder
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: holds {len(found)} .gguf files and no config.json; name one of {', '.join(f.name for f in found)}"
        )
    if need_config:
        raise CheckpointError(f"{folder}: config.json is missing")
    return folder


def _local_file(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: is a file but not .gguf; name the folder that holds config.json")
    return path


def _is_hub_name(text: str) -> bool:
    parts = text.split("/")
    return all(parts) and (len(parts) <= 2 or text.endswith(".gguf"))


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    # Imported here: a local model must start without the hub's client.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    at = f" at revision {revision}" if revision else ""
    try:
        return _fetch(name, revision, weights)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(f"{name}{at}: not a local folder, not in the hub cache, and {_why_offline()}", name=name) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}{at}: not a local folder, and the hub answered: {_one_line(error)}", name=name) from None
    except HFValidationError as error:
        raise CheckpointError(f"{name}: not a local folder and not a hub name ({_one_line(error)})", name=name) from None
    except CheckpointError:
        raise
    except Exception as error:  # a download that broke off: transport errors as in _answers, or a full disk
        raise CheckpointError(f"{name}{at}: not a local folder, and the download failed ({_one_line(error)})", name=name) from None


def _fetch(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    file = "/".join(name.split("/")[2:])
    repo = "/".join(name.split("/")[:2])
    common: dict[str, Any] = {"revision": revision, "etag_timeout": CONNECT_SECONDS, "local_files_only": not _answers(repo, revision)}
    if file:
        return Path(hf_hub_download(repo, file, **common))
    patterns = SMALL_FILES + (["*.safetensors"] if weights else [])
    folder = Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["original/*", "consolidated*"], **common))
    if weights and not any(folder.glob("*.safetensors")):
        # Old repositories have only torch pickles; new ones often have both, so these are a second choice.
        snapshot_download(repo, allow_patterns=["pytorch_model*.bin"], **common)
    return _inside(folder, need_config=weights)


def _answers(repo: str, revision: str | None) -> bool:
    """Whether the hub is there at all. snapshot_download asks without a timeout, so a silent network would hang the start for ever."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(repo, revision=revision, timeout=CONNECT_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # transport errors belong to whichever HTTP library the client is built on
        return False
    return True


def _why_offline() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    return "the hub cannot be reached"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
