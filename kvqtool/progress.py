"""How workflows tell a caller how far they are, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """Ignore progress: the default of every workflow."""
