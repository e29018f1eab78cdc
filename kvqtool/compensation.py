"""Compensated rounding: what one channel loses by rounding, the channels after it make up for.

A head's vector is rounded one channel after another. The error of each is spread over those still
to come, by how the loss ties them together: GPTQ's rule (arXiv 2210.17323) with tokens as rows and
the block Fisher information E[g g^T] of the head as the Hessian. It happens while encoding; what is
stored, and how it is read, do not change.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvqtool.ranks import Ranks

# Added to the diagonal, as a share of its mean: the Fisher of a finite text is not quite regular.
DAMPING: Final = 0.05


class BlockFisher:
    """Sum of g g^T over tokens, per head: all that compensation needs to know of a calibration
    set.
    """

    def __init__(self, heads: int, width: int, device: torch.device) -> None:
        """Start with nothing seen, for `heads` heads of `width` channels."""
        self._sums = torch.zeros(heads, width, width, dtype=torch.float64, device=device)

    def update(self, gradients: Tensor) -> None:
        """Add tokens.

        Args:
            gradients: (tokens, heads * width) float32, the loss's gradient with respect to u.
        """
        heads, width, _ = self._sums.shape
        by_head = gradients.double().view(-1, heads, width).transpose(0, 1)
        self._sums += by_head.mT @ by_head

    def merge(self, ranks: Ranks) -> None:
        """Replace the sums by those over all processes, to within rounding of another order."""
        self._sums = ranks.reduce(self._sums)

    def state(self) -> dict[str, Tensor]:
        """Return all that was summed, for `from_state`."""
        return {"products": self._sums}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], device: torch.device) -> BlockFisher:
        """Return the sums that `state` was taken of, on a device."""
        heads, width, _ = state["products"].shape
        fisher = cls(heads, width, device)
        fisher._sums = state["products"].to(device)
        return fisher

    def feedback(self) -> tuple[Tensor, Tensor]:
        """Return what `round_in_order` needs.

        With H' = H + DAMPING * mean(diag H) * I in the order of falling diagonal, and U the upper
        Cholesky factor of its inverse: feedback[c, j] = U[c, j] / U[c, c] for j after c.

        Returns:
            feedback (heads, width, width) float32, fp16 values, strictly upper triangular in the
            order of rounding; and that order, (heads, width) int16 channels of the head.
        """
        factor, order = self._factor()
        scaled = factor / factor.diagonal(dim1=1, dim2=2)[:, :, None]
        return scaled.triu(1).clamp(-65504.0, 65504.0).half().float(), order.to(torch.int16)

    def remaining(self) -> Tensor:
        """Return the share of each channel's loss that is left when later channels make up for it.

        A rounding error e of channel c costs e^2 H[c, c] alone, and (e / U[c, c])^2 compensated.

        Returns:
            (heads * width,) float64, in the order of channels.
        """
        factor, order = self._factor()
        left = factor.diagonal(dim1=1, dim2=2) ** -2
        alone = self._sums.cpu().diagonal(dim1=1, dim2=2)
        left = torch.empty_like(left).scatter_(1, order, left)
        return torch.where(
            alone > 0, (left / alone).clamp_max(1.0), torch.ones_like(left)
        ).flatten()

    @property
    def sensitivity(self) -> Tensor:
        """Sum of squared gradients of each channel, (heads * width,) float64."""
        return self._sums.cpu().diagonal(dim1=1, dim2=2).flatten()

    def _factor(self) -> tuple[Tensor, Tensor]:
        """Return U, (heads, width, width) float64 in order of rounding, and that order, int64."""
        fisher = self._sums.cpu()
        diagonal = fisher.diagonal(dim1=1, dim2=2)
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        ordered = fisher.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
        mean = diagonal.mean(1)
        ridge = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
        ordered = ordered + ridge[:, None, None] * torch.eye(fisher.shape[1], dtype=torch.float64)
        return torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True), order


def round_in_order(
    normalized: Tensor,
    levels: tuple[Tensor, Tensor],
    feedback: tuple[Tensor, Tensor],
    exact: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Choose every channel's level with the errors of the channels before it made up for.

    In order: w_c = u_c - shift_c, the nearest level q of w_c is chosen, and shift_j += (w_c - q) *
    feedback[c, j] for every later j of the head. Rows do not touch each other, and each step is one
    float32 operation an element, so that the number of rows does not matter to any bit.

    Args:
        normalized: (rows, channels) float32 u.
        levels: levels to choose by and levels that are read back, each (L,) or (channels, L).
        feedback: the two tensors of `BlockFisher.feedback`.
        exact: (rows, channels) bool, elements stored exactly, which lose nothing; None for none.

    Returns:
        codes (rows, channels) int32; and shift, (rows, channels) float32: u - shift is what an
        element would best be.
    """
    factors, order = feedback[0], feedback[1].long()
    heads, width, _ = factors.shape
    first = torch.arange(heads, device=order.device) * width
    turn = (order + first[:, None]).T.flatten()  # channels in order: first of every head, second...

    def in_order(per_channel: Tensor) -> Tensor:
        return per_channel[turn].view(width, heads, -1)

    left = in_order(normalized.T)
    shift, codes = torch.zeros_like(left), torch.empty_like(left, dtype=torch.int64)
    chosen, read = (
        in_order(part.expand(heads * width, part.shape[-1])).contiguous() for part in levels
    )
    _round_each(
        (left, shift, codes, (chosen[..., 1:] + chosen[..., :-1]) * 0.5, read),
        factors.permute(1, 2, 0)[..., None].contiguous(),
        None if exact is None else in_order(exact.T),
    )
    back = turn.argsort()
    rows = normalized.shape[0]
    codes = codes.to(torch.int32)
    return codes.view(heads * width, rows)[back].T, shift.view(heads * width, rows)[back].T


def _round_each(parts: tuple[Tensor, ...], onward: Tensor, exact: Tensor | None) -> None:
    """Round channel after channel, in place.

    Args:
        parts: values, shift, codes, all (width, heads, rows), middles between levels, and levels
            that are read back, (width, heads, levels).
        onward: (width, width, heads, 1), feedback of a channel to every other.
        exact: (width, heads, rows) bool; None for none.
    """
    shift, width = parts[1], len(onward)
    # All is cut into channels beforehand: on a GPU a call costs more than what it does.
    cut = zip(*(part.unbind(0) for part in (*parts, onward)), strict=True)
    lossless = None if exact is None else exact.unbind(0)
    for channel, (value, moved, code, middles, decoded, factors) in enumerate(cut):
        wanted = value - moved
        torch.searchsorted(middles, wanted, out=code)
        error = wanted - decoded.gather(1, code)
        if lossless is not None:
            error.masked_fill_(lossless[channel], 0.0)
        if channel + 1 < width:
            shift[channel + 1 :].add_(factors[channel + 1 :] * error)
