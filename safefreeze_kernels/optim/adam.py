"""`MaskedAdamW` and `MaskedAdam`, drop-in for `torch.optim`. The step itself is `MaskedAdam._update`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
import torch.distributed
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..grads.flat import ZeroedEarly
from ..grads.forwards import forwards, outside_the_graph
from ..grads.live import check_live_gradients, refuse_packed_gradients
from ..kernels.ages import Ages
from ..kernels.backend import choose_backend
from ..model.flat import Partition
from ..model.packed import refuse_step
from ..model.sharding import PlanAgreement, is_sharded
from ..plan.binding import bare_name, whole_shape
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checks import (
    Exchanged,
    GivenNames,
    Member,
    Settings,
    all_params,
    check_defaults,
    check_trained,
    checked_plan,
    hyper_parameters,
    of_an_earlier_version,
)
from .compiled import Handle, traced_step
from .engine import TOO_EARLY, Launches, look_at, refuse_pieces
from .flat import FlatState, flat_note, full_size
from .flat import converted as converted_flat
from .launch import (
    LaunchPlan,
    PendingFactor,
    all_count_on_device,
    kernel_dtypes,
    make_launch_plans,
    multiplier,
)
from .refreeze import ages_after, apply_changes, changes_of
from .state import (
    FREEZE,
    IN_FORCE,
    REMAINDER,
    close_gaps,
    converted,
    dense_states,
    loading,
    master_weight,
    only_makes_state,
    plan_note,
    told_apart,
)  # fmt: skip

# What a copy of an optimizer has of it, beside groups and state.
_COPIED: Final = ("_settings", "_plan", "_names", "_ages", "_masks", "_whole")


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
            complex parameters have moments like themselves. int8: 8 bits each, codes (uint8) that `dense_state_dict`
            gives as float32; see docs/how-to/low-precision.md for what that costs.
        master: "remainder" keeps, for each live element of a bfloat16 parameter, the 16 bits it lacks of a float32
            master (state ``master_remainder``): the masters train exactly as float32 parameters given the same
            gradients; see `master_weights`. Float32 parameters need none, float16 ones are refused.
        rounding: of bfloat16 and float16 parameters without a master: "nearest" (ties to even), or "stochastic": up or
            down at random, so that small updates are right on average.
        dense_checkpoints: `state_dict` has full-size moments, zero where frozen, that distributed checkpoint can save
            under DDP and load under another layout or into stock AdamW. Sharded parameters always have such.
        seed: of stochastic rounding, that of 8-bit moments too. Its noise depends on seed, step, the parameter's place
            in this optimizer and the element alone: the same on every backend, and after a resume. A sharded
            parameter's depends on the shard.
        fused: as in torch, True lets `torch.amp.GradScaler` pass its scale into the step instead of unscaling first; on
            a GPU step counts then live there, and nobody waits to hear whether the scale was too large.
        foreach: accepted and ignored: there is one implementation, and it takes all tensors at once.
        capturable: step counts live on the parameters' device, where lr (as a tensor), ``grad_scale`` and ``found_inf``
            are read too: the host never waits, and a step can be recorded in a CUDA graph.
        differentiable: not supported; True raises.

    Parameters are float32, bfloat16 or float16, and the arithmetic is float32. Complex64 parameters are stepped through
    their real view, as in torch. Float64 and complex128 ones are computed in float64, by the slow reference backend
    (``backend="auto"`` says so once). What has ``requires_grad=False``, and is in no plan, may have any dtype and
    layout: only what gets a gradient is looked at. State keys are torch's; with rows or columns frozen, ``exp_avg`` and
    ``exp_avg_sq`` are packed to (live rows, live columns), with single elements frozen to (live elements,).

    `torch.amp.GradScaler` looks at all gradients: to keep an inf in a frozen one from skipping a step, call
    `zero_frozen_grads_` before ``scaler.unscale_`` or ``scaler.step``.

    Raises:
        ValueError: hyper-parameters out of range or NaN; a plan that does not fit (contract 6).
        TypeError: parameters that train and are of an unsupported dtype or layout.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *, foreach: bool | None = None,
        maximize: bool = False, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        decoupled_weight_decay: bool = False, freeze: FreezePlan | None = None, backend: str = "auto",
        state_dtype: torch.dtype = torch.float32, master: str | None = None, rounding: str = "nearest", seed: int = 0,
        dense_checkpoints: bool = False,
    ) -> None:  # fmt: skip
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        what = type(self).__name__
        check_defaults(defaults, what)
        defaults["betas"] = tuple(float(beta) for beta in betas)
        self._settings = Settings(what, backend, state_dtype, master, rounding, seed, dense_checkpoints)
        self._plan: FreezePlan | None = None
        self._names = GivenNames()
        self._ages: dict[str, Ages] = {}  # by name: when what was thawed was
        self._masks: dict[str, FreezeMask] = {}  # by name: what is frozen, whatever shape a parameter took since
        self._whole = False  # whether state is of the parameters' own shape, or packed by these masks
        self._start()
        super().__init__(self._names.without_duplicates(params), defaults)
        if fused:
            self._step_supports_amp_scaling = True
        if freeze is not None:
            self._plan = checked_plan(freeze, what)
        # A plan that does not fit, or a backend that does not run, is an error now and not at the first step.
        self._masks = {member.name: member.mask for member in self._members(require_grad=True)}
        self._note_plan(anew=True)
        if "deepspeed" in sys.modules:
            self._zeroed = ZeroedEarly(self._names.given(), self._masks, what)
        trained = [p for p in all_params(self.param_groups) if p.requires_grad] or all_params(self.param_groups)
        for device in {p.device for p in trained} - {torch.device("meta")} or {torch.device("cpu")}:
            choose_backend(backend, device, what, kernel_dtypes(p for p in trained if p.device == device))

    def _start(self) -> None:
        """What no copy inherits: it is found out again at the next step."""
        self._launches = Launches()
        self._zeroed = None
        self._pending = PendingFactor()  # what clipping left for the next step to do
        self._agreement: PlanAgreement | None = None
        self._exchanged = Exchanged(type(self).__name__)
        self._handle = Handle(self._launch_plans, self._update)

    # -- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``: reevaluates the model and returns the loss, as in `torch.optim`.

        ``grad_scale`` and ``found_inf``, set as attributes or by `torch.amp.GradScaler`, are honoured: gradients count
        as divided by the scale, and a found inf skips the step.

        Raises:
            ValueError: a hyper-parameter became NaN or negative; a gradient does not fit. Nothing was changed then.
        """
        if torch.compiler.is_compiling():
            if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
                return outside_the_graph(_observed_step, self, closure)
            if self._launches.now.traceable:
                return traced_step(self._launches.now.plans, self._handle.number, closure)
            return outside_the_graph(MaskedAdam._step, self, closure)
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

    _zeroed: ZeroedEarly | None
    takes_packed_gradients = True  # `packed.refuse_step` looks for it
    step.hooked = True  # type: ignore[attr-defined]  # so torch does not wrap it once more

    def register_step_post_hook(self, hook: Any) -> Any:
        """As in torch. A step that was traced in a graph would not run it: the graph is made anew."""
        self._handle = Handle(self._launch_plans, self._update)
        return super().register_step_post_hook(hook)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self, given: Sequence[Sequence[Tensor]] | None = None) -> None:
        """The step: prepare every launch plan, which is where errors are raised, then run each.

        ``given``: gradients for each launch plan, instead of the parameters' own; the plans are then as they are.
        """
        _check_capture(self)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._launches.look(self.param_groups)
        valid = given is not None or self._valid()
        if found_inf is not None and self._host_skips(found_inf, valid):
            self._pending.drop()
            return
        if self._agreement is not None and not self._agreement.agreed:
            self._agreement.check(type(self).__name__)
        first = not self.state
        plans = self._launch_plans(valid) if given is None else self._launches.now.plans
        if first and plans and only_makes_state(self.param_groups):
            return
        prepared = [
            plan.prepare(self.param_groups, None if given is None else given[index]) for index, plan in enumerate(plans)
        ]
        found = [ready.grads for ready in prepared]
        if given is None and any(
            plan.may_have_lost_a_parameter(ready.grads) for plan, ready in zip(plans, prepared, strict=True)
        ):
            del plans, prepared, found
            for launch in self._launches:
                launch.forget()  # then nothing of this optimizer but groups and state refers to parameters
            self._update()
            return
        if not any(grads.plain or any(g is not None for g in grads) for grads in found):
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            self._exchanged.nothing_trains(refuse=bool(self._plan and not self.state and distributed))
        factor = multiplier(grad_scale, self._pending.now(self.param_groups, type(self).__name__, found))
        for plan, ready in zip(plans, prepared, strict=True):
            plan.run(ready, factor, found_inf)
        self._pending.drop()

    def _host_skips(self, found_inf: Tensor, valid: bool) -> bool:
        """Whether nothing is done in this step; False also where only kernels look at ``found_inf``. ``valid``: launch
        plans are."""
        on_device = self._launches.now.on_device if valid else all_count_on_device(self.param_groups)
        return not on_device and found_inf.item() != 0

    def _valid(self) -> bool:
        return self._launches.now.valid(self.param_groups, self._launches.of(self.state, self.param_groups))

    def _launch_plans(self, valid: bool | None = None) -> list[LaunchPlan]:
        """Launch plans for the present parameters, state and gradients; made anew only if one of them was replaced. If
        masks alone changed, they get new work lists. ``valid``: whether those that are there are, if that is known."""
        if valid is None:
            valid = self._valid()
        if not valid or self._launches.now.stale:
            self._pending.now(self.param_groups, type(self).__name__)  # an error now, and not once state was made
            if not valid:
                self._exchanged.look(self.param_groups, self.state, self._masks)
            self._make_launch_plans(valid)
            for plan in self._launches.now.plans:
                plan.note_references()
        return self._launches.now.plans

    def _make_launch_plans(self, valid: bool) -> None:
        members, what = self._launches.now.members(self._masks) if valid else self._members(), type(self).__name__
        flat = self._partitions()
        if flat and not valid:
            if (told := look_at(flat, members, self._masks, self.param_groups, self.state, what)) is not None:
                self._ages, self._whole, members = told.ages, told.whole, self._members()
            if self._plan and self._zeroed is None:
                raise RuntimeError(f"{what}: {TOO_EARLY}")
        live = forwards()
        for param, mask, name in self._names.whole(members):
            check_live_gradients(param, mask, name, what, live)
        if self._whole:
            refuse_packed_gradients([member.param for member in members], [member.name for member in members], what)
        if valid:
            self._launches.now.relist(members, self._ages)
            return
        state = self._state(flat, members)
        plans = make_launch_plans(self.param_groups, members, self._ages, state, self._settings)
        if isinstance(state, FlatState):
            state.store()
            self._launches.are_of_partitions(self.param_groups)
        sharded = bool(flat) or any(is_sharded(member.param) for member in members)
        present = self._launches.of(self.state, self.param_groups)
        self._launches.now.keep(plans, self.param_groups, present, sharded=sharded)

    def _partitions(self) -> list[Partition]:
        return self._names.partitions(self.param_groups, type(self).__name__)

    def _state(self, flat: list[Partition], members: list[Member]) -> Mapping[Tensor, dict[str, Any]]:
        """State by `Member.param`."""
        return FlatState(flat, members, self.state, self._settings) if flat else self.state

    def multiply_gradients_(self, factor: Tensor, gradients: list[Tensor | None] | None = None) -> None:
        """Have the next step multiply all gradients by ``factor``, a one-element float32 tensor that the device reads
        then; called again before it, the last factor holds. `clip_grad_norm_` with ``optimizer=`` calls this.

        The factor belongs to the gradients that are there now (``gradients``, if they are at hand). Once all of them
        are gone it is dropped; if some are, or if one was written to, or the plan, the state or the groups changed, the
        next step raises RuntimeError.
        """
        gradients = [p.grad for p in all_params(self.param_groups)] if gradients is None else gradients
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                f"{type(self).__name__}.multiply_gradients_: no parameter has a gradient, expected those that the "
                "factor is for; call it after the backward pass"
            )
        self._pending.put(factor, gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; drops what `multiply_gradients_` said of these gradients."""
        self._pending.drop()
        super().zero_grad(set_to_none)

    # -- parameters and plan ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. With a plan, the names of the new parameters are checked against it.

        Raises:
            ValueError: a new parameter has a name that the plan uses for another one. Nothing was added then.
        """
        if isinstance(param_group, dict):  # else torch says so
            hyper_parameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._plan:
            group[FREEZE] = IN_FORCE
        try:
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    check_trained(p, self._settings, group["param_names"][i] if "param_names" in group else None)
            if self._plan:
                self._members()
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self._names.note([group])
        if self._agreement is not None:  # ranks agree on plans of these very parameters
            self._agreement = None
            self._note_plan()
        self._pending.invalid = "a parameter group was added"

    @property
    def plan(self) -> FreezePlan | None:
        """The plan in force; `set_freeze` changes it."""
        return self._plan

    def _members(self, plan: FreezePlan | None = None, **options: Any) -> list[Member]:
        """Every parameter, with its name and its mask under ``plan`` (default: the one in force), as
        `GivenNames.members` gives them."""
        plan = self._plan if plan is None else plan
        options = {"whole": self._whole, **options}
        return self._names.members(self.param_groups, plan, type(self).__name__, **options)

    @torch.no_grad()
    def set_freeze(
        self, plan: FreezePlan | None, *, keep_state: bool = False, thawed: Literal["fresh", "kept"] = "fresh"
    ) -> None:
        """Change what is frozen, between steps (contract 5). ``None``: nothing. What stays live keeps its state.

        What is newly frozen stops at once, and its state is dropped; with ``keep_state`` it is only paused: its moments
        stay where they are, and nothing reads or writes them. State is then held in full for every parameter, so that
        nothing moves, and a plan may change every few steps.

        What is thawed starts as fresh weights do, its bias correction counted from now. With ``thawed="kept"`` it goes
        on with the moments that were kept, and its bias correction counts the steps it took itself; what has none, as
        it was frozen without ``keep_state`` or never live, starts with zeros either way. Of bfloat16 weights with
        masters, ``keep_state`` keeps the masters, which are part of the weight, however their moments start.

        A parameter may have grown since the last step (``p.data = torch.cat([p.data, more])``, or another parameter
        that took its place in ``param_groups`` and `state`), at the end of its dimensions: ``plan`` is then for the new
        shapes, what was there keeps its state, and what was added starts as thawed rows do.

        Args:
            plan: what is frozen from now on.
            keep_state: whether frozen weights keep their state from now on, those that are frozen now included. Going
                back to False drops what is frozen then.
            thawed: "fresh" or "kept".

        Raises:
            TypeError, ValueError: an argument is something else, the plan does not fit, a parameter shrank, or state is
                to be kept where `live_gradients` packs gradients; the old plan stays in force.
        """
        what = f"{type(self).__name__}.set_freeze"
        if not isinstance(keep_state, bool):
            raise TypeError(f"{what}: keep_state is {keep_state!r}, expected True or False")
        if thawed not in ("fresh", "kept"):
            raise ValueError(f"{what}: thawed is {thawed!r}, expected 'fresh' or 'kept'")
        plan = checked_plan(plan, what) if plan is not None else FreezePlan()
        members, counts_on = self._members(plan, whole=keep_state, require_grad=True), thawed == "kept"
        if keep_state:
            refuse_packed_gradients([member.param for member in members], [member.name for member in members], what)
        flat = self._partitions()
        state = self._state(flat, self._members() if flat else [])
        changes = changes_of(members, state, self._masks, what, was_whole=self._whole)
        ages = ages_after(self._ages, changes, state, counts_on=counts_on)
        apply_changes(state, changes, self._settings, counts_on=counts_on)
        if isinstance(state, FlatState):
            state.store(members)
        self._ages = ages
        if plan != (self._plan or FreezePlan()):
            self._pending.invalid = "the plan changed"
        for launch in self._launches:
            if self._whole and keep_state:
                launch.stale = True  # nothing moved
            else:
                launch.forget()
        self._plan, self._whole = plan, keep_state
        self._masks = {member.name: member.mask for member in members}
        if self._zeroed is not None:
            self._zeroed.freeze(self._masks)
        self._note_plan(anew=True)

    def _note_plan(self, *, anew: bool = False) -> None:
        """A plan came into force (``anew``), or what it is for changed: groups tell of it, ranks must have the same."""
        for group in self.param_groups:  # distributed checkpoint looks which entries a group has
            group.pop(FREEZE, None)
            if self._plan or self._ages:
                group[FREEZE] = IN_FORCE
        if self._agreement is None:
            named = self._names.named(self.param_groups)
            self._agreement = PlanAgreement((bare_name(name), whole_shape(p)) for name, p in named)
        self._agreement.note(self._plan or FreezePlan(), anew=anew)

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch; moments are packed where a plan freezes, and an entry ``"freeze"`` of each group (a string) says
        under which plan. Of sharded parameters moments are full-size DTensors, placed as the parameter is.

        With nothing frozen it is exactly a `torch.optim.AdamW` state dict. See also `dense_state_dict`.
        """
        state_dict, members, flat = super().state_dict(), self._members(), self._partitions()
        dense = self._settings.dense_checkpoints or any(is_sharded(member.param) for member in members)
        if dense:
            whole = functools.partial(full_size, flat) if flat else dense_states
            state_dict["state"] = whole(state_dict["state"], members)
        state_dict["state"] = {index: told_apart(entry) for index, entry in state_dict["state"].items()}
        noted = flat_note(flat, members, self._ages, self.param_groups) if flat else ""
        for group in state_dict["param_groups"] if self._plan or self._ages else ():
            group[FREEZE] = noted or plan_note([members[i] for i in group["params"]], self._ages, packed=not dense)
        return state_dict

    def dense_state_dict(self) -> dict[str, Any]:
        """A state dict that stock `torch.optim.AdamW` (or `Adam`) loads: full-size moments, zero where frozen.

        Rows thawed by `set_freeze` take the parameter's step count there: torch has one per parameter. What masters
        hold beyond their bfloat16 parameters has no place there; see `master_weights`.
        """
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.pop(FREEZE, None)
        whole = functools.partial(full_size, flat) if (flat := self._partitions()) else dense_states
        state_dict["state"] = whole(state_dict["state"], self._members(), live_alone=True)
        for entry in state_dict["state"].values():
            entry.pop(REMAINDER, None)
        return state_dict

    @torch.no_grad()
    def master_weights(self) -> dict[str, Tensor]:
        """Name -> float32 weights: the masters where ``master="remainder"`` keeps them, else the parameters' values.

        What float32 does not hold (float64, complex numbers, quantised weights) is given as it is.
        """
        members = self._members()
        refuse_pieces(members, f"{type(self).__name__}.master_weights")
        return {member.name: master_weight(member, self.state.get(member.param, {})) for member in members}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load our own state dict, or a stock `torch.optim.AdamW`/`Adam` one, which is packed to this plan.

        Moments take this optimizer's ``state_dtype`` (torch's own loader would cast them to the parameter's dtype).

        Raises:
            ValueError: other groups or shapes, or state packed under another plan. Nothing was changed then.
        """
        flat = self._partitions()
        how = functools.partial(converted_flat, flat) if flat else converted
        with loading(self, self._members(), self._settings, how) as loaded:
            super().load_state_dict(state_dict)
        self._ages, self._whole = loaded.ages, loaded.whole
        for launch in self._launches:
            launch.forget()
        self._pending.invalid = "state was loaded"
        self._note_plan()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_backend" in state:  # pickled by an earlier version
            state = {**of_an_earlier_version(state, type(self).__name__), **state}
        copied = "_settings" in state  # or loaded: torch's loader comes here too
        if copied:
            self._whole = False  # what earlier versions do not say
            self._start()
        super().__setstate__(state)
        for group in self.param_groups:  # what checkpoints of older torch versions lack
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if copied:
            self._names.note(self.param_groups)
            if "_masks" not in state:
                self._masks = {member.name: member.mask for member in self._members()}
            close_gaps(self.state, self._members())
            self._note_plan()


_observed_step: Final = Optimizer.profile_hook_step(MaskedAdam._step)
# torch's word on a step that is recorded in a graph though its step counts are numbers; the name before torch 2.12
_check_capture: Final[Callable[[Optimizer], None]] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)


class MaskedAdamW(MaskedAdam):
    """`torch.optim.AdamW` whose step leaves frozen weights untouched, byte for byte.

    As `MaskedAdam`, with decoupled weight decay (``weight_decay=1e-2`` by default, as in torch).

    Examples:
        To freeze the first layer of a small model:

        >>> import torch, safefreeze_kernels as sf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> first = {name: p for name, p in model.named_parameters() if name.startswith("0.")}
        >>> plan = sf.FreezePlan({name: sf.FreezeMask(p.shape, rows=range(len(p))) for name, p in first.items()})
        >>> optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, weight_decay=0.1, freeze=plan)
        >>> before = {name: p.detach().clone() for name, p in model.named_parameters()}
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        ['2.weight', '2.bias']
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
        foreach: bool | None = None, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        freeze: FreezePlan | None = None, backend: str = "auto", state_dtype: torch.dtype = torch.float32,
        master: str | None = None, rounding: str = "nearest", seed: int = 0, dense_checkpoints: bool = False,
    ) -> None:  # fmt: skip
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
