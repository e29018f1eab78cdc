"""Load a model: the built-in one, a folder's, or one from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError

from kvqtool.errors import InputError
from kvqtool.forward import cache_name
from kvqtool.identity import ModelIdentity, identify
from kvqtool.ranks import ALONE, Ranks
from kvqtool.spread import check_device_map, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvqtool.seam import Seam

__all__ = [
    "LoadedModel",
    "ModelIdentity",
    "builtin_folder",
    "identify",
    "load_model",
    "rank_device",
    "resolve_device",
]

BUILTIN: Final = "builtin"
DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# What transformers raises for what it cannot read: OSError for hub and files, ValueError for
# a bad config, ImportError for a package, SafetensorError for damage, RuntimeError for a shape.
_LOADING: Final = Lock()
_UNREADABLE: Final = (OSError, ValueError, ImportError, SafetensorError, RuntimeError)


@dataclass
class LoadedModel:
    """A model ready to run: in eval mode, on its device, with its tokenizer and identity.

    Args:
        identity: what a bundle must match.
        model: the model.
        tokenizer: its tokenizer.
        device: where token ids go; with a device map, where its embeddings are.
        dtype: of its weights.
        ranks: which copy this is, when several processes share the work.
        read_path: how its caches are read, as in `attach`.
    """

    identity: ModelIdentity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = ALONE
    read_path: str = "auto"

    @cached_property
    def seam(self) -> Seam:
        """What probing finds of the model's attention layers; probed once."""
        from kvqtool.probe import probe

        return probe(self.model)


def builtin_folder() -> Path:
    """Return the folder of the model that ships inside the package."""
    return Path(__file__).parent / "builtin"


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: `builtin`, an existing folder, or a hub id; only the last may use the network.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `float16`, `bfloat16`, `float32`, or `auto`: float32 on a CPU, the checkpoint's own
            on a GPU.
        revision: a hub branch, tag or commit.
        trust_remote_code: whether the checkpoint's own Python code may run.
        device_map: `auto` spreads the layers over all GPUs, through accelerate; None puts the
            whole model on `device`.

    Raises:
        InputError: when the device, the dtype or the checkpoint cannot be used.
    """
    chosen_device = resolve_device(device)
    check_device_map(device_map, device)
    loading_dtype = _loading_dtype(dtype, chosen_device)
    source = _source(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    placed = {"dtype": loading_dtype, "device_map": device_map}
    try:
        # transformers sets what models are built with for the whole process, not for a thread: of
        # two that load at once, one would lack its tied weights.
        with _LOADING, _quiet_transformers():
            _check_config(name, source, options)
            tokenizer, model = _from_pretrained(source, placed, options)
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        reason = f"model {name!r} cannot be loaded: {_first_line(error)}"
        raise InputError(f"{reason}; {_remedy(source, error)}") from error
    _check_cache(name, model)
    if device_map is None:
        # Loaded on the CPU and then moved: rotary frequencies are computed while loading.
        model.to(chosen_device)  # type: ignore[arg-type]  # a decorator hides its signature
    else:
        chosen_device = input_device(model, chosen_device)
    identity = identify(model, tokenizer, name=_shown(name))
    return LoadedModel(identity, model.eval(), tokenizer, chosen_device, model.dtype)


def resolve_device(device: str) -> torch.device:
    """Return the device an option value stands for; `auto` is a GPU if there is one.

    Raises:
        InputError: when the device does not exist here. An explicit `cuda` never becomes a CPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (
        device != kind and not (kind == "cuda" and index.isdecimal())
    ):
        raise InputError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not count:
        raise InputError(f"device {device!r}: torch finds no CUDA GPU here; use --device cpu")
    if index and int(index) >= count:
        raise InputError(f"device {device!r}: GPUs here end at cuda:{count - 1}; use one of them")
    return torch.device(device)


def rank_device(device: str, ranks: Ranks) -> str:
    """Return the device option of one process among several: the GPU of its local rank.

    Raises:
        InputError: when there is not a GPU for each.
    """
    if ranks.is_alone or resolve_device(device).type == "cpu":
        return device
    if ":" in device:
        raise InputError(
            f"device {device!r} is one GPU for {ranks.local_size} processes; use --device cuda"
        )
    count = torch.cuda.device_count()
    if ranks.local_size > count:
        raise InputError(
            f"{ranks.local_size} processes cannot share {count} GPUs; start one for each, "
            "or use --device cpu"
        )
    return f"cuda:{ranks.local_rank}"


def _source(name: str) -> str:
    """Return what transformers is given: a folder that exists, or a hub id."""
    if name == BUILTIN:
        return str(builtin_folder())
    if not name.strip():
        raise InputError("the model has no name; use builtin, a folder or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model folder {name!r} has no config.json; name what save_pretrained wrote"
            )
        return str(folder)
    if folder.exists():
        raise InputError(f"model {name!r} is a file; name the folder that holds config.json")
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path:
        raise InputError(
            f"model folder {name!r} does not exist; check the path, or use builtin or a hub id"
        )
    return name


def _shown(name: str) -> str:
    """Return the name that reports give a model: of a folder, its own name only."""
    folder = Path(name).expanduser()
    return folder.resolve().name if name != BUILTIN and folder.is_dir() else name


def _loading_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Return the dtype to load with; `auto` is transformers' word for the checkpoint's own."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _from_pretrained(
    source: str, placed: dict[str, Any], options: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load tokenizer and model; weights the checkpoint lacks are an error, never random numbers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # Annotated as Any: transformers types the call as if it never returned the loading report.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, **placed, **options
    )
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"the checkpoint lacks {missing[0]}, {len(missing)} missing in all")
    return tokenizer, model


def _check_config(name: str, source: str, options: dict[str, Any]) -> None:
    """Refuse an encoder-decoder before its weights are read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, **options)
    if config.is_encoder_decoder:
        kind = f"an encoder-decoder ({config.model_type})"
        raise InputError(f"model {name!r} is {kind}; use a decoder-only model")


def _check_cache(name: str, model: PreTrainedModel) -> None:
    """Refuse a model that takes no key-value cache, such as a state-space model, whose own cache
    has the same name since transformers 5.24.
    """
    has_heads = hasattr(model.config.get_text_config(), "num_attention_heads")
    if cache_name(model) is None or not has_heads:
        found = f"{name!r} ({type(model).__name__}) keeps no key-value cache to compress"
        raise InputError(f"model {found}; use a model with attention")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back transformers' bars and warnings while it loads; failures still raise."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _remedy(source: str, error: BaseException) -> str:
    if "custom code" in str(error):
        return "read that code, and let it run with --trust-remote-code"
    if Path(source).is_dir():
        return "check that the folder holds a complete checkpoint with its tokenizer"
    return "check the spelling and the network, or name a local folder or builtin"
