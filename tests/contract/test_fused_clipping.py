"""`clip_grad_norm_` with ``optimizer=``: the factor is applied inside the next step, and only there."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from conftest import BACKENDS, assert_same_bits, random_normal
from torch import Tensor, nn

import safefreeze_kernels as sf

pytestmark = pytest.mark.usefixtures("one_thread")
over_backends = pytest.mark.parametrize("backend", BACKENDS)
PLAN = sf.FreezePlan({"w": sf.FreezeMask((12, 10), rows=[0, 5], cols=[9])})
SHAPES = {"w": (12, 10), "b": (10,)}
MAX_NORM = 0.5


def build(backend: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[dict[str, Any], sf.MaskedAdamW]:
    params = {
        name: nn.Parameter(random_normal(i, *shape, dtype=dtype)) for i, (name, shape) in enumerate(SHAPES.items())
    }
    settings = {"lr": 0.1, "weight_decay": 0.1, "freeze": PLAN, **settings}
    return params, sf.MaskedAdamW(params.items(), backend=backend, **settings)


def give_gradients(params: dict[str, Any], step: int) -> None:
    for i, p in enumerate(params.values()):
        p.grad = random_normal(100 * step + i, *p.shape, dtype=p.dtype)
    params["w"].grad[5] = math.nan  # frozen: counts nowhere


def pair(backend: str, *args: Any, **settings: Any) -> list[tuple[dict[str, Any], sf.MaskedAdamW]]:
    return [build(backend, *args, **settings) for _ in range(2)]


def assert_same(one: dict[str, Any], other: dict[str, Any], what: str) -> None:
    for name in SHAPES:
        assert_same_bits(one[name].detach(), other[name].detach(), f"{what}: {name}")


@pytest.mark.parametrize(
    "settings", [{}, {"capturable": True}, {"amsgrad": True, "maximize": True}], ids=["", "capturable", "amsgrad"]
)
@over_backends
def test_the_step_is_that_of_clipped_gradients(backend: str, settings: dict[str, Any]) -> None:
    (fused, opt), (plain, other) = pair(backend, **settings)
    for step in range(4):
        give_gradients(fused, step)
        give_gradients(plain, step)
        before = {name: p.grad.clone() for name, p in fused.items()}
        limit = MAX_NORM if step != 2 else 1e9
        norms = [
            sf.clip_grad_norm_(fused, limit, PLAN, optimizer=opt, backend=backend),
            sf.clip_grad_norm_(plain, limit, PLAN, backend=backend),
        ]
        assert_same_bits(norms[0], norms[1], f"norm of step {step}")
        for name, p in fused.items():
            assert_same_bits(p.grad, before[name], f"gradient of {name}")
        opt.step()
        other.step()
        assert_same(fused, plain, f"step {step}")


@over_backends
def test_sixteen_bit_gradients_lose_no_digits(backend: str) -> None:
    """As if they had been clipped in float32: scaled in place, they would be rounded once more."""
    (fused, opt), (exact, other) = pair(backend, torch.bfloat16)
    give_gradients(fused, 0)
    give_gradients(exact, 0)
    sf.clip_grad_norm_(fused, MAX_NORM, optimizer=opt, backend=backend)
    norm = sf.clip_grad_norm_(exact, 1e9, PLAN, backend=backend).double()
    other.multiply_gradients_((MAX_NORM / (norm + 1e-6)).float())
    opt.step()
    other.step()
    for name in SHAPES:
        torch.testing.assert_close(fused[name], exact[name], rtol=0.0, atol=0.0)


@over_backends
def test_one_step_takes_it(backend: str) -> None:
    (clipped, opt), (once, other) = pair(backend)
    for params, optimizer in ((clipped, opt), (once, other)):
        give_gradients(params, 0)
        sf.clip_grad_norm_(params, MAX_NORM, PLAN, optimizer=optimizer, backend=backend)
        optimizer.step()
    give_gradients(clipped, 1)
    give_gradients(once, 1)
    opt.step()
    sf.clip_grad_norm_(once, 1e9, PLAN, optimizer=other, backend=backend)
    other.step()
    assert_same(clipped, once, "a step without clipping after one with it")


@pytest.mark.parametrize("end", ["zero_grad", "load_state_dict", "found_inf", "clipped again", "pickle", "deepcopy"])
@over_backends
def test_what_ends_it(backend: str, end: str) -> None:
    (params, opt), (plain, other) = pair(backend)
    for tensors, optimizer in ((params, opt), (plain, other)):
        give_gradients(tensors, 0)
        optimizer.step()
    give_gradients(params, 1)
    sf.clip_grad_norm_(params, 1e-3, PLAN, optimizer=opt, backend=backend)
    if end == "zero_grad":
        opt.zero_grad()
    elif end == "load_state_dict":
        opt.load_state_dict(opt.state_dict())
    elif end == "found_inf":
        opt.found_inf = torch.ones(1)
        opt.step()
        opt.found_inf = None
    elif end == "clipped again":
        sf.clip_grad_norm_(params, 1e9, PLAN, optimizer=opt, backend=backend)
    else:
        again = pickle.loads(pickle.dumps(opt)) if end == "pickle" else copy.deepcopy(opt)
        params, opt = dict(zip(SHAPES, again.param_groups[0]["params"], strict=True)), again
    give_gradients(params, 1)
    give_gradients(plain, 1)
    opt.step()
    other.step()
    assert_same(params, plain, end)


@over_backends
def test_with_a_loss_scale(backend: str) -> None:
    """The order of PyTorch's recipe: unscale, clip, step; here the step does the first and the last at once."""
    (fused, opt), (plain, other) = pair(backend)
    give_gradients(fused, 0)
    give_gradients(plain, 0)
    for p in fused.values():
        p.grad *= 1024.0
    opt.grad_scale = torch.tensor([1024.0])
    sf.clip_grad_norm_(fused, MAX_NORM * 1024.0, PLAN, optimizer=opt, backend=backend)
    sf.clip_grad_norm_(plain, MAX_NORM, PLAN, optimizer=other, backend=backend)
    opt.step()
    other.step()
    for name in SHAPES:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-6, atol=1e-6, equal_nan=True)


