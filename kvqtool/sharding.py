"""How work is divided over GPUs: heads by tensor parallelism, layers by pipeline parallelism, and a
sequence's tokens by context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvqtool.errors import InputError
from kvqtool.layers import CacheLayer, State
from kvqtool.memory import PAGE_TOKENS
from kvqtool.shape import ModelShape
from kvqtool.trunk import Trunk


@dataclass(frozen=True)
class RankShape:
    """What one GPU holds.

    Args:
        stage: its pipeline stage; all ranks of a stage are alike.
        layers: its share of the stage's cache layers.
        trunk: its share of the widths.
        weights_bytes: of its weights; None where they are unknown.
    """

    stage: int
    layers: tuple[CacheLayer, ...]
    trunk: Trunk
    weights_bytes: int | None


def first_pages(tokens: int, sinks: int, processes: int) -> list[int]:
    """Return the first page of each process's share of a sequence, counted behind the sinks.

    Example: 648 tokens, one of them a sink, 2 processes -> [0, 2]; the last has 3 pages and more.
    """
    pages = max(tokens - sinks, 0) // PAGE_TOKENS
    return [pages * number // processes for number in range(processes)]


def check_pages(tokens: int, sinks: int, processes: int) -> None:
    """Raise InputError when a prompt has not a page for each process."""
    pages = max(tokens - sinks, 0) // PAGE_TOKENS
    if pages < processes:
        raise InputError(
            f"a prompt of {tokens} tokens has {pages} whole pages of {PAGE_TOKENS}, too few "
            f"for {processes} processes; start fewer, or read a longer prompt"
        )


def divide(shape: ModelShape, tp: int, pp: int, dtype: str) -> list[RankShape]:
    """Divide a model over `tp` x `pp` GPUs and return one rank of each stage.

    Key/value heads are divided until there is one a rank, and copied from then on; latents are
    copied always. Stages take layers in order, as evenly as can be, the earlier ones one more.

    Raises:
        InputError: when the heads or layers cannot be divided so.
    """
    if pp > len(shape.layers):
        raise InputError(f"{shape.name} has {len(shape.layers)} layers, too few for --pp {pp}")
    heads = shape.trunk.num_heads
    if heads % tp:
        raise InputError(f"--tp {tp} does not divide the {heads} heads of {shape.name}")
    trunk = replace(
        shape.trunk,
        num_heads=heads // tp,
        intermediate=-(-shape.trunk.intermediate // tp),
        vocabulary=-(-shape.trunk.vocabulary // tp),
    )
    layers = [_divide_layer(shape, layer, tp) for layer in shape.layers]
    base, more = divmod(len(layers), pp)
    ranks, start = [], 0
    for stage in range(pp):
        end = start + base + (stage < more)
        weights = _weights(shape, range(start, end), tp, dtype)
        ranks.append(RankShape(stage, tuple(layers[start:end]), trunk, weights))
        start = end
    return ranks


def _divide_layer(shape: ModelShape, layer: CacheLayer, tp: int) -> CacheLayer:
    states = tuple(_divide_state(shape, state, tp) for state in layer.states)
    heads = layer.geometry.num_kv_heads
    if layer.kind in ("latent", "indexed") or heads <= 1:
        return replace(layer, states=states)
    if heads % tp and tp % heads:
        raise InputError(
            f"--tp {tp} neither divides the {heads} key/value heads of {shape.name} nor is a "
            "multiple of them; choose another"
        )
    return replace(
        layer, states=states, geometry=replace(layer.geometry, num_kv_heads=max(heads // tp, 1))
    )


def _divide_state(shape: ModelShape, state: State, tp: int) -> State:
    first, *others = state.shape
    if first % tp:
        raise InputError(
            f"--tp {tp} does not divide the {first} channels of {shape.name}'s {state.name} states"
        )
    return replace(state, shape=(first // tp, *others))


def _weights(shape: ModelShape, layers: range, tp: int, dtype: str) -> int | None:
    weights = shape.weights
    if weights is None:
        return None
    total = sum(weights.layers[index].nbytes(dtype, tp) for index in layers)
    is_first, is_last = layers.start == 0, layers.stop == len(shape.layers)
    if is_first:
        total += weights.embedding.nbytes(dtype, tp)
    elif is_last:
        total += weights.tied.nbytes(dtype, tp)
    return total + (weights.head.nbytes(dtype, tp) if is_last else 0)
