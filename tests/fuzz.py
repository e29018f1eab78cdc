"""Mutate bundles and saved caches, and see that each is refused in one line or read right.

    python tests/fuzz.py --count 10000 --seed 0

A mutation that fails is printed with its number; `--only NUMBER` runs it alone.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor

from kvqtool.attach import attach
from kvqtool.bundle import Bundle, load_bundle, save_bundle, uncalibrated_bundle
from kvqtool.cachefile import load_cache, quantize_text, restore_cache
from kvqtool.codebook import Codebook, as_half
from kvqtool.container import _digest, load_container
from kvqtool.data import Text
from kvqtool.errors import BundleError
from kvqtool.forward import next_logits
from kvqtool.memory import body_buffers, split_tokens
from kvqtool.methods import get_method
from kvqtool.models import LoadedModel, identify
from kvqtool.spec import parse_spec

SECONDS: Final = 5.0  # a refusal that takes longer hangs
# What a reader may allocate: its file a few times over, and what Python and torch take besides.
TIMES_FILE: Final = 8
SPARE_BYTES: Final = 24 << 20
ROOM_BYTES: Final = 1 << 30  # address space beyond what the process has when a file is read
LINE: Final = 500
DOCUMENT: Final = Text("A list is a mutable sequence.", "document", "0")

# Head width and spec: both key axes, every method, sinks, windows, 256 channels (where outlier
# counts stop fitting a byte), and a document that fits into the window, so that nothing is packed.
CASES: Final = (
    (16, "fp"),
    (16, "fp-sink2-r7"),
    (16, "int4-g16"),
    (16, "int8-10%-pertoken-postrope-sink2"),
    (16, "nf3-5%-r3"),
    (16, "nuq3-5%-sink1"),
    (16, "nuq2-10%-cap2-sink1-r5-qnorm-pc"),
    (16, "nuq4-5%-sink1-r64"),
    (128, "nuq3-1%/nuq2-1%-sink1"),
)


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def get_vocab(self) -> dict[str, int]:
        return {str(byte): byte for byte in range(256)}


@dataclass(frozen=True)
class Sample:
    """A valid file, its parts, and the model it belongs to."""

    name: str
    kind: str
    data: bytes
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    loaded: LoadedModel


@dataclass
class Outcome:
    """What happened to the mutations of a run."""

    refused: int = 0
    read: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@cache
def model_of(head_dim: int) -> LoadedModel:
    """Return a Llama with random weights, 2 layers and 2 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    tokenizer: Any = _Bytes()
    identity = identify(model, tokenizer, name="tiny")
    return LoadedModel(identity, model, tokenizer, torch.device("cpu"), torch.float32)


def bundle_of(head_dim: int, spec: str) -> Bundle:
    """Return a bundle with made-up codebooks."""
    loaded, scheme = model_of(head_dim), parse_spec(spec)
    identity = loaded.identity.as_json()
    if not scheme.needs_calibration:
        return uncalibrated_bundle(scheme, identity, [0, 1])
    books = {}
    for side, quant in (("key", scheme.key), ("value", scheme.value)):
        levels = as_half(torch.linspace(-1, 1, 1 << quant.bits))
        if not quant.fits_levels:
            levels = get_method(quant.method).fit(quant, None)[0]
        if quant.channel_levels:
            levels = levels.expand(2 * head_dim, -1).contiguous()
        decoded = as_half(levels * 0.75) if quant.moment_match else levels
        ends = as_half(torch.full((2 * head_dim,), 0.15)) if quant.per_channel else None
        for layer in (0, 1):
            lower = None if ends is None else -ends
            books[layer, side] = Codebook(levels, decoded, lower, ends)
    return Bundle(scheme, identity, books, {"calibrated": True, "seed": 0})


@cache
def samples() -> tuple[Sample, ...]:
    """Return a few small valid files of both kinds."""
    made: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        for head_dim, spec in CASES:
            loaded, bundle = model_of(head_dim), bundle_of(head_dim, spec)
            path = Path(folder) / "file"
            save_bundle(bundle, path, force=True)
            made.append(_sample(f"bundle {spec}", "kvqtool-bundle", path, loaded))
            quantize_text(loaded, bundle, DOCUMENT, path, force=True)
            made.append(_sample(f"cache {spec}", "kvqtool-cache", path, loaded))
    return (*made, _with_table(made[-1]))


