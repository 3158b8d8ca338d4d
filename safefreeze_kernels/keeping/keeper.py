"""`RefusalKeeper`: a closed loop that keeps a behaviour while a model trains."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..attribution.activations import evaluating, model_device
from ..attribution.batches import Pass, Pool
from ..attribution.grains import Grain, Grains
from ..attribution.saliency import Margin
from ..attribution.units import check_word
from ..model.attached import aside
from ..model.fsdp import reshard
from ..optim.adam import MaskedAdam
from ..optim.checks import all_names, all_params
from ..optim.direction import direction
from ..plan.binding import bind
from ..plan.mask import FreezeMask, unpack_bits
from ..plan.plan import FreezePlan
from ..proof.snapshot import Snapshot, snapshot
from .looks import KeeperLook, save_picture
from .ranks import ranks_of

Thawed = Literal["fresh", "kept"]
#: ``keep(model, batch)``: what is to be kept, a scalar or a value per row, higher is better.
Behaviour = Callable[[torch.nn.Module, Mapping[str, Any]], Tensor]

_VERSION: Final = 1
_LEAST, _MOST, _STRIDE = 0.02, 0.9, 1.5  # of a steered share: its bounds, and by what it changes at a look


class RefusalKeeper:
    """Keeps a model refusing while it is fine-tuned: weights whose updates would harm that most stand still for a few
    steps at a time.

    Every ``every`` optimizer steps it looks at the gradient of the refusal margin on calibration prompts (log-odds of
    the refusal's first token where each prompt ends), and at the optimizer's direction. The harm of a group of weights
    is Σ m̂/(√v̂ + eps) · lr · ∂margin/∂w, what the next update would take from the margin, to first order. The groups
    with most of it per weight, up to ``share`` of all weights, are frozen until the next look, beside the base plan.
    Data and loss are not touched; frozen bytes stay as they are, as under any plan.

    It acts by itself, after the steps of the optimizer: after those that are taken, whatever accumulates gradients
    before them or skips them. A look costs one forward and one backward pass of ``prompts`` prompts, without their
    responses, in eval mode; gradients, hooks, dropout and random numbers of the training are left as they are. Each
    gradient is reduced as it appears and dropped: to sums per group, or 16 bits per weight for single elements.

    Under DDP every rank runs all prompts of a look, and what the first finds holds. Under FSDP2 (HSDP too) each rank
    runs its share of them, through the sharded model; margin and gradients are means over all prompts, groups are
    chosen among those of the whole model, and every rank freezes the same.

    What is known, in a miniature (examples/study; 20 seeds, a model of 287,000 parameters): of the refusals that
    fine-tuning loses, 20% of single elements every 4 steps kept all, in as many steps; rows every 4 steps at half the
    rate 94%, 30% of them 96%; as many random elements 10%, at half the rate 41%; half the rate alone 16%, four safety
    rows mixed into 32 88%. Single elements keep most, rows cost least. On SmolLM2-135M (8 seeds) single elements kept
    all, but harmless questions were refused as well (29%; steered to 80% of the margin 9%, with 96% of refusals left).
    Nothing is known of larger models.

    Args:
        model: that trains; under DDP or `torch.compile` either it or the wrapper; for FSDP2 sharded before.
        optimizer: a `MaskedAdamW` or `MaskedAdam` with its parameters, by name.
        safety_batches: prompts with a refusal each, as `encode_pairs` makes them; read once. With ``keep``, what that
            is to be given.
        every: steps between two looks.
        share: of the weights that train, how much stands still; above 0, below 1.
        grain: ``"row"``, ``"unit"`` or ``"element"``: what is frozen together; see `Grains`.
        keep: instead of the refusal margin, any differentiable behaviour: ``keep(model, batch)`` returns a scalar or a
            value per row, higher is better. ``batch`` holds ``prompts`` rows of ``safety_batches``, whole, on the
            model's device. Under FSDP2 these are the rank's share of them, at least one, and a scalar counts as the
            mean over its rows.
        base: frozen throughout; default: what the optimizer freezes now.
        prompts: rows of a look, drawn anew each time; all, if there are no more.
        steer: let the share grow and shrink between 2% and 90%, by half at each look, so that the margin stays above
            this part of what it was before training.
        thawed: what a group that thaws starts with: ``"fresh"`` moments, or those it ``"kept"``.
        prove: at each look, prove that the bytes frozen at the one before have not changed.
        random: the control: freeze as many groups at random instead, in the same tensors.
        seed: of the prompts, and of ``random``.

    Attributes:
        base: the base plan.
        log: a `KeeperLook` for each look.
        first_margin: the margin before training.

    Raises:
        TypeError: an optimizer that does not freeze; batches that are none.
        ValueError: an optimizer of another model, options out of range, a prompt longer than the model allows, a model
            that is sharded otherwise than by FSDP2 alone. From the optimizer's step, at a look: a margin that is NaN,
            or whose gradient is 0. From `look`, under FSDP2: gradients that wait to be exchanged.
        FrozenDriftError: from the step, with ``prove``.

    Warns:
        UserWarning: the margin is below 0 to begin with: nothing is refused that could be kept.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Any, safety_batches: Iterable[Mapping[str, Tensor]], *, every: int = 8,
        share: float = 0.2, grain: Grain = "row", keep: Behaviour | None = None, base: FreezePlan | None = None,
        prompts: int = 32, steer: float | None = None, thawed: Thawed = "fresh", prove: bool = False,
        random: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        what = type(self).__name__
        for word, number in (("every", every), ("prompts", prompts)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{what}: {word} is {number!r}, expected a whole number of at least 1")
        for word, part in (("share", share), ("steer", 0.5 if steer is None else steer)):
            if not 0 < part < 1:
                raise ValueError(f"{what}: {word} is {part!r}, expected a fraction between 0 and 1")
        check_word(what, "thawed", thawed, get_args(Thawed))
        self.every, self.share, self.steer, self.prompts = every, share, steer, prompts
        self.thawed, self.prove, self.random, self.seed = thawed, prove, random, seed
        self.model, self.optimizer = _bare_model(model), _bare_optimizer(optimizer, what)
        reshard(self.model)
        self._names = _names_in(self.optimizer, self.model, what)
        self._ranks = ranks_of(self.model, what)
        self.grains = Grains.of(self.model, grain, self._names)
        self._keep, self._margin = keep, Margin(None, None)
        self._pool = Pool(safety_batches, "safety_batches", labelled=keep is None, prompts=keep is None)
        most = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if isinstance(most, int) and self._pool.longest > most:
            raise ValueError(
                f"{what}: safety_batches has a row of {self._pool.longest} tokens, expected at most {most}, which the "
                "model was made for (max_position_embeddings); shorten or drop it"
            )
        self._draw = np.random.default_rng(seed)
        self.base = (self.optimizer.plan or FreezePlan()) if base is None else base
        self._steps, self.log = 0, list[KeeperLook]()
        self._proof: Snapshot | None = None
        one, counts = self._rows()
        with torch.no_grad(), self._at_rest():
            (self.first_margin,), _ = self._ranks.agreed([self._value(self.model, one) * counts], {})
        self._check_margin(self.first_margin)
        if keep is None and self.first_margin < 0:
            warnings.warn(
                f"{what}: the margin is {self.first_margin:.2f} on average before training, below 0: the model does "
                "not refuse these prompts, and there is little to keep; pass prompts with its own refusals of them",
                UserWarning, stacklevel=2,
            )  # fmt: skip
        self._freeze(self.base)
        self._hook = self.optimizer.register_step_post_hook(self._after_step)

    # -- the loop --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> FreezePlan:
        """What is frozen until the next look, the base plan included."""
        return self.optimizer.plan or FreezePlan()

    @property
    def floor(self) -> float | None:
        """The margin that a steered share is to keep; None: it is not steered."""
        return None if self.steer is None else self.first_margin - (1 - self.steer) * abs(self.first_margin)

    def remove(self) -> None:
        """Look no more, and freeze the base plan alone."""
        self._hook.remove()
        self._freeze(self.base)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and skipped.item():
            return
        self._steps += 1
        if self._steps % self.every == 0:
            self.look()

    def look(self) -> KeeperLook:
        """Look now, whether it is due or not, and freeze what does most harm."""
        started = time.perf_counter()
        reshard(self.model)
        if self._proof is not None:
            self._proof.verify(self.model)
        margin, harm = self._harm()
        if self.floor is not None:
            self.share = min(self.share * _STRIDE, _MOST) if margin < self.floor else max(self.share / _STRIDE, _LEAST)
        seed = (self.seed, len(self.log)) if self.random else None
        plan = self.base | self.grains.plan(harm, self.share, seed=seed)
        self._freeze(plan)
        self._proof = snapshot(self.model, plan) if self.prove else None
        self.log.append(
            KeeperLook.of(
                plan, self.grains.shapes, step=self._steps, margin=margin, share=self.share,
                seconds=time.perf_counter() - started,
            )
        )  # fmt: skip
        return self.log[-1]

    def _freeze(self, plan: FreezePlan, thawed: Thawed | None = None) -> None:
        self.optimizer.set_freeze(plan, keep_state=True, thawed=thawed or self.thawed)

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Within, the optimizer freezes the base plan alone, and nothing else of it changes: a state dict that it gives
        can be loaded before there is a keeper."""
        plan = self.plan
        self._freeze(self.base, "kept")
        try:
            yield
        finally:
            self._freeze(plan)

    def _rows(self) -> tuple[Pass, float]:
        """What this rank runs of a look's rows, and how much the mean over them counts."""
        count = min(self.prompts, len(self._pool))
        rows, counts = self._ranks.share(self._draw.choice(len(self._pool), count, replace=False).tolist())
        return self._pool.take(rows), counts

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """For a pass that is no training: eval mode, random numbers of its own, no hooks of ours."""
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with evaluating(self.model), aside(self.model), torch.random.fork_rng(devices=sorted(devices, key=str)):
            try:
                yield
            finally:
                reshard(self.model)

    def _value(self, model: torch.nn.Module, one: Pass) -> Tensor:
        """The mean of what is to be kept."""
        if self._keep is None:
            return self._margin.of(model, one).mean()
        device = model_device(model)
        labels = {} if one.labels is None else {"labels": one.labels.to(device)}
        found = self._keep(model, {**one.on(device), **labels})
        if not isinstance(found, Tensor) or found.dim() > 1 or not found.is_floating_point() or not found.numel():
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"RefusalKeeper: keep returned {got}, expected a scalar tensor or one value per row")
        return found.mean()

    def _harm(self) -> tuple[float, Mapping[str, Tensor]]:
        """The margin, and what the next update takes from it: reduced, by name."""
        named, found = dict(self.model.named_parameters()), dict[str, Tensor]()
        rates = _rates(self.optimizer)
        learns = [torch.zeros((), dtype=torch.bool, device=model_device(self.model))]

        def take(name: str, _: Tensor, gradient: Tensor) -> None:
            learns.append(gradient.any())
            heading = direction(self.optimizer, named[name], self._names[name])
            if heading is not None:
                harm = heading.mul_(gradient).mul_(rates[named[name]])
                found[name] = self._ranks.reduce(self.grains, name, named[name], harm)

        def value(model: torch.nn.Module) -> Tensor:
            margin = self._value(model, one)
            if not margin.requires_grad:
                raise ValueError(
                    "RefusalKeeper: keep returned a value without a graph, expected one derived of the model"
                )
            return margin * counts

        one, counts = self._rows()
        with self._at_rest():
            mean = self._ranks.stream(self.model, self.grains.shapes, value, take)
        for name in self.grains.shapes.keys() - found.keys():
            found[name] = self._ranks.reduce(self.grains, name, named[name], None)
        any_learns = torch.stack([one.to(mean.device) for one in learns]).any().to(mean.dtype)
        (margin, learning), reduced = self._ranks.agreed(
            [mean, any_learns], {name: found[name] for name in self.grains.shapes}
        )
        self._check_margin(margin)
        if not learning:
            raise ValueError(
                f"RefusalKeeper: the margin is flat: its gradient is 0 for every weight at step {self._steps} (it is "
                f"{margin:.3g}), expected one that tells weights apart; does it depend on weights that train?"
            )
        return margin, reduced

    def _check_margin(self, margin: float) -> None:
        if not math.isfinite(margin):
            raise ValueError(
                f"RefusalKeeper: the margin is {margin} at step {self._steps}, expected a number; has training "
                "diverged?"
            )

    # -- what is kept of it ----------------------------------------------------------------------------------

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the margin and the frozen share over steps, and in which modules it lay, into a PNG file.

        Raises:
            ValueError: there was no look yet.
        """
        if not self.log:
            raise ValueError("RefusalKeeper.save_picture: there was no look yet; the first is after `every` steps")
        save_picture(self.log, self.first_margin, self.floor, path)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values: steps, share, plan, log, random numbers."""
        return {
            "version": _VERSION, "steps": self._steps, "share": self.share, "first_margin": self.first_margin,
            "draw": self._draw.bit_generator.state, "base": self.base.fingerprint,
            "log": [asdict(one) for one in self.log],
            "plan": {name: _written(mask) for name, mask in self.plan.items()},
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the optimizer freezes what it froze then.

        Call it before the optimizer's own ``load_state_dict``, whose state is packed by that plan.

        Raises:
            ValueError: another base plan or model, or no state of a keeper. Nothing was changed then.
        """
        what = "RefusalKeeper.load_state_dict"
        try:
            if state_dict["version"] != _VERSION:
                raise ValueError(f"version {state_dict['version']}, this package reads {_VERSION}")
            plan = FreezePlan(
                (name, entry if isinstance(entry, FreezeMask) else _read(entry))
                for name, entry in state_dict["plan"].items()
            )
            log = [KeeperLook(**one) for one in state_dict["log"]]
            draw = np.random.default_rng()
            draw.bit_generator.state = state_dict["draw"]
            steps, share = int(state_dict["steps"]), float(state_dict["share"])
            first, base = float(state_dict["first_margin"]), state_dict["base"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{what}: not the state of a keeper ({error!r})") from error
        if base != self.base.fingerprint:
            raise ValueError(f"{what}: it was saved with another base plan, expected the same: pass base=")
        if plan | self.base != plan:
            raise ValueError(f"{what}: its plan does not freeze the base plan; it is damaged")
        self._freeze(plan)
        self._steps, self.share, self.first_margin, self.log, self._draw = steps, share, first, log, draw
        self._proof = snapshot(self.model, plan) if self.prove and log else None

    def __repr__(self) -> str:
        last = f"margin {self.log[-1].margin:.2f}, {self.log[-1].frozen:.1%} frozen" if self.log else "no look yet"
        return f"RefusalKeeper({self.grains.grain}, every {self.every} steps: {last})"


def keepers_of(optimizer: Any) -> list[RefusalKeeper]:
    """The keepers that act after the steps of an optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {}).values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, RefusalKeeper)]


