"""Gradients of weights, parameter by parameter: each is taken as soon as autograd has finished it, and dropped.

The model itself is not touched. It runs with its parameters replaced by aliases of the same memory
(`torch.func.functional_call`), so neither ``requires_grad`` nor ``.grad`` nor hooks of its own parameters play any
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

#: ``take(name, weight, gradient)``: the gradient is the taker's own.
Take = Callable[[str, Tensor, Tensor], None]


def aliases(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's memory under its names, as tensors of their own that require no gradient."""
    by_parameter: dict[int, Tensor] = {}
    return {
        name: by_parameter.setdefault(id(parameter), parameter.detach())
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def lent(model: torch.nn.Module, parameters: dict[str, Tensor], function: Callable[[torch.nn.Module], Any]) -> Any:
    """``function(model)``, while ``parameters`` stand in the place of the model's."""
    return functional_call(_Lending(model), {f"model.{name}": p for name, p in parameters.items()}, (function,))


class _Lending(torch.nn.Module):
    """So that any function of a module may run under `functional_call`, not only its forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[torch.nn.Module], Any]) -> Any:
        return function(self.model)


def stream_gradients(
    model: torch.nn.Module, names: Iterable[str], value: Callable[[torch.nn.Module], Tensor], take: Take
) -> Tensor:
    """One forward and one backward pass; ``take`` is given each gradient, and at no time do those of the whole model
    exist.

    Args:
        names: of the parameters whose gradients are wanted; of a tied one, any of its names.
        value: what is derived of the model, a scalar; it may run the model as it likes.

    Returns:
        The value, without its graph.
    """
    parameters = aliases(model)
    for name in names:
        learning, hook = parameters[name].requires_grad_(), partial(_taken, take, name)
        learning.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def run(model: torch.nn.Module) -> Tensor:
        found = value(model)
        # here, so that what recomputes activations sees the aliases too
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()

    with torch.enable_grad():
        return lent(model, parameters, run)  # type: ignore[no-any-return]


def _taken(take: Take, name: str, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    take(name, parameter.detach(), gradient)
