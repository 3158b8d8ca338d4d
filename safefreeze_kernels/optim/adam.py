"""`MaskedAdamW` and `MaskedAdam`, drop-in for `torch.optim`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as counter
from typing import Any, Final
from weakref import WeakValueDictionary, ref

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..grads.checks import check_gradient, check_packing, settled
from ..grads.live import check_live_gradients, forwards, generation
from ..grads.reader import Whereabouts, trace, whereabouts
from ..kernels.ages import Ages
from ..kernels.backend import choose_backend
from ..kernels.operands import (
    STORAGE,
    GradientList,
    moment_dtype,
)
from ..kernels.parts import compile_live
from ..kernels.reference import from_remainder
from ..model.packed import PackedGradient, refuse_step
from ..model.sharding import PlanAgreement, held, is_sharded, local, local_gradient, shard_number, spread, take
from ..plan.binding import bare_name, bind
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checks import (
    _check_for_foreach,
    _check_hyper_parameters,
    _check_rounding,
    _named_by_identity,
    _without_duplicates,
    check_parameter,
    checked_plan,
)
from .launch import _CapturableLaunch, _flags, _kernel_dtypes, _Launch, _multiplier, _of_real_view, _real
from .state import FREEZE, MOMENTS, REMAINDER, _owned, _repack, read_state_dict

_PACKED: Final = (*MOMENTS, REMAINDER)


_handles: Final = counter()
_traced: Final[WeakValueDictionary[int, MaskedAdam]] = WeakValueDictionary()  # what compiled steps call by number


class MaskedAdam(Optimizer):
    """`torch.optim.Adam` whose step leaves frozen weights untouched, byte for byte.

    Equivalent to `torch.optim.Adam` on the live part of every parameter; the frozen part is neither read nor written,
    its gradient is never looked at, and no state is kept for it. With no plan it is simply a fast Adam.

    Args:
        params: as in `torch.optim`. To freeze by plan, pass names: ``model.named_parameters()``. Tied weights may be
            passed under every name (``named_parameters(remove_duplicate=False)``).
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in `torch.optim.Adam`.
        freeze: what is frozen, by parameter name; see `set_freeze`.
        backend: "auto", or one of the names `safefreeze info` lists. A named one never falls back.
        state_dtype: dtype of the moments, float32 (default) or bfloat16, whatever the parameters' dtype; float64 and
            complex parameters have moments like themselves.
        master: "remainder" keeps, for each live element of a bfloat16 parameter, the 16 bits it lacks of a float32
            master (state ``master_remainder``): the masters train exactly as float32 parameters given the same
            gradients; see `master_weights`. Float32 parameters need none, float16 ones are refused.
        rounding: of bfloat16 and float16 parameters without a master: "nearest" (ties to even), or "stochastic": up or
            down at random, so that small updates are right on average.
        dense_checkpoints: `state_dict` has full-size moments, zero where frozen, that distributed checkpoint can save
            under DDP and load under another layout or into stock AdamW. Sharded parameters always have such.
        seed: of stochastic rounding. Its noise depends on seed, step, the parameter's place in this optimizer and the
            element alone: the same on every backend, and after a resume. A sharded parameter's depends on the piece.
        fused: as in torch, True lets `torch.amp.GradScaler` pass its scale into the step instead of unscaling first.
        foreach: accepted and ignored: there is one implementation, and it takes all tensors at once.
        capturable: step counts live on the parameters' device, where lr (as a tensor), ``grad_scale`` and ``found_inf``
            are read too: the host never waits, and a step can be recorded in a CUDA graph.
        differentiable: not supported; True raises.

    Parameters are float32, bfloat16 or float16, and the arithmetic is float32. Complex64 parameters are stepped through
    their real view, as in torch. Float64 and complex128 ones are computed in float64, by the slow reference backend
    (``backend="auto"`` says so once). What has ``requires_grad=False``, and is in no plan, may have any dtype and
    layout: only what gets a gradient is looked at. State keys are torch's; with rows or columns frozen, ``exp_avg`` and
    ``exp_avg_sq`` are packed to (live rows, live columns).

    `torch.amp.GradScaler` looks at all gradients: to keep an inf in a frozen one from skipping a step, call
    `zero_frozen_grads_` before ``scaler.unscale_`` or ``scaler.step``.

    Raises:
        ValueError: hyper-parameters out of range or NaN; a plan that does not fit (contract 6).
        TypeError: parameters that train and are of an unsupported dtype or layout.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        freeze: FreezePlan | None = None,
        backend: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        dense_checkpoints: bool = False,
    ) -> None:
        what = type(self).__name__
        if differentiable:
            raise ValueError(f"{what}: differentiable=True is not supported; use torch.optim for it")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's words: callers match them
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{what}: state_dtype is {state_dtype}, expected torch.float32 or torch.bfloat16")
        _check_rounding(what, master, rounding, seed)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        _check_for_foreach(defaults)
        _check_hyper_parameters(defaults)
        defaults["betas"] = tuple(float(beta) for beta in betas)
        self._backend = backend
        self._state_dtype = state_dtype
        self._master, self._rounding, self._seed = master, rounding, seed
        self._dense_checkpoints = dense_checkpoints
        self._plan: FreezePlan | None = None
        self._aliases: dict[str, str] = {}  # every name of a tied tensor -> the name in the groups
        self._ages: dict[str, Ages] = {}
        self._in_force: dict[str, FreezeMask] = {}  # by name: what state is packed by, whatever shape a parameter took
        self._begin()
        super().__init__(_without_duplicates(params, self._aliases), defaults)
        if fused:
            self._step_supports_amp_scaling = True
        if freeze is not None:
            self._plan = checked_plan(freeze, what)
        # A plan that does not fit, or a backend that does not run, is an error now and not at the first step.
        self._in_force = dict(zip(self._names(), self._masks(require_grad=True), strict=True))
        self._note_plan(anew=True)
        params = [p for p in self._params() if p.requires_grad] or self._params()
        for device in {p.device for p in params} - {torch.device("meta")} or {torch.device("cpu")}:
            choose_backend(backend, device, what, _kernel_dtypes(p for p in params if p.device == device))

    def _begin(self) -> None:
        """What no copy inherits: it is found out again at the next step."""
        self._launches: list[_Launch] = []
        self._launch_key: Any = None
        self._whereabouts: Whereabouts | None = None
        self._waiting: list[Tensor] = []  # parameters that never had a gradient, and so are in no launch
        self._pending: _PendingFactor | None = None  # what the next step multiplies gradients by
        self._given_names: dict[int, tuple[ref[Tensor], str]] = {}
        self._agreement: PlanAgreement | None = None
        self._sharded = False
        self._warned = False
        self._handle = next(_handles)
        _traced[self._handle] = self

    # -- parameters, names, masks -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. With a plan, the names of the new parameters are checked against it.

        Raises:
            ValueError: a new parameter has a name that the plan uses for another one. Nothing was added then.
        """
        if isinstance(param_group, dict):  # else torch says so
            _check_hyper_parameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._plan:
            group[FREEZE] = self._plan.fingerprint
        try:
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    self._check_trained(p, group["param_names"][i] if "param_names" in group else None)
            if self._plan:
                self._masks()
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self._given_names |= _named_by_identity([group])
        if self._agreement is not None:  # ranks agree on plans of these very parameters
            self._agreement = None
            self._note_plan()
        self._void_factor("a parameter group was added")

    def _check_trained(self, p: Tensor, name: str | None) -> None:
        """Raise TypeError if ``p`` is not what this optimizer trains."""
        what = type(self).__name__
        check_parameter(p, what, name)
        label = f"parameter {name!r}" if name else "a parameter"
        if self._master is not None and p.dtype == torch.float16:
            raise TypeError(
                f"{what}: {label} is float16, expected bfloat16 or float32 with master='remainder'; convert it"
            )
        if self._state_dtype != torch.float32 and p.dtype == torch.complex64:
            raise TypeError(
                f"{what}: {label} is complex64, whose moments are complex64, but state_dtype is {self._state_dtype}; "
                "leave state_dtype out, or give it an optimizer of its own"
            )

    @property
    def plan(self) -> FreezePlan | None:
        """The plan in force; `set_freeze` changes it."""
        return self._plan

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> list[str]:
        """A name per parameter, for errors and for ages: the caller's, or its place among the groups."""
        return [
            name
            for index, group in enumerate(self.param_groups)
            for name in group.get("param_names")
            or [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]
        ]

    def _masks(self, plan: FreezePlan | None = None, *, require_grad: bool = False) -> list[FreezeMask]:
        """A mask per parameter under ``plan`` (default: the one in force), nothing frozen where it names none.

        ``require_grad``: for a plan that comes into force; state can be saved after ``requires_grad_(False)`` too.
        """
        plan = plan if plan is not None else self._plan
        params = self._params()
        masks: dict[int, FreezeMask] = {}
        if plan:
            what = type(self).__name__
            self._check_names()
            named = list(zip(self._names(), params, strict=True))
            by_name = dict(named)
            named += [(alias, by_name[name]) for alias, name in self._aliases.items() if name in by_name]
            masks = {
                id(entry.param): entry.mask for entry in bind(plan, named, operation=what, require_grad=require_grad)
            }
        return [masks.get(id(p)) or FreezeMask(p.shape) for p in params]

    def _check_names(self) -> None:
        """Raise ValueError where names are missing, or no longer tell of the parameters beside them."""
        what = type(self).__name__
        for index, group in enumerate(self.param_groups):
            names, params = group.get("param_names"), group["params"]
            if names is None:
                raise ValueError(
                    f"{what}: a plan freezes by name, but the parameters were given without names; pass "
                    "model.named_parameters() instead of model.parameters(), or in the groups' 'params' "
                    "(name, parameter) pairs"
                )
            if len(names) != len(params):
                raise ValueError(
                    f"{what}: param_groups[{index}] has {len(params)} parameters and {len(names)} names: parameters "
                    "were taken out or replaced after the optimizer was built; change 'param_names' with them, or "
                    "build it anew. (DeepSpeed ZeRO replaces them by flat partitions, in which rows and columns cannot "
                    "be found; shard with torch.distributed.fsdp.fully_shard (FSDP2), or train with DDP)"
                )
            for name, p in zip(names, params, strict=True):
                known, given = self._given_names.get(id(p), (None, name))
                if known is not None and known() is p and bare_name(given) != bare_name(name):
                    raise ValueError(
                        f"{what}: param_groups[{index}] has {given!r} where its 'param_names' say {name!r}: "
                        "parameters were reordered after the optimizer was built; reorder 'param_names' with them"
                    )

    # -- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``: reevaluates the model and returns the loss, as in `torch.optim`.

        ``grad_scale`` and ``found_inf``, set as attributes or by `torch.amp.GradScaler`, are honoured: gradients count
        as divided by the scale, and a found inf skips the step.

        Raises:
            ValueError: a hyper-parameter became NaN or negative; a gradient does not fit. Nothing was changed then.
        """
        if torch.compiler.is_compiling():
            return _traced_step(self, closure) if self._traceable else _untraced_step(self, closure)
        # torch's wrapper opens a named range for profilers and calls hooks: 0.1 ms when caches are cold
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or any(hook is not refuse_step for hook in _global_optimizer_pre_hooks.values())
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        ):
            return _observed_step(self, closure)
        return self._step(closure)

    takes_packed_gradients = True  # `packed.refuse_step` looks for it
    step.hooked = True  # type: ignore[attr-defined]  # so torch does not wrap it once more

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    def _take_step(self, grads: Sequence[Tensor] | None = None) -> None:
        """``grads``: of all launches' parameters, instead of the parameters' own; the launches are then as they are."""
        _check_capture(self)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        captured = all(group["capturable"] for group in self.param_groups)
        if not captured and found_inf is not None and found_inf.item() != 0:
            self._pending = None
            return
        if self._agreement is not None and not self._agreement.agreed:
            self._agreement.check(type(self).__name__)
        first = not self.state
        launches = self._compiled() if grads is None else self._launches
        if first and launches and self._only_makes_state():
            return
        prepared = self._prepared(launches, grads)
        if grads is None and self._may_have_lost_a_parameter(launches, prepared):
            del launches, prepared
            self._forget_launches()  # then nothing of this optimizer but groups and state refers to parameters
            self._take_step()
            return
        if not self._warned and not any(g.plain or any(x is not None for x in g) for g, *_ in prepared):
            self._trains_nothing()
        just_read = [gradients for gradients, *_ in prepared if gradients.own]
        factor = self._pending_factor(just_read if len(just_read) == len(prepared) else None)
        multiplier = _multiplier(grad_scale, factor)
        for launch, (gradients, scalars, scalar_set) in zip(launches, prepared, strict=True):
            launch.run(gradients, scalars, scalar_set, multiplier, found_inf)
        self._pending = None

    def _prepared(self, launches: list[_Launch], grads: Sequence[Tensor] | None) -> list[Any]:
        prepared = []
        for launch in launches:
            given = None if grads is None else GradientList(_real(g).contiguous() for g in grads[: len(launch.owners)])
            grads = None if grads is None else grads[len(launch.owners) :]
            prepared.append(launch.prepare(self.param_groups, given))
        return prepared

    def _may_have_lost_a_parameter(self, launches: list[_Launch], prepared: list[Any]) -> bool:
        """Whether a parameter has no gradient, and fewer refer to it than when launches were compiled."""
        return any(
            gradient is None and sys.getrefcount(p) < count
            for launch, (gradients, *_) in zip(launches, prepared, strict=True)
            if not gradients.plain
            for p, gradient, count in zip(launch.owners, gradients, launch.holders, strict=True)
        )

    def _forget_launches(self) -> None:
        self._launches, self._launch_key, self._whereabouts, self._waiting = [], None, None, []

    @property
    def _traceable(self) -> bool:
        """Whether `torch.compile` can take a step into its graph: the state is there, and nothing is sharded."""
        return (
            self._launch_key is not None
            and len(self._launches) > 0
            and not self._sharded
            and not any(any(launch.operands.packed_grads) for launch in self._launches)
        )

    def multiply_gradients_(self, factor: Tensor, gradients: list[Tensor | None] | None = None) -> None:
        """Have the next step multiply all gradients by ``factor``, a one-element float32 tensor that the device reads
        then; called again before it, the last factor holds. `clip_grad_norm_` with ``optimizer=`` calls this.

        The factor belongs to the gradients that are there now (``gradients``, if they are at hand). Once all of them
        are gone it is dropped; if some are, or if one was written to, or the plan, the state or the groups changed, the
        next step raises RuntimeError.
        """
        gradients = self._present_gradients() if gradients is None else gradients
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                f"{type(self).__name__}.multiply_gradients_: no parameter has a gradient, expected those that the "
                "factor is for; call it after the backward pass"
            )
        self._pending = _PendingFactor(factor, gradients)

    def _present_gradients(self) -> list[Tensor | None]:
        return [p.grad for group in self.param_groups for p in group["params"]]

    def _pending_factor(self, gradients: Sequence[list[Tensor | None]] | None = None) -> Tensor | None:
        """What this step multiplies gradients by (``gradients``: all of them, if just read); see `_PendingFactor`."""
        if self._pending is None:
            return None
        return self._pending.factor_now(gradients or [self._present_gradients()], type(self).__name__)

    def _void_factor(self, why: str) -> None:
        if self._pending is not None:
            self._pending.void = why

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; drops what `multiply_gradients_` said of these gradients."""
        self._pending = None
        super().zero_grad(set_to_none)

    def _compiled(self) -> list[_Launch]:
        """Launches for the present parameters, state and gradients; compiled anew only if one of them was replaced."""
        groups = self.param_groups
        key = generation(), [(_flags(group), list(map(id, group["params"]))) for group in groups]
        if (
            key == self._launch_key
            and self._whereabouts is not None
            and self._whereabouts.hold(self._local_state())
            and not any(p.grad is not None for p in self._waiting)
            and all(launch.gradients.reads(launch.owners) for launch in self._launches)
        ):
            return self._launches
        self._pending_factor()  # an error now, and not once state was made
        self._look_for_abandoned()
        params, names, masks = self._params(), self._names(), self._masks()
        parts = list(map(held, params))
        self._sharded = any(map(is_sharded, params))
        pieces = list(map(local, params))
        local_masks = [mask.piece(part) for mask, part in zip(masks, parts, strict=True)]
        live = forwards()
        for p, mask, name in zip(params, masks, names, strict=True):
            check_live_gradients(p, mask, name, type(self).__name__, live)
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        kinds: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            if p.grad is not None or self.state.get(p):
                self._check_trained(p, names[i])
                double = p.dtype in (torch.float64, torch.complex128)
                kinds.setdefault((_flags(groups[group_of[i]]), pieces[i].device, double), []).append(i)
        backends = []
        for (_, device, _), members in kinds.items():
            if device.type == "meta" and any(groups[group_of[i]]["fused"] for i in members):
                raise RuntimeError(  # torch's words, in torch's error: callers match them
                    "`fused=True` requires all the params to be floating point Tensors of supported devices, but "
                    f"{names[members[0]]!r} is on the meta device and holds no values; materialise the model first"
                )
            for i in members:
                grad = local_gradient(params[i])
                if isinstance(grad, PackedGradient):
                    check_packing(grad.mask, masks[i], names[i], type(self).__name__)
                elif grad is not None:
                    check_gradient(pieces[i], grad, names[i], type(self).__name__, (params[i].dtype,))
            dtypes = _kernel_dtypes(params[i] for i in members)
            backends.append(choose_backend(self._backend, device, type(self).__name__, dtypes))
        launches = []
        for ((_, amsgrad, *_), *_), members in kinds.items():
            for i in members:
                self._init_state(params[i], local_masks[i], amsgrad, names[i])
        for (((_, amsgrad, l2, capturable), _, double), members), backend in zip(kinds.items(), backends, strict=True):
            geometry = [
                (local_masks[i], age if (age := self._ages.get(names[i])) is None else age.piece(masks[i], parts[i]))
                for i in members
            ]
            geometry = [
                _of_real_view(*each) if params[i].is_complex() else each
                for i, each in zip(members, geometry, strict=True)
            ]
            launches.append(
                (_CapturableLaunch if capturable else _Launch)(
                    optimizer=type(self).__name__,
                    backend=backend,
                    work=compile_live([mask for mask, _ in geometry], [age for _, age in geometry]),
                    double=double,
                    owners=[params[i] for i in members],
                    names=[names[i] for i in members],
                    group_of=np.array([group_of[i] for i in members], np.int64),
                    states=[self.state[params[i]] for i in members],
                    numbers=[i + len(params) * shard_number(params[i]) for i in members],
                    amsgrad=amsgrad,
                    l2=l2,
                    stochastic=self._rounding == "stochastic",
                    seed=self._seed,
                )
            )
        self._launches, self._launch_key, self._whereabouts = launches, key, whereabouts(self._local_state())
        self._waiting = [p for p in params if p.grad is None and not self.state.get(p)]
        del params, pieces, p  # so that this counts who else refers to them, in the way it is asked later
        for launch in launches:
            launch.holders = [sys.getrefcount(p) for p, _ in zip(launch.owners, launch.names, strict=True)]
        return launches

    def _local_state(self) -> Mapping[Tensor, dict[str, Any]]:
        """`state` by what this rank holds of the parameters: what kernels take the addresses of."""
        if not self._sharded:
            return self.state
        return {getattr(p, "_local_tensor", p): state for p, state in self.state.items()}

    def _trains_nothing(self) -> None:
        """No parameter has a gradient: parameters may have been exchanged for others. Said once."""
        what = f"{type(self).__name__}: no parameter has a gradient at this step"
        remedy = (
            "if the model's parameters were replaced after the optimizer was built (load_state_dict(assign=True), "
            "resizing, sharding, wrapping), the optimizer has the old ones: build it afterwards"
        )
        if self._plan and not self.state and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(f"{what}; {remedy}")
        self._warned = True
        warnings.warn(f"{what}, and nothing trains; {remedy}", RuntimeWarning, stacklevel=3)

    def _look_for_abandoned(self) -> None:
        """Look for parameters that a model took others for: they train, have no gradient, and only this optimizer, in
        its groups and its state, refers to them. Raises ValueError for one that the plan freezes, else warns, once."""
        counts = [sys.getrefcount(p) for group in self.param_groups for p in group["params"]]
        (alone,) = [sys.getrefcount(p) for p in [torch.empty(0)]]
        lost = [
            name
            for p, name, count in zip(self._params(), self._names(), counts, strict=False)
            if count <= alone + (p in self.state) and p.requires_grad and p.grad is None
        ]  # fmt: skip
        if not lost:
            return
        planned = [name for name in lost if name in self._in_force and self._in_force[name].frozen_count]
        what = (
            f"{type(self).__name__}: {(planned or lost)[0]!r} has no gradient, and nothing but this optimizer refers "
            f"to it{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}: the model has another parameter in its "
            "place, as after load_state_dict(assign=True), resizing, weight_norm, sharding or wrapping; build the "
            "optimizer afterwards, or give it the new parameter in param_groups and state"
        )
        if planned:
            raise ValueError(what)
        if not self._warned:
            self._warned = True
            warnings.warn(what, RuntimeWarning, stacklevel=4)

    def _only_makes_state(self) -> bool:
        """Whether this first step is no training step: distributed checkpoint asks for the state to be made by a step
        with zero gradients and learning rates, and it must count nothing. A warm-up may begin alike; so who asks is
        looked up, at the first step alone."""
        if any(isinstance(group["lr"], float) and group["lr"] != 0 for group in self.param_groups):
            return False
        frame: Any = sys._getframe()
        while frame is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
            frame = frame.f_back
        return frame is not None

    def _init_state(self, param: Tensor, mask: FreezeMask, amsgrad: bool, name: str) -> None:
        """Make what state is missing; check what is there, since a kernel takes its addresses."""
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            self._ages.pop(name, None)  # without state everything is equally young
        dtypes = dict.fromkeys(MOMENTS[: 3 if amsgrad else 2], moment_dtype(param.dtype, self._state_dtype))
        if self._master is not None and param.dtype == torch.bfloat16:
            dtypes[REMAINDER] = torch.int16
        for key, dtype in dtypes.items():
            if key not in state:
                state[key] = torch.zeros(mask.packed_shape, dtype=dtype, device=local(param).device)
            moment = state[key]
            for got, expected, aspect in (
                (tuple(moment.shape), mask.packed_shape, "shape"),
                (moment.dtype, dtype, "dtype"),
                (moment.device, param.device, "device"),
            ):
                if got != expected:
                    raise ValueError(
                        f"{type(self).__name__}: state {key!r} of {name!r} has {aspect} {got}, expected {expected}; "
                        "load foreign state with load_state_dict; after a parameter grew, call set_freeze"
                    )
            state[key] = settled(moment)

    # -- changing the plan --------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_freeze(self, plan: FreezePlan | None) -> None:
        """Change what is frozen, between steps (contract 5).

        A newly frozen row stops at once and its state is dropped; a thawed one starts as a fresh row, its bias
        correction counted from now. What stays live keeps its state. ``None`` thaws everything.

        A parameter may have grown since the last step (``p.data = torch.cat([p.data, more])``, or another parameter
        that took its place in ``param_groups`` and `state`), at the end of its dimensions: ``plan`` is then for the new
        shapes, what was there keeps its state, and what was added starts as thawed rows do.

        Raises:
            ValueError: the plan does not fit, or a parameter shrank; the old plan stays in force.
        """
        plan = checked_plan(plan, f"{type(self).__name__}.set_freeze") if plan is not None else FreezePlan()
        new_masks = self._masks(plan, require_grad=True)
        ages, states = dict(self._ages), {}
        for p, name, new in zip(self._params(), self._names(), new_masks, strict=True):
            state = self.state.get(p)
            was = self._in_force.get(name)
            if was is None or not was.frozen_count:  # a parameter that no plan names has state of its own shape
                was = FreezeMask(state["exp_avg"].shape if state and not is_sharded(p) else p.shape)
            old = self._grown(was, new, name, p)
            if not state or (old == new and was is old):
                continue
            age = ages.get(name) or Ages.none(was)
            ages[name] = age.grown(was, old).after(old, new, int(state["step"].item()))
            part = held(p)
            states[p] = {key: _repack(state[key], old.piece(part), new.piece(part)) for key in _PACKED if key in state}
        for p, moments in states.items():
            self.state[p].update(moments)
        self._ages = {name: age for name, age in ages.items() if age}
        if plan.fingerprint != (self._plan or FreezePlan()).fingerprint:
            self._void_factor("the plan changed")
        self._plan, self._in_force = plan, dict(zip(self._names(), new_masks, strict=True))
        self._forget_launches()
        self._note_plan(anew=True)

    def _grown(self, old: FreezeMask, new: FreezeMask, name: str, p: Tensor) -> FreezeMask:
        """``old`` in the shape of ``new``, to which its tensor may have grown: what was added counts as frozen."""
        try:
            if old.shape != new.shape and is_sharded(p):
                raise ValueError("it is sharded")
            return old.grown(new.shape)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__}.set_freeze: {name!r} has another shape than before, and its state cannot be "
                f"carried over ({error}); build the optimizer anew"
            ) from error

    def _note_plan(self, *, anew: bool = False) -> None:
        """A plan came into force (``anew``), or what it is for changed: groups tell of it, ranks must have the same."""
        self._mark_groups()
        if self._agreement is None:
            params = (p for p in zip(self._names(), self._params(), strict=True))
            self._agreement = PlanAgreement((bare_name(name), p.shape) for name, p in params)
        self._agreement.note((self._plan or FreezePlan()).fingerprint, anew=anew)

    def _mark_groups(self) -> None:
        # In `state_dict` there is more; here, distributed checkpoint looks which entries a group has.
        for group in self.param_groups:
            group.pop(FREEZE, None)
            if self._plan or self._ages:
                group[FREEZE] = (self._plan or FreezePlan()).fingerprint

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch; moments are packed where a plan freezes, and an entry ``"freeze"`` of each group (a string) says
        under which plan. Of sharded parameters moments are full-size DTensors, placed as the parameter is.

        With nothing frozen it is exactly a `torch.optim.AdamW` state dict. See also `dense_state_dict`.
        """
        state_dict = super().state_dict()
        params, names, masks = self._params(), self._names(), self._masks()
        dense = self._dense_checkpoints or any(map(is_sharded, params))
        if dense:
            state_dict["state"] = self._dense(state_dict["state"], masks)
        for group in state_dict["param_groups"] if self._plan or self._ages else ():
            members = list(enumerate(group["params"]))
            group[FREEZE] = json.dumps(
                {
                    "version": 1,
                    "packed": not dense,
                    "masks": {place: masks[i].fingerprint for place, i in members if masks[i].frozen_count},
                    "ages": {place: self._ages[names[i]].encode() for place, i in members if names[i] in self._ages},
                }
            )
        return state_dict

    def dense_state_dict(self) -> dict[str, Any]:
        """A state dict that stock `torch.optim.AdamW` (or `Adam`) loads: full-size moments, zero where frozen.

        Rows thawed by `set_freeze` take the parameter's step count there: torch has one per parameter. What masters
        hold beyond their bfloat16 parameters has no place there; see `master_weights`.
        """
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.pop(FREEZE, None)
        dense = self._dense(state_dict["state"], self._masks())
        for entry in dense.values():
            entry.pop(REMAINDER, None)
        state_dict["state"] = dense
        return state_dict

    @torch.no_grad()
    def _dense(self, states: dict[int, dict[str, Any]], masks: list[FreezeMask]) -> dict[int, dict[str, Any]]:
        """``states``, index of a parameter -> its state, with full-size moments placed as the parameter is."""
        params = self._params()
        dense = {}
        for index, entry in states.items():
            p = params[index]
            mask = masks[index].piece(held(p))
            whole = FreezeMask(mask.shape)
            dense[index] = {
                key: value
                if key not in _PACKED
                else spread(_repack(value, mask, whole) if mask.frozen_count else value, p)
                for key, value in entry.items()
            }
        return dense

    @torch.no_grad()
    def master_weights(self) -> dict[str, Tensor]:
        """Name -> float32 weights: the masters where ``master="remainder"`` keeps them, else the parameters' values.

        What float32 does not hold (float64, complex numbers, quantised weights) is given as it is.
        """
        weights = {}
        for p, name, mask in zip(self._params(), self._names(), self._masks(), strict=True):
            piece, local_mask = local(p).detach(), mask.piece(held(p))
            weight = piece.float() if piece.dtype in STORAGE else piece
            remainder = self.state.get(p, {}).get(REMAINDER)
            if remainder is not None:
                live = from_remainder(piece, _repack(remainder, local_mask, FreezeMask(piece.shape)))
                weight = torch.where(local_mask.dense().to(piece.device), weight, live)
            weights[name] = spread(weight, p)
        return weights

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load our own state dict, or a stock `torch.optim.AdamW`/`Adam` one, which is packed to this plan.

        Moments take this optimizer's ``state_dtype`` (torch's own loader would cast them to the parameter's dtype).

        Raises:
            ValueError: other groups or shapes, or state packed under another plan. Nothing was changed then.
        """
        loaded: dict[str, Any] = {}

        # The first hook runs after the user's own and hides tensors from torch's casting; the second brings them back.
        def convert(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            converted, loaded["ages"] = self._converted(given)
            return converted

        def unveil(_: Optimizer) -> None:
            for state in self.state.values():
                for key, value in state.items():
                    if isinstance(value, _Veiled):
                        state[key] = value.tensor

        hooks = [
            self.register_load_state_dict_pre_hook(convert),
            self.register_load_state_dict_post_hook(unveil, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except RecursionError as error:
            raise ValueError(f"{type(self).__name__}.load_state_dict: the state dict is nested too deeply") from error
        finally:
            for hook in hooks:
                hook.remove()
        self._ages = loaded["ages"]
        self._forget_launches()
        self._void_factor("state was loaded")
        self._note_plan()

    def _converted(self, given: Any) -> tuple[dict[str, Any], dict[str, Ages]]:
        """``given`` with moments packed to this plan, in this optimizer's dtype, veiled; and the ages it carries."""
        what = f"{type(self).__name__}.load_state_dict"
        params, names, masks = self._params(), self._names(), self._masks()
        found = read_state_dict(given, what, _check_hyper_parameters)
        converted = dict(given)
        if len(found) != len(params):
            return converted, {}  # torch's loader says what differs
        converted["state"] = dict(given["state"])
        # Names are this optimizer's: a checkpoint's must not move the plan to other parameters.
        converted["param_groups"] = [
            {**saved, **{key: own[key] for key in ("param_names",) if key in own}}
            for saved, own in zip(given["param_groups"], self.param_groups, strict=False)
        ]
        ages: dict[str, Ages] = {}
        for saved, p, name, mask in zip(found, params, names, masks, strict=True):
            if saved.state is None:
                continue
            entry = {key: value.clone() if isinstance(value, Tensor) else value for key, value in saved.state.items()
                     if key not in _PACKED}  # fmt: skip
            if saved.noted and saved.mask != (mask.fingerprint if mask.frozen_count else None):
                raise ValueError(
                    f"{what}: state of {name!r} was saved under another freeze plan; build the optimizer with the "
                    "plan it was saved with (then set_freeze), or save with dense_state_dict(); full-size moments are "
                    "taken as they are once 'freeze' is gone from their param_groups"
                )
            if REMAINDER in saved.state and (self._master is None or p.dtype != torch.bfloat16):
                raise ValueError(
                    f"{what}: state of {name!r} holds a float32 master ({REMAINDER}), which this optimizer would "
                    "lose; build it with master='remainder' and bfloat16 parameters"
                )
            packed = saved.packed and saved.mask is not None
            for key in _PACKED:
                if key not in saved.state:
                    continue
                expected = mask.packed_shape if packed else tuple(p.shape)
                given_moment = saved.state[key]
                if tuple(given_moment.shape) != expected:
                    raise ValueError(
                        f"{what}: {key} of {name!r} has shape {tuple(given_moment.shape)}, expected {expected}"
                    )
                if given_moment.is_complex() != p.is_complex():
                    raise ValueError(
                        f"{what}: {key} of {name!r} has dtype {given_moment.dtype}, its parameter {p.dtype}"
                    )
                moment = self._local_moment(given_moment.detach(), p, mask, packed=packed)
                kept = torch.int16 if key == REMAINDER else moment_dtype(p.dtype, self._state_dtype)
                moment = moment.to(local(p).device, kept)
                entry[key] = _Veiled(_owned(moment.contiguous(), given_moment))
            step = float(saved.state["step"])
            entry["step"] = _Veiled(torch.tensor(step, dtype=torch.float32))
            if saved.ages is not None:
                try:
                    ages[name] = Ages.decode(saved.ages, mask, int(step))
                except ValueError as error:
                    raise ValueError(f"{what}: {name!r}: {error}") from error
            converted["state"][saved.key] = entry
        return converted, ages

    def _local_moment(self, moment: Tensor, param: Tensor, mask: FreezeMask, *, packed: bool) -> Tensor:
        """``moment`` of the whole parameter as this rank keeps it, packed."""
        if packed and not is_sharded(param):
            return moment
        whole = FreezeMask(mask.shape)
        piece = take(_repack(moment, mask, whole) if packed else moment, param)
        mask = mask.piece(held(param))
        return _repack(piece, FreezeMask(mask.shape), mask) if mask.frozen_count else piece

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_backend",
            "_state_dtype",
            "_master",
            "_rounding",
            "_seed",
            "_plan",
            "_aliases",
            "_ages",
            "_in_force",
            "_dense_checkpoints",
        )
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = "_backend" in state  # or loaded: torch's loader comes here too
        if copied:
            self._begin()
        super().__setstate__(state)
        for group in self.param_groups:  # what checkpoints of older torch versions lack
            for key in (
                "amsgrad",
                "maximize",
                "foreach",
                "capturable",
                "differentiable",
                "fused",
                "decoupled_weight_decay",
            ):
                group.setdefault(key, self.defaults[key])
        if copied:
            self._given_names = _named_by_identity(self.param_groups)
            if "_in_force" not in state:  # pickled by an earlier version
                self._in_force = dict(zip(self._names(), self._masks(), strict=True))
            self._note_plan()


_observed_step: Final = Optimizer.profile_hook_step(MaskedAdam._step)
# torch's word on a step that is recorded in a graph though its step counts are numbers; the name before torch 2.12
_check_capture: Final[Callable[[Optimizer], None]] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)

# ------------------------------------------------------------------------------------------------- compiled steps


def _untraced_step(optimizer: MaskedAdam, closure: Callable[[], Any] | None) -> Any:
    """The first step, which makes the state."""
    # looked up here: at import this would load the compiler
    return torch.compiler.disable(MaskedAdam._step)(optimizer, closure)  # type: ignore[no-untyped-call]


_untraced_step._torchdynamo_disable = True  # type: ignore[attr-defined]


def _traced_step(optimizer: MaskedAdam, closure: Callable[[], Any] | None) -> Any:
    """A step as `torch.compile` sees it: one operation that writes to parameters and state."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    params, grads, moments = [], [], []
    for launch in optimizer._launches:
        for p in launch.owners:
            if p.grad is None:
                raise RuntimeError("MaskedAdam: in a compiled step every parameter with state must have a gradient")
            params.append(p)
            grads.append(p.grad)
        moments.extend(launch.moments)
    steps = [launch.steps for launch in optimizer._launches]
    torch.ops.safefreeze.step_(params, grads, moments, steps, optimizer._handle)
    return loss


@torch.library.custom_op("safefreeze::step_", mutates_args=("params", "moments", "steps"))
def _step_op(
    params: list[Tensor], grads: list[Tensor], moments: list[Tensor], steps: list[Tensor], handle: int
) -> None:
    """Adam(W) on tensors that stand for those of optimizer ``handle``: the same, or copies that a compiler made."""
    optimizer = _traced.get(handle)
    if optimizer is not None:
        optimizer._compiled()  # in case something was moved
    if optimizer is None or [len(params), len(moments)] != [
        sum(len(getattr(launch, what)) for launch in optimizer._launches) for what in ("owners", "moments")
    ]:
        raise RuntimeError("MaskedAdam: a compiled step was called after its optimizer changed; compile it anew")
    own = [t for launch in optimizer._launches for t in (*launch.owners, *launch.moments, launch.steps)]
    given = []
    for launch, count in zip(optimizer._launches, steps, strict=True):
        n, k = len(launch.owners), len(launch.moments)
        given += [*params[:n], *moments[:k], count]
        params, moments = params[n:], moments[k:]
    copies = [(mine, other) for mine, other in zip(own, given, strict=True) if mine.data_ptr() != other.data_ptr()]
    for mine, other in copies:
        mine.copy_(other)
    optimizer._take_step(grads)
    for mine, other in copies:
        other.copy_(mine)


@_step_op.register_fake
def _(params: list[Tensor], grads: list[Tensor], moments: list[Tensor], steps: list[Tensor], handle: int) -> None:
    pass


class MaskedAdamW(MaskedAdam):
    """`torch.optim.AdamW` whose step leaves frozen weights untouched, byte for byte.

    As `MaskedAdam`, with decoupled weight decay (``weight_decay=1e-2`` by default, as in torch).

    >>> opt = MaskedAdamW(model.named_parameters(), lr=2e-5, weight_decay=0.1, freeze=plan)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        freeze: FreezePlan | None = None,
        backend: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        dense_checkpoints: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=True, freeze=freeze, backend=backend, state_dtype=state_dtype, master=master,
            rounding=rounding, seed=seed, dense_checkpoints=dense_checkpoints,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # whatever checkpoint came, as in torch


@dataclass
class _Veiled:
    """Carries a tensor through torch's state loader unseen."""

    tensor: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _Veiled:
        return self


class _PendingFactor:
    """What the next step multiplies gradients by, and which gradients these are. They are kept until then, so that no
    other can be taken for one of them.

    Attributes:
        void: why it no longer holds, though they may be there still; "": it does.
    """

    def __init__(self, factor: Tensor, gradients: list[Tensor | None]) -> None:
        self.factor, self.void = factor, ""
        self._gradients = gradients
        self._trace = trace(gradients)

    def factor_now(self, gradients: Sequence[list[Tensor | None]], what: str) -> Tensor | None:
        """The factor, if ``gradients`` (in lists) are as they were; None if none of them is there any more.

        Raises:
            RuntimeError: some of them changed, or something else did that the factor depends on.
        """
        why = self.void
        if sum(map(trace, gradients)) % 2**64 != self._trace:
            kept = {id(g) for g in self._gradients if g is not None}
            if kept.isdisjoint(id(g) for each in gradients for g in each):
                return None
            why = "gradients changed"
        if why:
            raise RuntimeError(
                f"{what}: a clip factor waits for this step, but since it was computed {why}; call clip_grad_norm_ "
                "after that (or zero_grad() of this optimizer, which drops the factor)"
            )
        return self.factor
