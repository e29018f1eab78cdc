"""A model's config and weight headers from the Hugging Face hub; its weights stay there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvqtool.errors import InputError, brief


def is_hub_id(name: str) -> bool:
    """Whether a name can only be a hub id: `owner/model`, and no path that exists."""
    owner, _, model = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or "/" in model
    return bool(owner and model) and not is_path and not Path(name).exists()


def fetch_config(name: str, revision: str | None) -> Path:
    """Return the path of a hub model's config.json, fetched or cached.

    Raises:
        InputError: when it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error


def fetch_headers(name: str, revision: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """Return the headers of a hub model's safetensors files, without their tensors; none where it
    has no such files.

    Raises:
        InputError: when they cannot be had.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # of httpx or httpx2
        HTTPError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        found = get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        return []
    except (OSError, ValueError, HTTPError, SafetensorsParsingError) as error:
        reason = brief(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise InputError(
            f"the weights of {name!r} cannot be read from the hub ({reason}); "
            "plan without them: --weights none"
        ) from error
    return [
        (Path(file), {tensor: vars(info) for tensor, info in metadata.tensors.items()})
        for file, metadata in found.files_metadata.items()
    ]


def _unreachable(name: str, error: Exception) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    remedy = "check the name and the network, or name a folder with its config.json"
    return InputError(f"no config of {name!r} from the hub ({brief(lines[0])}); {remedy}")
