"""transformers' Trainer, and TRL's through it: the optimizer in one line, clipping over live gradients, and a callback
that proves the freeze at every save. Imported through `safefreeze_kernels.integrations.transformers`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.distributed
from accelerate.state import GradientState
from torch import Tensor
from torch.autograd import Variable
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..attribution.watch import RefusalWatch
from ..grads.clip import ClippedNorm, clip_grad_norm_, zero_frozen_grads_
from ..keeping.keeper import RefusalKeeper, keepers_of
from ..model.attached import Attached, attach, detach
from ..model.flat import gathered, in_engine
from ..optim.adam import MaskedAdam, MaskedAdamW
from ..optim.guard import guards_of
from ..plan.adapted import AdaptedPlan
from ..plan.binding import bind, named_tensors
from ..plan.files import write_atomically
from ..plan.plan import FreezePlan
from ..proof.snapshot import Snapshot, snapshot

__all__ = ["FreezeCallback", "KeeperCallback", "RefusalCallback", "build_masked_adamw", "masked_adamw"]

PlanOrFile = FreezePlan | str | os.PathLike[str]

PLAN_FILE: Final = "freeze_plan.safetensors"
BASE_PLAN_FILE: Final = "base_plan.safetensors"
PROOF_FILE: Final = "freeze_proof.json"
KEEPER_FILE: Final = "refusal_keeper.safetensors"


def masked_adamw(
    plan: PlanOrFile, args: TrainingArguments | None = None, *, adapt: bool = False, **options: Any
) -> tuple[type, dict[str, Any]]:
    """`MaskedAdamW` for ``Trainer(..., optimizer_cls_and_kwargs=masked_adamw(plan, lr=2e-5, weight_decay=0.1))``.

    Parameters get their names and Trainer's two groups: biases and norms do not decay. ``max_grad_norm`` clips by the
    norm of what trains, and that norm is what Trainer logs: at the end of the backward pass before a step frozen
    gradients are set to zero. TRL's trainers take the argument too.

    Args:
        plan: what is frozen; or the path of its file.
        args: where lr, weight_decay, betas and eps come from unless given; without ``args`` they have `MaskedAdamW`'s
            defaults, since Trainer does not tell an optimizer of its own what ``TrainingArguments`` say.
        adapt: the plan is in the names of the base model, and is carried to the adapters (`safefreeze_kernels.adapt`)
            that the model has by then: for trainers that make them, as TRL's do of ``peft_config``.
        options: of `MaskedAdamW`.

    Raises:
        TypeError: neither ``lr`` nor ``args`` is given.
        ValueError: when Trainer makes the optimizer: as `build_masked_adamw`.
    """
    options = _with_defaults(args, options) | ({"adapt": True} if adapt else {})
    return _Factory, {"plan": _loaded(plan), **options}


def build_masked_adamw(
    model: torch.nn.Module, plan: PlanOrFile, args: TrainingArguments | None = None, *, adapt: bool = False,
    **options: Any,
) -> MaskedAdamW:  # fmt: skip
    """The optimizer that `masked_adamw` has Trainer make, for ``Trainer(..., optimizers=(optimizer, None))``: some
    trainers, TRL's DPOTrainer among them, take no other. Arguments as there.

    Raises:
        TypeError: neither ``lr`` nor ``args`` is given.
        ValueError: the plan does not fit the model, or names a weight that does not train, such as one that LoRA froze.
    """
    plan, options = _loaded(plan), _with_defaults(args, options)
    if adapt:
        from . import peft

        plan = peft.adapt(plan, model)
    plan.check(model)
    decaying = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    decay = [(name, p) for name, p in named if name in decaying]
    homes = {id(p) for _, p in decay}  # a tied weight that decays under one of its names does so
    groups: list[dict[str, Any]] = [
        {"params": decay},
        {"params": [(name, p) for name, p in named if id(p) not in homes], "weight_decay": 0.0},
    ]
    optimizer = MaskedAdamW([group for group in groups if group["params"]], freeze=plan, **options)
    _ZeroesFrozen(model, optimizer)
    return optimizer


def _loaded(plan: PlanOrFile) -> FreezePlan:
    return plan if isinstance(plan, FreezePlan) else FreezePlan.load(plan)


def _with_defaults(args: TrainingArguments | None, options: dict[str, Any]) -> dict[str, Any]:
    if args is not None:
        options = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        } | options
    if "lr" not in options:
        raise TypeError("masked_adamw: lr is missing, expected lr=… or the TrainingArguments (args=…)")
    return options


class _Factory:
    """What Trainer takes for an optimizer it must hand the whole model to: a class that is none. axolotl's trainers
    hand it their arguments, too; what they say gives way to ``options``."""

    def __init__(self, *given: Any, **options: Any) -> None:
        if given or options:
            raise TypeError(
                f"masked_adamw: the trainer makes the optimizer of groups of its own, with {sorted(options)}, as for "
                "embedding_learning_rate or loraplus_lr_ratio, expected to be handed the model; leave those settings "
                "out, or set trainer.optimizer = build_masked_adamw(model, plan, args)"
            )

    def __call__(self, model: torch.nn.Module, args: TrainingArguments | None = None, **options: Any) -> MaskedAdamW:
        return build_masked_adamw(model, args=args, **options)


class _ZeroesFrozen(Attached):
    """Zeroes frozen gradients once the backward pass before a step is over, so that whoever clips sees live ones only.

    Nothing of Trainer runs between backward and clip, and hooks of parameters never run under FSDP2; but the end of a
    backward pass can be asked for by a hook of the tensor it begins with. A forward hook of the model, but not of its
    copies; gone with the optimizer.
    """

    def __init__(self, model: torch.nn.Module, optimizer: MaskedAdamW) -> None:
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)
        self._asked = False
        self.norms: ClippedNorm | None = None
        self.watch_norms = False
        attach(model, self)
        weakref.finalize(optimizer, self._detach)
        _zeroes[optimizer] = self

    def _detach(self) -> None:
        if (model := self._model()) is not None:
            detach(model, self)

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._asked = False  # a backward pass that failed never came to its end
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._at_backward)  # type: ignore[no-untyped-call]

    def _at_backward(self, grad: Tensor) -> None:
        if not self._asked:
            self._asked = True
            queue: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback
            # Twice: what DDP and FSDP ask for in this backward, which finishes the gradients, comes between.
            queue(lambda: queue(self._zero))

    def _zero(self) -> None:
        self._asked = False
        model, optimizer = self._model(), self._optimizer()
        if model is None or optimizer is None or not optimizer.plan or not GradientState().sync_gradients:
            return
        if any(map(in_engine, model.parameters())):  # the optimizer did so before the engine took them away
            return
        if self.watch_norms:
            self.norms = clip_grad_norm_(model, float("inf"), optimizer.plan, return_raw=True)
        zero_frozen_grads_(model, optimizer.plan)


_zeroes: weakref.WeakKeyDictionary[MaskedAdamW, _ZeroesFrozen] = weakref.WeakKeyDictionary()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    """An optimizer and what it wraps, as accelerate's does."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


