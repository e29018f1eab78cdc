"""Schemes that decide bits step by step: what they refuse to read at once."""

from __future__ import annotations

from kvqtool.errors import InputError, RunError
from kvqtool.spec import KvSpec


def is_stepwise(spec: KvSpec) -> bool:
    """Return whether a scheme takes, after an exact prompt, one token at a time."""
    return spec.adaptive is not None and spec.adaptive.is_stepwise


def check_protocol(spec: KvSpec, protocol: str) -> None:
    """Refuse to score at once what a scheme decides step by step.

    Args:
        spec: the scheme.
        protocol: one of `perplexity.PROTOCOLS`.

    Raises:
        InputError: naming the protocol that works.
    """
    if is_stepwise(spec) and protocol != "true-decode":
        raise InputError(
            f"{spec.name} decides bits step by step, which {protocol} cannot follow; "
            "use --protocol true-decode, or qaq without -token and -shadow"
        )


def check_call(spec: KvSpec, queries: int, *, is_exact: bool) -> None:
    """Refuse a call of several tokens that is no exact prompt.

    Raises:
        RunError: naming what to do instead.
    """
    if is_stepwise(spec) and queries > 1 and not is_exact:
        raise RunError(
            f"{spec.name} decides bits step by step; after an exact prompt feed one token at a "
            "time (ppl: --protocol true-decode), or use qaq without -token and -shadow"
        )