def _sample(name: str, kind: str, path: Path, loaded: LoadedModel) -> Sample:
    return Sample(name, kind, path.read_bytes(), *load_container(path, kind, 1), loaded)


def _with_table(sample: Sample) -> Sample:
    """Return a saved cache that keeps angles as a table, as one of dynamic NTK does."""
    positions = sample.tensors["angles.0"]
    formula = sample.loaded.seam.packed[0].formula
    assert formula is not None
    tensors = sample.tensors | {"angles.0": torch.stack(formula.tables(positions), -1)}
    metadata = sample.metadata | {"angles": {"0": "table"}}
    data = packed(sample.kind, json.dumps(metadata), tensors)
    return Sample("cache with a table", sample.kind, data, metadata, tensors, sample.loaded)


def packed(kind: str, text: str, tensors: dict[str, Tensor], **header: str) -> bytes:
    """Return a file whose checksum is right, whatever it says."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    said = {"format": kind, "version": "1", "metadata": text, "sha256": _digest(text, tensors)}
    return save(tensors, metadata=said | header)


# ---- Damage: bytes change, the checksum does not ------------------------------------------------


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 1000)))


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 30))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    fill = rng.choice((b"\0", b"\xff", b"{", b'"', rng.randbytes(1)))
    return data[:start] + fill * (end - start) + data[end:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[start:]


def _delete(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _duplicate(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:]


def _reorder(rng: random.Random, data: bytes) -> bytes:
    cuts = sorted(rng.randrange(len(data)) for _ in range(3))
    return data[: cuts[0]] + data[cuts[1] : cuts[2]] + data[cuts[0] : cuts[1]] + data[cuts[2] :]


def _append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", data, rng.randbytes(99), b"\0" * 100_000))


def _header_length(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    huge = (100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, len(data), 0, 1)
    changed = rng.choice((*huge, length - 1, length + 1, length + 8, len(data) - 8))
    return struct.pack("<Q", changed) + data[8:]


def _padded_header(rng: random.Random, data: bytes) -> bytes:
    """A header of megabytes, all of it spaces: valid, and no reason to hang."""
    length = int.from_bytes(data[:8], "little")
    spaces = b" " * rng.choice((8, 4096, 3_000_000))
    text = data[8 : 8 + length] + spaces
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


DAMAGES: Final = (
    *(_truncate, _flip_bits, _overwrite, _insert, _delete, _duplicate, _reorder, _append),
    *(_header_length, _padded_header),
)


# ---- Header: the JSON of safetensors itself ------------------------------------------------------


def _header(rng: random.Random, data: bytes) -> bytes:
    """Change one thing in the safetensors header."""
    length = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in said if key != "__metadata__"])
    other = rng.choice([key for key in said if key != "__metadata__"])
    entry, size = said[name], len(data) - 8 - length
    huge = rng.choice((-1, 0, 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**30, 1.5, None, "8"))
    begin, end = entry["data_offsets"]
    choice = rng.randrange(16)
    if choice == 0:
        entry["shape"] = [huge, *entry["shape"]]
    elif choice == 1:
        entry["shape"] = [0, huge] if rng.random() < 0.5 else [huge, 0, huge]
    elif choice == 2:
        entry["shape"] = [1] * rng.choice((9, 65, 5000)) + entry["shape"]
    elif choice == 3:
        entry["data_offsets"] = rng.choice(([begin, huge], [huge, end], [end, begin]))
    elif choice == 4:
        entry["data_offsets"] = [begin + size, end + size]
    elif choice == 5:
        entry["data_offsets"] = list(said[other]["data_offsets"])
    elif choice == 6:
        types = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F4", "U64")
        entry["dtype"] = rng.choice((*types, "", "X", None, 7, "F8_E8M0", "f16"))
    elif choice == 7:
        del said[name]
    elif choice == 8:
        said[rng.choice(("x", "layers.0.key.levels\n", "", "\u0000", name + "é"))] = said.pop(name)
    elif choice == 9:
        said["__metadata__"][rng.choice(list(said["__metadata__"]))] = rng.choice(
            ("", "a\nb", "\x1b[31m", "9" * 5000, "-1", "1.0", "\ud7ff", "x" * 100_000)
        )
    elif choice == 10:
        said["__metadata__"][rng.choice(list(said["__metadata__"]))] = rng.choice((3, None, {}, []))
    elif choice == 11:
        del said["__metadata__"][rng.choice(list(said["__metadata__"]))]
    elif choice == 12:
        said["__metadata__"] = rng.choice((None, {}, [], "x"))
    elif choice == 13:
        said[name], said[other] = said[other], said[name]
    text = json.dumps(said)
    if choice == 14:  # the same key twice
        text = text[:-1] + f', "{name}": {json.dumps(said[other])}}}'
    elif choice == 15:
        depth = rng.choice((100, 10_000, 1_000_000))
        text = text[:-1] + f', "deep": {"[" * depth}{"]" * depth}}}'
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


# ---- Lies: the checksum is right, the content is not ---------------------------------------------

_WRONG: Final = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf")),
    *(
        "",
        "0",
        "x\ny",
        "\x1b[2J",
        "\ud800",
        "é" * 40,
        "y" * 20_000,
        [],
        {},
        [[]],
        {"": 0},
        [1, "2"],
    ),
    *("positions", "table", "exact", "fp", "nuq2", "int4-g24", "nuq3-1%-sink1", "nuq3-1%-pc"),
    *("nf4", "nuq3-1%-r9", "nuq8-sink999999999999", "int8-g99999999", "nuq3-99999999999%"),
    *("nuq" + "9" * 5000, "nuq3-sink99999", "nuq3-r99999", "nuq3-1%-cap99999", "int4-0.001%"),
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(inner):
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)


def _lie_in_metadata(rng: random.Random, sample: Sample) -> bytes:
    said = json.loads(json.dumps(sample.metadata))
    place, key = rng.choice(list(_places(said)))
    choice = rng.randrange(8)
    if choice == 0:
        del place[key]
    elif choice == 1 and isinstance(place, dict):
        place[rng.choice(("extra", "", "1", key + "\n"))] = rng.choice(_WRONG)
    elif choice == 2:
        other, wanted = rng.choice(list(_places(said)))
        place[key] = json.loads(json.dumps(other[wanted]))
    elif choice == 3 and isinstance(place[key], int):
        place[key] += rng.choice((-1, 1, 100, 2**40))
    else:
        place[key] = rng.choice(_WRONG)
    text = json.dumps(said)
    if choice == 4:
        depth = rng.choice((20, 500, 100_000))
        text = text[:-1] + f', "provenance": {"[" * depth}{"]" * depth}}}'
    elif choice == 5:
        text = rng.choice(("", "null", "[]", "3", '"x"', text[:-1], text * 2, "{" * 100_000))
    elif choice == 6:
        text = text[:-1] + ', "tokens": 3, "spec": "fp", "tokens": 4}'
    elif choice == 7:
        text = text[:-1] + f', "tokens": {"9" * 5000}}}'
    # Lone surrogates cannot travel in a safetensors header; their JSON escapes can.
    return packed(sample.kind, text, sample.tensors)


_DTYPES: Final = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)


def _lie_in_tensors(rng: random.Random, sample: Sample) -> bytes:
    tensors = {name: tensor.clone() for name, tensor in sample.tensors.items()}
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(tensors))
        _TENSOR_LIES[rng.randrange(len(_TENSOR_LIES))](rng, tensors, name)
        if not tensors:
            break
    return packed(sample.kind, json.dumps(sample.metadata), tensors)


def _remove(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _rename(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    number = rng.choice(("2", "-1", "00", "1_0", "٣", "9" * 40, "x", "", "0.0", "1"))
    renamed = name.replace(".0.", f".{number}.", 1)
    tensors[renamed if renamed != name else rng.choice((name + ".x", "x", "é\n"))] = tensors.pop(
        name
    )


def _add(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    extra = ("layers.0.key.words", "layers.0.value.lower", "layers.7.key.levels", "angles.1", "x")
    more = ("layers.0.key.states", "bundle.layers.0.value.upper", "layers", "token_ids")
    tensors[rng.choice((*extra, *more))] = tensors[name].clone()


def _cast(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(rng.choice(_DTYPES))


def _reshape(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    tensor = tensors[name]
    shapes: list[Callable[[], Tensor]] = [
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
        lambda: tensor[:-1] if tensor.dim() else tensor,
        lambda: tensor[..., :-1] if tensor.dim() else tensor,
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
        lambda: torch.cat([tensor, tensor], -1) if tensor.dim() else tensor,
        lambda: tensor.new_zeros(rng.choice(((), (0,), (0, 3), (1, 2, 0, 16), (1,) * 20))),
        lambda: tensor.flip(-1) if tensor.dim() else tensor,
    ]
    tensors[name] = rng.choice(shapes)().clone()


def _fill(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    flat = tensors[name].flatten()
    if not len(flat):
        return
    if flat.dtype.is_floating_point:
        values = [float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 0.0]
        values += [torch.finfo(flat.dtype).max, torch.finfo(flat.dtype).min]
        value: float = rng.choice(values)
    elif flat.dtype == torch.bool or flat.dtype.is_complex:
        value = 1
    else:
        info = torch.iinfo(flat.dtype)
        value = rng.choice((info.min, info.max, 0, 1, 33, 127))
    many = rng.random() < 0.3
    flat[slice(None) if many else rng.randrange(len(flat))] = value


def _noise(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    tensor = tensors[name].contiguous()
    if tensor.numel() and tensor.dtype != torch.bool:
        noise = torch.frombuffer(bytearray(rng.randbytes(tensor.nbytes)), dtype=torch.uint8)
        tensors[name] = noise.view(tensor.dtype).view(tensor.shape).clone()


def _exchange(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    other = rng.choice(sorted(tensors))
    tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def _counts(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    """Outlier counts of another sum, or of the same sum with a negative or a huge one."""
    found = [key for key in tensors if key.endswith("outlier_counts")]
    if not found:
        _fill(rng, tensors, name)
        return
    counts = tensors[rng.choice(found)].flatten()
    if len(counts) < 2 or counts.dtype.is_floating_point or counts.dtype == torch.bool:
        return
    step = rng.choice((1, 40, 200))
    counts[0] += step
    if rng.random() < 0.7:
        counts[1] -= step


def _unsorted(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    """Levels or ranges the wrong way round, outliers in another order."""
    words = ("levels", "lower", "upper", "outlier_channels")
    found = sorted(key for key in tensors if key.endswith(words) and tensors[key].dim())
    if found:
        chosen = rng.choice(found)
        tensors[chosen] = tensors[chosen].flip(-1) * rng.choice((1, -1))


_TENSOR_LIES: Final = (
    *(_remove, _rename, _add, _cast, _reshape, _fill, _fill, _noise, _exchange, _counts, _unsorted),
)


def mutate(seed: int, number: int) -> tuple[Sample, str, bytes]:
    """Return mutation `number` of a run: the file it starts from, its name, and the bytes."""
    rng = random.Random(seed * 1_000_003 + number)
    sample = rng.choice(samples())
    choice = rng.randrange(10)
    if choice < 3:
        damage = rng.choice(DAMAGES)
        return sample, damage.__name__, damage(rng, sample.data)
    if choice == 3:
        return sample, "_header", _header(rng, sample.data)
    lie = _lie_in_metadata if choice < 6 else _lie_in_tensors
    return sample, lie.__name__, lie(rng, sample)


# ---- What must hold ------------------------------------------------------------------------------


def read(sample: Sample, path: Path) -> None:
    """Read a file and use it for one step; AssertionError where what was read is not right."""
    loaded = sample.loaded
    if sample.kind == "kvqtool-bundle":
        _use(load_bundle(path), loaded)
        return
    saved = load_cache(path)
    saved.bundle.check_model(loaded.identity.as_json())
    with attach(loaded.model, saved.bundle, seam=loaded.seam) as session:
        cache = restore_cache(session, saved, loaded)
        _check_stores(cache, saved.bundle, saved.tokens)
        logits = next_logits(loaded.model, torch.tensor([[65]]), cache)
    assert torch.isfinite(logits).all(), "logits are not finite"
    assert cache.get_seq_length() == saved.tokens + 1
    if saved.token_ids is not None:
        assert saved.token_ids.shape == (saved.tokens,), "token ids are not as many as tokens"
    if saved.next_logits is not None:
        assert torch.isfinite(saved.next_logits).all(), "the saved logits are not finite"
        assert saved.next_logits.shape == (loaded.identity.vocab_size,)


def _use(bundle: Bundle, loaded: LoadedModel) -> None:
    bundle.check_model(loaded.identity.as_json())
    with attach(loaded.model, bundle, seam=loaded.seam) as session:
        cache = session.new_cache(bundle, prefill="decode-exact")
        ids = torch.arange(12)[None]
        for step in (ids, ids[:, :1]):
            logits = next_logits(loaded.model, step, cache)
        assert torch.isfinite(logits).all(), "logits are not finite"
        _check_stores(cache, bundle, 13)


def _check_stores(cache: Any, bundle: Bundle, tokens: int) -> None:
    """Compare every buffer with the memory table, and decode it."""
    spec = bundle.spec
    sink, body, window = split_tokens(spec, tokens)
    for store in cache.stores:
        parts = store.canonical()
        head_dim = store.geometry.key_dim
        for side in ("key", "value"):
            assert parts[f"sink.{side}"].shape == (1, 2, sink, head_dim), "sinks"
            assert parts[f"window.{side}"].shape == (1, 2, window, head_dim), "window"
        for side, quant, stored, book in zip(
            ("key", "value"), (spec.key, spec.value), store.bodies, store._codebooks, strict=True
        ):
            if not body:
                continue
            rows = {
                name: parts[f"{side}.{name}"]
                for name in body_buffers(quant, 2 * head_dim, 0, 0, "")
            }
            outliers = len(rows.get("outlier_values", ()))
            table = body_buffers(quant, 2 * head_dim, body, outliers, "float32")
            for name, buffer in table.items():
                assert tuple(rows[name].shape) == buffer.shape, f"{side}.{name}"
            decoded = get_method(quant.method).dequantize(rows, book, quant, stored.channels)
            assert torch.isfinite(decoded).all(), f"{side} decodes to what is no number"


def _resident() -> tuple[int, int]:
    """Return (bytes now, most bytes since the last reset) of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return int(found["VmRSS"].split()[0]) << 10, int(found["VmHWM"].split()[0]) << 10


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let the process map at most ROOM_BYTES more than it has; a mad allocation fails, and says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def judge(sample: Sample, data: bytes, path: Path, *, is_lie: bool) -> tuple[str, str]:
    """Read a mutated file: ("refused" | "read", message), or ("failed", why)."""
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _resident()[0], time.perf_counter()
    verdict = "read", ""
    try:
        with torch.no_grad():
            read(sample, path)
    except BundleError as error:
        verdict = "refused", str(error)
        if not str(error).isprintable() or len(str(error)) > LINE + len(str(path)):
            verdict = "failed", f"the message is no short line: {str(error)[:200]!r}"
    except Exception:
        verdict = "failed", traceback.format_exc()
    seconds, grown = time.perf_counter() - started, _resident()[1] - before
    if seconds > SECONDS:
        return "failed", f"took {seconds:.1f} s"
    if grown > TIMES_FILE * len(data) + SPARE_BYTES:
        return "failed", f"took {grown} bytes for a file of {len(data)}"
    if verdict[0] == "read" and not is_lie:
        metadata, tensors = load_container(path, sample.kind, 1)
        same = metadata == sample.metadata and tensors.keys() == sample.tensors.keys()
        if not same or not all(torch.equal(t, sample.tensors[n]) for n, t in tensors.items()):
            return "failed", "damage that the checksum should have found was read"
    return verdict


