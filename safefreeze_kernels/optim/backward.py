"""`step_in_backward`: each parameter is stepped as soon as its gradient is complete, which is dropped then.

So the gradients of a model never exist all at once. What the step of one parameter is, `LaunchPlan` knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd import Variable

from ..grads.clip import clip_grad_norm_
from ..grads.forwards import forwards
from ..grads.live import check_live_gradients, refuse_packed_gradients
from ..model.flat import in_engine
from ..model.packed import stored
from ..model.sharding import is_sharded
from ..plan.plan import FreezePlan
from .adam import MaskedAdam
from .checks import Member, all_params
from .launch import LaunchPlan, LaunchPlans, make_launch_plans

#: Bytes of gradients that are stepped at once: small beside any model, and launches are few.
ENOUGH: Final = 8 << 20


@contextmanager
def step_in_backward(
    model: nn.Module, optimizer: MaskedAdam, *, max_norm_of_each: float | None = None
) -> Iterator[None]:
    """Within, a backward pass steps parameters as their gradients are complete, and drops those gradients.

    The weights and the state are those of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``, bit for bit; of
    the gradients there are, at any time, only those that the backward pass works on, and less than 8 MB that wait for a
    launch together. One backward pass is one step. To accumulate, run the passes before the last one outside: what they
    leave in ``.grad`` is part of the step, and is held meanwhile.

    A clip by the norm over all gradients cannot be had, which is known when all of them are there; nor a `GradScaler`,
    which looks at all of them for an inf.

    Args:
        model: what is trained, on one device or several of this process.
        optimizer: a `MaskedAdamW` or `MaskedAdam` of its parameters; its learning rates and other hyper-parameters are
            those at the time of the pass. Hooks of its step run before the pass and after it.
        max_norm_of_each: the largest norm of the live gradient of each parameter by itself, to which `clip_grad_norm_`
            clips it: not the same as a clip of the norm over all. None: nothing is clipped.

    Raises:
        TypeError: an argument is something else.
        ValueError: ``max_norm_of_each`` is negative or NaN; the optimizer has no parameter of the model.
        RuntimeError: there are several processes, or parameters are sharded; a clip factor waits for the step; a block
            of this optimizer is open. Nothing was changed then. Within a block: a second backward pass.

    Examples:
        >>> import torch, safefreeze_kernels as sf
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1)
        >>> with sf.step_in_backward(model, optimizer):
        ...     model(torch.ones(3, 4)).square().mean().backward()
        >>> model.weight.grad is None, float(optimizer.state[model.weight]["step"])
        (True, 1.0)
    """
    _check(model, optimizer, max_norm_of_each)
    stepping = _of_optimizer.setdefault(optimizer, _Stepping())
    stepping.begin(optimizer, max_norm_of_each)
    try:
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (), {})
        with ExitStack() as hooks:
            for param in [it for it in stepping.members if it.requires_grad]:
                handle = param.register_post_accumulate_grad_hook(stepping.take)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
            yield
        stepping.finish()
    finally:
        stepping.optimizer = None
    optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it
    for hook in optimizer._optimizer_step_post_hooks.values():
        hook(optimizer, (), {})


class _Stepping:
    """What `step_in_backward` keeps of an optimizer from pass to pass: launch plans of parameters stepped together.

    A launch for each would cost more than the step of a small parameter: gradients wait until there are `ENOUGH` bytes
    of them.

    Attributes:
        optimizer: while a block is open.
        members: of all parameters, whether they train or not, which may change from block to block.
    """

    def __init__(self) -> None:
        self.optimizer: MaskedAdam | None = None
        self.members: dict[Tensor, Member] = {}
        self._plans = LaunchPlans()
        self._of_param: dict[Tensor, list[LaunchPlan]] = {}  # the same list for all that are stepped together
        self._made_for: tuple[Any, Any] = (None, None)

    def begin(self, optimizer: MaskedAdam, max_norm: float | None) -> None:
        masks, ages = self._made_for
        as_before = masks is optimizer._masks and ages is optimizer._ages
        if not (as_before and self._plans.valid(optimizer.param_groups, optimizer.state)):
            self.members = {it.param: it for it in optimizer._members()}
            self._of_param, self._forwards = {}, forwards()
        self.optimizer, self._max_norm = optimizer, max_norm
        self._seen, self._waiting, self._bytes, self._at_end = set[Tensor](), list[Tensor](), 0, False

    @torch.no_grad()
    def take(self, param: Tensor) -> None:
        """The gradient of a parameter is complete."""
        assert param.grad is not None
        member = self.members[param]
        if param in self._seen:
            raise RuntimeError(
                f"step_in_backward: {member.name!r} has a second gradient since the block was entered, expected one "
                "backward pass; enter a block for each, or run all but the last pass of an accumulation before it"
            )
        self._seen.add(param)
        if self._max_norm is not None:
            clip_grad_norm_([(member.name, param)], self._max_norm, FreezePlan({member.name: member.mask}))
        self._waiting.append(param)
        self._bytes += stored(param.grad).nbytes
        if not self._at_end:
            Variable._execution_engine.queue_callback(self._end_of_pass)
            self._at_end = True
        if self._bytes >= ENOUGH:
            self._step()

    def _end_of_pass(self) -> None:
        self._at_end = False
        self._step()

    @torch.no_grad()
    def _step(self) -> None:
        """The step of the parameters that wait, whose gradients go."""
        if not self._waiting:
            return
        assert self.optimizer is not None
        params, self._waiting, self._bytes = self._waiting, [], 0
        plans = self._of_param.get(params[0], [])
        together = sum(len(plan.members) for plan in plans) == len(params)
        together = together and all(self._of_param.get(param) is plans for param in params)
        if not together or not all(plan.packed_as_before() for plan in plans):
            # a plan owns the counts of its parameters' steps: what others were stepped with goes
            plans = self._made(self.optimizer, [self.members[param] for param in params])
            self._of_param |= dict.fromkeys(params, plans)
        groups = self.optimizer.param_groups
        for plan, prepared in [(plan, plan.prepare(groups)) for plan in plans]:
            plan.run(prepared, None, None)
        for param in params:
            param.grad = None

    def _made(self, optimizer: MaskedAdam, members: list[Member]) -> list[LaunchPlan]:
        what = type(optimizer).__name__
        for it in members:
            check_live_gradients(it.param, it.mask, it.name, what, self._forwards)
            if it.whole:
                refuse_packed_gradients([it.param], [it.name], what)
        return make_launch_plans(optimizer.param_groups, members, optimizer._ages, optimizer.state, optimizer._settings)

    def finish(self) -> None:
        """Step what has a gradient of earlier passes alone, and remember for what all this holds."""
        assert self.optimizer is not None
        self._waiting = [p for p in self.members if p.grad is not None and p not in self._seen]
        self._step()
        groups, state = self.optimizer.param_groups, self.optimizer.state
        kept = {id(plan): plan for plans in self._of_param.values() for plan in plans}
        self._plans.keep(list(kept.values()), groups, state, sharded=False)
        self._made_for = self.optimizer._masks, self.optimizer._ages


_of_optimizer: Final[WeakKeyDictionary[MaskedAdam, _Stepping]] = WeakKeyDictionary()


def _check(model: Any, optimizer: Any, max_norm: Any) -> None:
    what = "step_in_backward"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: model is a {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(optimizer, MaskedAdam):
        raise TypeError(
            f"{what}: optimizer is a {type(optimizer).__name__}, expected a MaskedAdamW or MaskedAdam (unwrap a "
            "wrapper first, for example accelerated.optimizer)"
        )
    if max_norm is not None and not (isinstance(max_norm, (int, float)) and max_norm >= 0):
        raise ValueError(f"{what}: max_norm_of_each is {max_norm!r}, expected a number >= 0 (or None)")
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            f"{what}: there are {torch.distributed.get_world_size()} processes, and their gradients are put together "
            "only after a parameter has its own; call optimizer.step() after the backward pass (FSDP2 holds gradients "
            "in shards)"
        )
    params = all_params(optimizer.param_groups)
    if any(map(is_sharded, params)) or any(map(in_engine, model.parameters())):
        raise RuntimeError(
            f"{what}: parameters are sharded, or DeepSpeed takes their gradients, expected ordinary ones; call the "
            "step after the backward pass"
        )
    if {id(p) for p in model.parameters()}.isdisjoint(map(id, params)):
        raise ValueError(f"{what}: optimizer has no parameter of model; pass the model that it trains")
    if (open_ := _of_optimizer.get(optimizer)) is not None and open_.optimizer is not None:
        raise RuntimeError(f"{what}: a block of this optimizer is open already; leave it first")
    if optimizer._pending.factor is not None:
        raise RuntimeError(
            f"{what}: a clip factor waits for a step of all parameters; call zero_grad(), which drops it, and give "
            "max_norm_of_each instead"
        )