@over_backends
def test_a_failed_step_leaves_it_for_the_next(backend: str) -> None:
    (params, opt), (plain, other) = pair(backend)
    for tensors, optimizer in ((params, opt), (plain, other)):
        give_gradients(tensors, 0)
        sf.clip_grad_norm_(tensors, MAX_NORM, PLAN, optimizer=optimizer, backend=backend)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="learning rate"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    opt.step()
    other.step()
    assert_same(params, plain, "after a refused step")


class Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_bad_input() -> None:
    params, opt = build("auto")
    give_gradients(params, 0)
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    cases: list[tuple[Any, dict[str, Tensor], Any, type[Exception], str]] = [
        (Wrapper(opt), params, PLAN, TypeError, "optimizer is a Wrapper, expected a MaskedAdamW"),
        (torch.optim.AdamW(params.values()), params, PLAN, TypeError, "is a AdamW, expected a MaskedAdamW"),
        (opt, params, sf.FreezePlan(), ValueError, "another freeze plan"),
        (opt, {**params, "extra": extra}, PLAN, ValueError, "'extra' is in the model but not in optimizer"),
        (opt, {"w": params["w"]}, PLAN, ValueError, "optimizer has 2 parameters, expected the model's 1"),
    ]
    before = {name: p.grad.clone() for name, p in params.items()}
    for optimizer, model, plan, kind, message in cases:
        with pytest.raises(kind, match=message):
            sf.clip_grad_norm_(model, 1e-3, plan, optimizer=optimizer)
    plain, other = build("auto")
    give_gradients(plain, 0)
    for name, p in params.items():
        assert_same_bits(p.grad, before[name], f"gradient of {name} after refusals")
    opt.step()
    other.step()
    assert_same(params, plain, "a step after refusals is not clipped")


def test_parameters_that_do_not_train_are_no_obstacle() -> None:
    params, _ = build("auto")
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    model = {**params, "frozen": frozen}
    opt = sf.MaskedAdamW(params.items(), freeze=PLAN)
    give_gradients(params, 0)
    assert sf.clip_grad_norm_(model, 1.0, PLAN, optimizer=opt).isfinite()