def run(count: int, seed: int, *, first: int = 0) -> Outcome:
    """Run mutations `first` to `first + count - 1` of a seed."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        for sample in samples():
            verdict = judge(sample, sample.data, path, is_lie=False)
            assert verdict == ("read", ""), f"{sample.name} unchanged: {verdict[1]}"
        for number in range(first, first + count):
            sample, name, data = mutate(seed, number)
            with limited_memory():
                verdict, said = judge(sample, data, path, is_lie=name.startswith("_lie"))
            if verdict == "failed":
                outcome.failures.append(f"seed {seed} number {number} {sample.name} {name}: {said}")
            elif verdict == "read":
                outcome.read += 1
            else:
                outcome.refused += 1
                outcome.messages[said.replace(str(path), "FILE")] += 1
    return outcome


def main() -> int:
    """Run from the command line; exit code 1 if a mutation failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="run this mutation alone")
    parser.add_argument("--messages", action="store_true", help="print every refusal once")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    one = given.only is not None
    outcome = run(1 if one else given.count, given.seed, first=given.only if one else 0)
    for failure in outcome.failures:
        print(failure, end="\n\n")
    if given.messages:
        for message, times in outcome.messages.most_common():
            print(f"{times:6d}  {message}")
    print(
        f"{outcome.refused + outcome.read + len(outcome.failures)} mutations of seed {given.seed}: "
        f"{outcome.refused} refused, {outcome.read} read right, {len(outcome.failures)} failed, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
