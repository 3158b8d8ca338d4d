"""A training step, after the backward pass or inside it."""

from __future__ import annotations

from torch import Tensor, nn

import safefreeze_kernels as sf


def take_step(model: nn.Module, optimizer: sf.MaskedAdam, loss: Tensor, *, inside: bool) -> None:
    """Backward pass, step and no gradients left."""
    if inside:
        with sf.step_in_backward(model, optimizer):
            loss.backward()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