class FreezeCallback(TrainerCallback):
    """Proves the freeze at every save, keeps plan and proof beside each checkpoint, and logs what is frozen.

    Before a checkpoint is written the frozen bytes are compared with those at the beginning of training; after it,
    ``freeze_plan.safetensors`` and ``freeze_proof.json`` (step, fingerprint of the plan, digest of the frozen bytes per
    rank) lie in its folder; of a plan that was carried to adapters, ``base_plan.safetensors`` too. Logs gain
    ``frozen_share`` and, with ``raw_norm``, ``raw_grad_norm``.

    Args:
        plan: what is frozen; or the path of its file. In the base's names, if the optimizer's was made from it by
            `safefreeze_kernels.adapt`.
        proof: a `snapshot` to compare with, for example of the model before an earlier run; default: taken when
            training begins.
        raw_norm: log the gradient norm that counts frozen elements too (one more pass over all gradients per step); for
            an optimizer made by `masked_adamw`.

    Raises:
        ValueError: when training begins: the optimizer freezes by another plan or not at all (it is neither a
            `MaskedAdamW` or `MaskedAdam` nor has a `guard`), while a weight of the plan trains.
        FrozenDriftError: from training, before a save or at the end, naming the first frozen weight that moved.
    """

    def __init__(self, plan: PlanOrFile, *, proof: Snapshot | None = None, raw_norm: bool = False) -> None:
        self.plan, self.proof, self._raw_norm = _loaded(plan), proof, raw_norm
        self._zeroes: _ZeroesFrozen | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizers = list(_unwrapped(kwargs.get("optimizer")))
        self._check_frozen(kwargs["model"], optimizers)
        with self._whole(kwargs["model"]):
            self.proof = self.proof or snapshot(kwargs["model"], self.plan)
        made = (_zeroes.get(one) for one in optimizers if isinstance(one, MaskedAdamW))
        self._zeroes = next((zeroes for zeroes in made if zeroes is not None), None)
        if self._raw_norm:
            if self._zeroes is None:
                raise ValueError("FreezeCallback: raw_norm needs an optimizer made by masked_adamw; leave it out")
            if any(map(in_engine, kwargs["model"].parameters())):
                raise ValueError(
                    "FreezeCallback: raw_norm needs frozen gradients, which are zeroed before DeepSpeed takes them "
                    "away; leave it out"
                )
            self._zeroes.watch_norms = True

    def _check_frozen(self, model: torch.nn.Module, optimizers: list[Any]) -> None:
        """Raise unless the optimizer freezes by this plan, or nothing that the plan names trains."""
        plans = [plan for one in optimizers if isinstance(one, MaskedAdam) and (plan := one.plan)]
        plans += [one.plan for optimizer in optimizers for one in guards_of(optimizer)]
        for plan in plans:
            if isinstance(plan, AdaptedPlan) and self.plan in (plan, plan.base):
                plan.check(model)  # adapters that were loaded meanwhile may be others
                self.plan = plan
                return
        together = functools.reduce(FreezePlan.__or__, plans, FreezePlan())
        if self.plan.fingerprint in (together.fingerprint, *(plan.fingerprint for plan in plans)):
            return
        if any(self.plan == keeper.base for one in optimizers for keeper in keepers_of(one)):
            return
        if plans:
            raise ValueError("FreezeCallback: the optimizer freezes by another plan, expected the same in both")
        for entry in bind(self.plan, named_tensors(model), operation="FreezeCallback", require_grad=False, absent=True):
            if entry.param.requires_grad and entry.mask.frozen_count:
                kind = type(optimizers[-1] if optimizers else None).__name__
                raise ValueError(
                    f"FreezeCallback: optimizer is of type {kind} and does not freeze: all of {entry.name!r} would "
                    "train, and this callback only proves; pass optimizer_cls_and_kwargs=masked_adamw(plan, args) to "
                    "Trainer, or optimizers=(optimizer, None) with a MaskedAdamW(..., freeze=plan) or after "
                    "guard(optimizer, plan, model)"
                )

    def _whole(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Within, what the plan names is whole, under DeepSpeed's ZeRO-3 too."""
        found = bind(self.plan, named_tensors(model), operation="FreezeCallback", require_grad=False, absent=True)
        return gathered([entry.param for entry in found])

    def _verify(self, model: torch.nn.Module) -> None:
        if self.proof is not None:
            with self._whole(model):
                self.proof.verify(model)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._verify(kwargs["model"])

    on_epoch_end = on_step_end  # Trainer saves after either

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._verify(kwargs["model"])
        if self._zeroes is not None:
            self._zeroes.watch_norms = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.proof is None:
            return
        digests: list[Any] = [self.proof.digest]
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            digests = [None] * distributed.get_world_size()
            distributed.all_gather_object(digests, self.proof.digest)
        folder = _checkpoint(args, state)
        if not state.is_world_process_zero or not folder.is_dir():
            return
        self.plan.save(folder / PLAN_FILE)
        if isinstance(self.plan, AdaptedPlan):
            self.plan.base.save(folder / BASE_PLAN_FILE)
        proof = {
            "version": 1,
            "verified": True,
            "step": state.global_step,
            "plan": self.plan.fingerprint,
            "frozen_elements": sum(mask.frozen_count for mask in self.plan.values()),
            "frozen_bytes_sha256": digests,
        }
        write_atomically(folder / PROOF_FILE, (json.dumps(proof, indent=2) + "\n").encode())

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        found = {"frozen_share": round(self.plan.frozen_fraction, 6)}
        norms = self._zeroes.norms if self._zeroes is not None else None
        if self._raw_norm and norms is not None and float(norms.live) > 0:
            # under a loss scale both norms are scaled; the logged one is not
            found["raw_grad_norm"] = float(logs.get("grad_norm", norms.live)) * float(norms.raw) / float(norms.live)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


class RefusalCallback(TrainerCallback):
    """Has a `RefusalWatch` look at the model before training and every few steps, logs what it finds, and stops
    training when the margin falls under the watch's floor.

    The log history gains entries with ``refusal_margin``, ``refusal_lowest`` and ``refusal_share``.

    Args:
        watch: what is measured, how often, and the floor.
        picture: a PNG file to draw the course into when training ends.
    """

    def __init__(self, watch: RefusalWatch, picture: str | os.PathLike[str] | None = None) -> None:
        self.watch, self.picture = watch, picture

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.watch.due(state.global_step)
        if not self.watch.look(kwargs["model"], state.global_step):
            control.should_training_stop = True
        if due:
            last = self.watch.history[-1]
            found = {"refusal_margin": last.margin, "refusal_lowest": last.lowest, "refusal_share": last.refused}
            state.log_history.append({**found, "epoch": state.epoch, "step": last.step})

    on_train_begin = on_step_end

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.picture is not None and state.is_world_process_zero:
            self.watch.save_picture(self.picture)


class KeeperCallback(TrainerCallback):
    """Has a `RefusalKeeper` keep the model refusing while Trainer trains it; saves it with each checkpoint, and goes on
    with it when training resumes from one.

    The log history gains an entry with ``keeper_margin`` and ``keeper_frozen`` for each look.

    Args:
        safety_batches: prompts with a refusal each, as `encode_pairs` makes them.
        picture: a PNG file to draw the course into when training ends.
        options: of `RefusalKeeper`; ``every`` counts optimizer steps, as Trainer does.

    Attributes:
        keeper: of the present training, or of the last.

    Raises:
        TypeError, ValueError: when training begins: as `RefusalKeeper`; a checkpoint that was saved without a keeper.
    """

    def __init__(
        self, safety_batches: Iterable[Mapping[str, Tensor]], *, picture: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.keeper: RefusalKeeper | None = None
        self.picture, self._batches, self._options = picture, list(safety_batches), options
        self._saving, self._told = contextlib.ExitStack(), 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.keeper = RefusalKeeper(kwargs["model"], kwargs.get("optimizer"), self._batches, **self._options)
        if state.global_step:
            path = _checkpoint(args, state) / KEEPER_FILE
            if not path.is_file():
                raise ValueError(
                    f"KeeperCallback: training resumes at step {state.global_step}, but there is no "
                    f"{os.fspath(path)!r}, expected what this callback saved with that checkpoint"
                )
            plan = FreezePlan.load(path)
            self.keeper.load_state_dict({**plan.metadata, "plan": plan})
        self._told = len(self.keeper.log)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._saving.close()  # if nothing was saved after all

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.keeper is None:
            return
        for look in self.keeper.log[self._told :]:
            found = {"keeper_margin": look.margin, "keeper_frozen": look.frozen}
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})
        self._told = len(self.keeper.log)
        self._save_at_base(args, state, control)

    def _save_at_base(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saving.close()
        if control.should_save and self.keeper is not None:  # Trainer loads it before this callback is asked
            self._saving.enter_context(self.keeper.at_base())

    on_epoch_end = _save_at_base

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saving.close()
        folder = _checkpoint(args, state)
        if self.keeper is None or not state.is_world_process_zero or not folder.is_dir():
            return
        about = self.keeper.state_dict()
        del about["plan"]
        FreezePlan(self.keeper.plan, about).save(folder / KEEPER_FILE)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._saving.close()
        if self.keeper is None:
            return
        self.keeper.remove()
        if self.picture is not None and state.is_world_process_zero and self.keeper.log:
            self.keeper.save_picture(self.picture)


def _checkpoint(args: Any, state: TrainerState) -> Path:
    """The folder of the checkpoint at this step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