def _bare_model(model: torch.nn.Module) -> torch.nn.Module:
    """A model without the wrappers of DDP, DataParallel and `torch.compile`, whose passes are for training."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"RefusalKeeper: model is a {type(model).__name__}, expected a torch.nn.Module")
    wrappers = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while (inner := model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def _bare_optimizer(optimizer: Any, what: str) -> MaskedAdam:
    """An optimizer without what wraps it, as accelerate's does."""
    inner = optimizer
    while not isinstance(inner, MaskedAdam):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"{what}: optimizer is a {type(optimizer).__name__}, which does not freeze; build it as "
                "MaskedAdamW(model.named_parameters(), …)"
            )
    return inner


def _names_in(optimizer: MaskedAdam, model: torch.nn.Module, what: str) -> dict[str, str]:
    """Name in the model -> name in the optimizer, of every parameter that trains and that both have.

    Raises:
        ValueError: they have none in common, or the optimizer does not know names.
    """
    groups = optimizer.param_groups
    held = dict(zip(map(id, all_params(groups)), all_names(groups), strict=True))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = {name: held[id(p)] for name, p in named if id(p) in held}
    if not names:
        raise ValueError(
            f"{what}: optimizer has none of the {len(named)} parameters of the model that train, expected the "
            "optimizer that trains this model; was the model replaced, moved or wrapped after it was built?"
        )
    masks = {name: FreezeMask(p.shape) for name, p in named if name in names}
    if any(group.get("param_names") is None for group in groups):
        raise ValueError(f"{what}: the optimizer's parameters have no names, expected model.named_parameters()")
    bind(masks, list(zip(all_names(groups), all_params(groups), strict=True)), operation=what)
    return names


def _rates(optimizer: MaskedAdam) -> dict[Tensor, float]:
    """The learning rate of each parameter, as a part of the highest; 1 where all are 0."""
    rates = [(p, float(group["lr"])) for group in optimizer.param_groups for p in group["params"]]
    most = max(rate for _, rate in rates)
    return {p: rate / most if most else 1.0 for p, rate in rates}


def _written(mask: FreezeMask) -> dict[str, Any]:
    """A mask as tensors and plain values, for a state dict."""
    bits = mask.bits
    return {
        "shape": list(mask.shape), "rows": mask.rows, "cols": mask.cols,
        "bits": None if bits is None else torch.from_numpy(bits.copy()),
    }  # fmt: skip


def _read(entry: Mapping[str, Any]) -> FreezeMask:
    """The inverse of `_written`."""
    shape, bits = tuple(entry["shape"]), entry["bits"]
    elements = None if bits is None else unpack_bits(bits.numpy(), shape)
    return FreezeMask(shape, entry["rows"], entry["cols"] if len(shape) > 1 else None, elements)
