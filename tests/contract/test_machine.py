"""Random training programs: whatever is done in whatever order, frozen bytes stay, backends agree bit for bit, and what
comes out is what `oracle.Weight` says, or an error before anything changed. "No error, and not equal" is the failure.

A program is any sequence of what a training script may do: run backward, accumulate, clip (in both ways), step, skip,
change the plan, save and load, copy, grow, rewrite weights, compute live gradients only. It runs on every backend
here at once. Frozen gradients hold NaN and worse throughout.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import os
import pickle
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pytest
import torch
from conftest import BACKENDS as CHOSEN
from conftest import LOCAL, assert_same_bits, assert_same_state, bits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import Weight, rounded_master
from ranks import run_ranks
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.model.packed import PackedGradient

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

BACKENDS: Final = tuple(dict.fromkeys((*LOCAL, *CHOSEN)))
FIRST, *OTHERS = BACKENDS
SHAPES: Final = {"up.weight": (7, 9), "wide.weight": (3, 40), "vector": (6,), "cube": (2, 3, 4)}
DOUBLE: Final = {"exact": (4, 3)} if set(BACKENDS) == set(LOCAL) else {}  # GPU kernels take no float64
SEEDS: Final = st.integers(0, 2**16)
RARE: Final = np.array([math.nan, math.inf, -math.inf, -0.0, 1e-41, 6e-8, 65519.0, -3e38], np.float32)
KINDS: Final = (
    (torch.float32, {}), (torch.float32, {"amsgrad": True}), (torch.float32, {"capturable": True}),
    (torch.float32, {"state_dtype": torch.bfloat16}), (torch.float16, {}), (torch.bfloat16, {}),
    (torch.bfloat16, {"master": "remainder"}), (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.float32, {"state_dtype": torch.int8}), (torch.bfloat16, {"master": "remainder", "state_dtype": torch.int8}),
)  # fmt: skip


def values(rng: np.random.Generator, shape: tuple[int, ...], rare: float) -> Tensor:
    drawn = rng.standard_normal(shape).astype(np.float32)
    return torch.from_numpy(np.where(rng.random(shape) < rare, rng.choice(RARE, shape), drawn).astype(np.float32))


def mask(rng: np.random.Generator, shape: tuple[int, ...], elements: float = 0.3) -> sf.FreezeMask:
    rows, cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 0)
    share = rng.choice([0.1, 0.5, 1.0], p=[0.5, 0.4, 0.1])
    return sf.FreezeMask(
        shape,
        rows=rng.random(rows) < share if rng.random() < 0.6 else None,
        cols=rng.random(cols) < share if cols and rng.random() < 0.4 else None,
        elements=rng.random(shape) < share if rng.random() < elements else None,
    )


def network(start: dict[str, Tensor]) -> nn.Module:
    net = nn.Module()
    for name, value in start.items():
        home, _, leaf = name.rpartition(".")
        if home:
            rows, cols = value.shape
            setattr(net, home, nn.Linear(cols, rows, bias=False, device="meta"))
        setattr(getattr(net, home) if home else net, leaf or name, nn.Parameter(value.clone()))
    return net


def dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if isinstance(grad, PackedGradient) else grad.detach().clone()


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers do: other weights to look at than to train, exchanged in place."""

    def eval(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.5)

    def train(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(2.0)


def _note(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bool]:
    def damage(state: dict[str, Any]) -> bool:
        group = state["param_groups"][0]
        if "freeze" not in group:
            return False
        note = json.loads(group["freeze"])
        found = change(note)
        group["freeze"] = found if isinstance(found, (str, int)) else json.dumps(note)
        return True

    return damage


def _ages(change: Callable[[list[str]], Any]) -> Callable[[dict[str, Any]], bool]:
    def damage(state: dict[str, Any]) -> bool:
        found = False
        for group in state["param_groups"]:
            note = json.loads(group.get("freeze", '{"ages": {}}'))
            for ages in note["ages"].values():
                change(ages)
                found = True
            group["freeze"] = json.dumps(note)
        return found

    return damage


def _older(ages: list[str]) -> None:
    years = zlib.decompress(base64.b64decode(ages[0]))
    ages[0] = base64.b64encode(zlib.compress((10**6).to_bytes(8, "little") * (len(years) // 8))).decode()


def _entry(key: str, value: Any) -> Callable[[dict[str, Any]], bool]:
    def damage(state: dict[str, Any]) -> bool:
        for entry in state["state"].values():
            entry[key] = value
            return True
        return False

    return damage


def _group(key: str, value: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda state: [state["param_groups"][0].update({key: value})] != []


DAMAGES: Final = (
    _note(lambda note: note.update(masks=[])), _note(lambda note: note.update(ages=None)),
    _note(lambda note: note.update(packed="no")), _note(lambda note: note.update(version="1")),
    _note(lambda note: note.update(masks={"99": "x"})), _note(lambda note: note.update(ages={"0": []})),
    _note(lambda note: "[]"), _note(lambda note: "x"), _note(lambda note: 7), _note(lambda note: "[" * 9999),
    _ages(_older), _ages(lambda ages: ages.clear()), _ages(lambda ages: ages.insert(0, "?")),
    _ages(lambda ages: ages.__setitem__(1, "AAAA")),
    _entry("step", math.nan), _entry("step", -1.0), _entry("step", math.inf), _entry("step", 1e30), _entry("step", "1"),
    _entry("step", torch.ones(2)), _entry("exp_avg", None), _entry("exp_avg", [0.0]), _entry("exp_avg_sq", 3),
    _entry("exp_avg", torch.zeros(99)), _entry("exp_avg_sq", torch.zeros(2, dtype=torch.int64)),
    _group("lr", math.nan), _group("lr", "fast"), _group("lr", None), _group("betas", 0.9), _group("betas", (0.9, 2.0)),
    _group("eps", -1.0), _group("weight_decay", [0.1]), _group("amsgrad", "no"), _group("params", None),
    lambda state: [state.pop("state")] != [], lambda state: [state.update(param_groups={})] != [],
)  # fmt: skip


class Training(RuleBasedStateMachine):
    """The same program on each backend (`nets` and `optimizers` by backend) and by the oracle (`weights` by name)."""

    programs = 0
    steps = 0

    @initialize(kind=st.sampled_from(KINDS), adam=st.booleans(), seed=SEEDS)
    def begin(self, kind: tuple[torch.dtype, dict[str, Any]], adam: bool, seed: int) -> None:
        Training.programs += 1
        dtype, self.options = kind
        self.make = sf.MaskedAdam if adam else sf.MaskedAdamW
        self.settings = {"lr": 1e-2, "weight_decay": 0.1, **self.options}
        self.kind = {"decoupled": not adam, **{key: key in self.options for key in ("amsgrad", "capturable")}}
        self.plan, self.keep = sf.FreezePlan(), False
        rng = np.random.default_rng(seed)
        start = {name: values(rng, shape, 0.1).to(dtype) for name, shape in SHAPES.items()}
        start |= {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in DOUBLE.items()}
        self.names = [list(start)]  # of each group
        self.nets = {b: network(start) for b in BACKENDS}
        self._params: dict[str, Any] = {}
        self.weights = {name: self.weight(value) for name, value in start.items()}
        self.live: dict[str, Any] = {}
        self.left: dict[str, Any] = {}  # gradients that live gradients left behind
        self.pending: tuple[Tensor, list[Any], bool] | None = None
        self.optimizers = {b: self.fresh(b) for b in BACKENDS}
        self.remember()

    def weight(self, value: Tensor) -> Weight:
        has_master = "master" in self.options and value.dtype == torch.bfloat16
        return Weight(
            value.clone(), torch.zeros(value.shape, dtype=torch.bool), self.options.get("state_dtype", torch.float32),
            value.float() if has_master else None,
        )  # fmt: skip

    def fresh(self, backend: str) -> Any:
        params = dict(self.nets[backend].named_parameters())
        groups = [{"params": [(name, params[name]) for name in names]} for names in self.names]
        name = "auto" if DOUBLE and backend == "cpu" else backend
        return self.make(groups, freeze=self.plan, backend=name, **self.settings)

    def params(self, backend: str = FIRST) -> dict[str, Tensor]:
        net, size, known = self._params.get(backend, (None, 0, {}))
        if net is not self.nets[backend] or size != len(self.weights):
            known = dict(self.nets[backend].named_parameters())
            self._params[backend] = self.nets[backend], len(known), known
        return known

    def frozen(self, name: str) -> Tensor:
        return self.weights[name].frozen

    def remember(self) -> None:
        """What is frozen from now on has these bytes. (A live NaN may be another NaN on another backend.)"""
        self.kept = {b: {n: p.detach().clone() for n, p in self.params(b).items()} for b in BACKENDS}

    def gradients(self) -> list[Any]:
        return [(p.grad, p.grad._version) for p in self.params().values() if p.grad is not None]

    def twins(self, backend: str) -> tuple[nn.Module, Any]:
        """Copies of net and optimizer, with the gradients."""
        net, optimizer = copy.deepcopy((self.nets[backend], self.optimizers[backend]))
        for (_, p), (_, q) in zip(self.nets[backend].named_parameters(), net.named_parameters(), strict=True):
            q.grad = None if p.grad is None else dense(p.grad)
        return net, optimizer

    # -- gradients -------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, missing=st.booleans(), rare=st.sampled_from([0.0, 0.0, 0.02, -1.0]), inplace=st.booleans())
    def learn(self, seed: int, missing: bool, rare: float, inplace: bool = False) -> None:
        """Gradients, added to those that are there; anything at all where frozen; ``rare`` < 0: zeros."""
        rng = np.random.default_rng(seed)
        for name, weight in self.weights.items():
            shape = tuple(weight.value.shape)
            grad = values(rng, shape, max(rare, 0.0)) * float(rare >= 0)
            grad[weight.frozen] = torch.from_numpy(rng.choice(RARE, shape).astype(np.float32))[weight.frozen]
            if missing and rng.random() < 0.3:
                continue
            for b in BACKENDS:
                p = self.params(b)[name]
                new = grad.to(p.dtype)
                if not p.requires_grad:
                    continue
                if p.grad is None or isinstance(p.grad, PackedGradient):
                    p.grad = new.clone()
                elif inplace:
                    p.grad.add_(new)
                else:
                    p.grad = p.grad + new

    @rule(seed=SEEDS)
    def backward(self, seed: int) -> None:
        """A pass through the linear layers; with live gradients, some of their gradients are not computed."""
        self.live |= {"ran": True} if self.live else {}
        for b in BACKENDS:
            rng, net = np.random.default_rng(seed), self.nets[b]
            for name in ("up", "wide"):
                layer, packed = getattr(net, name), self.storage(f"{name}.weight") == "packed"
                p = layer.weight
                if p.grad is not None and isinstance(p.grad, PackedGradient) != packed:
                    p.grad = None
                if isinstance(p.grad, PackedGradient) and p.grad.mask != self.live["plan"][f"{name}.weight"]:
                    p.grad = None
                layer(values(rng, (4, p.shape[1]), 0.0).to(p.dtype)).square().sum().backward()

    def storage(self, name: str) -> str:
        """Of live gradients of this weight; "": it has ordinary ones."""
        return self.live["storage"] if self.live and name in self.live["names"] else ""

    @rule(seed=SEEDS, storage=st.sampled_from(["dense", "packed"]), which=st.sampled_from(["same", "same", "other"]))
    def live_on(self, seed: int, storage: Any, which: str) -> None:
        self.live_off()
        rng = np.random.default_rng(seed)
        names = ("up.weight", "wide.weight")
        other = {name: mask(rng, tuple(self.weights[name].value.shape), 0.0) for name in names}
        same = {name: m for name, m in self.plan.items() if name in names}
        plan = sf.FreezePlan(same if which == "same" else other)
        handles = {b: sf.live_gradients(self.nets[b], plan, storage=storage, most_live=1.0) for b in BACKENDS}
        done = {layer.name for layer in handles[FIRST].layers if not layer.left_alone}
        self.live = {"handles": handles, "storage": storage, "plan": plan, "names": done, "ran": False}
        self.look_at_a_copy("pickle" if seed % 2 else "deepcopy")  # which must not have them

    @precondition(lambda self: self.live)
    @rule()
    def live_off(self) -> None:
        for handle in (self.live or {"handles": {}})["handles"].values():
            handle.remove()
        for name in self.live.get("names", ()):
            grad = self.params()[name].grad
            if grad is not None and self.live["ran"] and self.live["storage"] == "dense":
                self.left[name] = grad, grad._version, self.live["plan"][name].dense()
        self.live = {}

    def troubles(self) -> set[type[Exception]]:
        """Which errors the next step must raise; none: it must succeed."""
        found: set[type[Exception]] = set()
        for name, p in self.params().items():
            frozen, grad = self.frozen(name), p.grad
            if self.storage(name):
                lacking = self.live["plan"][name].dense()
                wrong = (lacking != frozen) if self.storage(name) == "packed" else (lacking & ~frozen)
                found |= {ValueError} if wrong.any() else set()
            if isinstance(grad, PackedGradient):
                found |= {ValueError} if (grad.mask.dense() != frozen).any() else set()
            elif grad is not None and name in self.left:
                left, version, lacking = self.left[name]
                same = left is grad and version == grad._version
                found |= {ValueError} if same and (lacking & ~frozen).any() else set()
        found |= {ValueError} if self.keep and self.packs() else set()
        if self.pending is not None:
            _, gradients, void = self.pending
            now = self.gradients()
            same = len(now) == len(gradients) and all(
                a is c and b == d for (a, b), (c, d) in zip(gradients, now, strict=True)
            )
            some = any(a is c for a, _ in gradients for c, _ in now)
            if (same and void) or (some and not same):
                found.add(RuntimeError)
            elif not same:
                self.pending = None  # they are gone, and the factor with them
        return found

    def packs(self) -> bool:
        """Whether gradients are packed, or will be."""
        return any(self.storage(n) == "packed" or isinstance(p.grad, PackedGradient) for n, p in self.params().items())

    @precondition(lambda self: any(p.grad is not None for p in self.params().values()))
    @rule(largest=st.sampled_from([0.05, 1.0, 1e9]), inside=st.booleans())
    def clip(self, largest: float, inside: bool) -> None:
        net, optimizer, params = self.nets[FIRST], self.optimizers[FIRST], self.params()
        if ValueError in self.troubles() or any(not p.requires_grad for p in params.values()):
            return
        live = [dense(p.grad)[~self.frozen(n)].double() for n, p in params.items() if p.grad is not None]
        exact = math.sqrt(math.fsum((torch.cat(live) ** 2).tolist())) if live else 0.0
        if torch.float64 not in {p.grad.dtype for p in params.values() if p.grad is not None}:
            exact = torch.tensor(exact, dtype=torch.float64).float().item()  # which overflows where the norm does
        name = optimizer._settings.backend
        norm = sf.clip_grad_norm_(
            net, largest, self.plan, optimizer=optimizer if inside else None, backend=name
        ).item()  # fmt: skip
        if math.isfinite(exact):
            assert norm == pytest.approx(exact, rel=1e-6), "norm of live gradients"
        else:
            assert not math.isfinite(norm)
        if inside:
            self.pending = optimizer._pending.factor, self.gradients(), False
        for b in OTHERS:  # norms of backends agree to rounding alone, so the factor is the first's
            if inside:
                self.optimizers[b].multiply_gradients_(optimizer._pending.factor)
            else:
                for name, p in params.items():
                    other = self.params(b)[name]
                    if p.grad is None:
                        other.grad = None
                    elif isinstance(p.grad, PackedGradient):
                        other.grad.packed.copy_(p.grad.packed)
                        other.grad.mul_(1.0)
                    else:
                        other.grad.copy_(p.grad)

    @rule(set_to_none=st.booleans(), by=st.sampled_from(["optimizer", "model"]))
    def forget(self, set_to_none: bool, by: str) -> None:
        for b in BACKENDS:
            (self.optimizers if by == "optimizer" else self.nets)[b].zero_grad(set_to_none)
        if by == "optimizer":
            self.pending = None

    @precondition(lambda self: not any(isinstance(p.grad, PackedGradient) for p in self.params().values()))
    @rule()
    def zero_frozen(self) -> None:
        if any(not p.requires_grad for p in self.params().values()):
            return
        for b in BACKENDS:
            params = self.params(b)
            before = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
            sf.zero_frozen_grads_(params, self.plan, backend=self.optimizers[b]._settings.backend)
            for name, old in before.items():
                now, still = params[name].grad, self.frozen(name)
                assert_same_bits(now, torch.zeros_like(now), f"frozen gradient of {name}", where=still)
                assert_same_bits(now, old, f"live gradient of {name}", where=~still)

    # -- steps -----------------------------------------------------------------------------------------------------

    @rule(skipped=st.sampled_from([False, False, False, True]), scale=st.sampled_from([None, 8.0]))
    def step(self, skipped: bool, scale: float | None) -> None:
        Training.steps += 1
        expected = self.troubles() if not skipped or "capturable" in self.options else set()
        multiplier = None if scale is None else 1.0 / torch.tensor(scale)
        if self.pending is not None:
            factor = self.pending[0]
            multiplier = factor if multiplier is None else multiplier * factor
        for b, optimizer in self.optimizers.items():
            optimizer.found_inf = torch.tensor(float(skipped))
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            if expected:
                before = copy.deepcopy(optimizer.state_dict())
                with pytest.raises(tuple(expected)):
                    optimizer.step()
                assert_same_state(optimizer.state_dict(), before, f"{b}: state after an error")
            else:
                optimizer.step()
        if expected:  # parameters are looked at by the invariants
            self.live_off()
            self.forget(True, "optimizer")
            return
        if not skipped:
            self.expect({n: dense(p.grad) for n, p in self.params().items() if p.grad is not None}, multiplier)
        self.pending = None

    def expect(self, grads: dict[str, Tensor], multiplier: Tensor | None) -> None:
        """The oracle takes the step that was taken with these gradients."""
        for name, grad in grads.items():
            weight, p = self.weights[name], self.params()[name]
            options = next(
                g for g, ns in zip(self.optimizers[FIRST].param_groups, self.names, strict=True) if name in ns
            )
            number = [n for names in self.names for n in names].index(name)
            weight.step(grad, options, multiplier, self.kind, number)
            if "rounding" in self.options and p.dtype in (torch.bfloat16, torch.float16):
                weight.value = torch.where(weight.frozen, weight.value, p.detach())

    @rule(seed=SEEDS, missing=st.booleans(), before=st.booleans())
    def train_inside(self, seed: int, missing: bool, before: bool) -> None:
        """A step inside the backward pass, after a pass outside if ``before``. The oracle takes an ordinary one."""
        self.forget(True, "optimizer")
        self.learn(seed, missing, 0.0)
        given = {b: {n: p.grad for n, p in self.params(b).items() if p.grad is not None} for b in BACKENDS}
        expected, outside = {n: grad.clone() for n, grad in given[FIRST].items()}, dict[str, Tensor]()
        troubles = self.troubles()
        self.forget(True, "optimizer")
        if troubles or not expected:
            return
        Training.steps += 1
        if before:
            self.learn(seed + 1, True, 0.0)
            outside = {n: p.grad.clone() for n, p in self.params().items() if p.grad is not None}
        for b, optimizer in self.optimizers.items():
            params = self.params(b)
            with sf.step_in_backward(self.nets[b], optimizer):
                # each parameter's gradient is what it is multiplied with
                torch.stack([(params[n] * grad).double().sum() for n, grad in given[b].items()]).sum().backward()
            assert all(p.grad is None for p in params.values())
        sums = {n: outside[n] + expected[n] if n in outside and n in expected else grad
                for n, grad in (expected | outside).items()}  # fmt: skip
        self.expect(sums, None)

    @rule(seed=SEEDS, count=st.integers(1, 4), skipped=st.sampled_from([False, False, True]))
    def train(self, seed: int, count: int, skipped: bool) -> None:
        for number in range(count):
            self.learn(seed + number, number == 1, 0.0)
            self.step(skipped and number == 2, None)
            self.forget(True, "optimizer")

    @rule(seed=SEEDS, clipped=st.booleans(), by=st.sampled_from(["optimizer", "model"]))
    def train_as_scripts_do(self, seed: int, clipped: bool, by: str) -> None:
        """Most of what a program does; so this is a rule of its own, drawn beside the single ones."""
        for number in range(2):
            self.learn(seed + number, False, 0.0)
            self.backward(seed + number)
            if clipped and any(p.grad is not None for p in self.params().values()):
                self.clip(1.0, inside=number == 0)
            self.step(False, None)
            self.forget(True, by)

    @rule(seed=SEEDS, what=st.sampled_from(["plan", "group", "gradients", "skip", "nothing"]))
    def change_after_clip(self, seed: int, what: str) -> None:
        """What the factor depends on changes before the step."""
        self.live_off()
        self.learn(seed, False, 0.0)
        self.clip(0.5, True)
        if what == "plan":
            self.freeze(seed, "new")
        elif what == "group" and len(self.names) < 3:
            self.add_group(seed)
        elif what == "gradients":
            self.learn(seed + 1, False, 0.0, True)
        elif what == "skip":
            self.forget(True, "model")
            self.learn(seed + 1, False, 0.0)
        self.step(False, None)

    @rule(seed=SEEDS)
    def live_in_mid_run(self, seed: int) -> None:
        """Live gradients of any plan go on when a step was taken."""
        self.live_off()
        self.train(seed, 1, False)
        self.live_on(seed, "dense", "other")
        self.backward(seed)
        self.step(False, None)

    @rule(seed=SEEDS)
    def threads(self, seed: int) -> None:
        """Two optimizers that step at once disturb neither each other nor the one they were copied from."""
        if self.live or self.left or self.pending is not None:
            return
        pairs = [self.twins(b) for b in BACKENDS for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: [pair[1].step() for _ in range(2)], pairs))
        for (one, _), (other, _) in zip(pairs[::2], pairs[1::2], strict=True):
            for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
                assert_same_bits(p.detach(), q.detach(), f"two threads: {name}")

    # -- plans and groups --------------------------------------------------------------------------------------------

    @rule(
        seed=SEEDS, way=st.sampled_from(["new", "more", "none"]), keep=st.booleans(),
        thawed=st.sampled_from(["fresh", "kept"]),
    )  # fmt: skip
    def freeze(self, seed: int, way: str, keep: bool = False, thawed: Any = "fresh") -> None:
        rng = np.random.default_rng(seed)
        masks = {name: mask(rng, tuple(weight.value.shape)) for name, weight in self.weights.items()}
        chosen = {name: m for name, m in masks.items() if way != "none" and rng.random() < 0.7}
        plan = self.plan | sf.FreezePlan(chosen) if way == "more" else sf.FreezePlan(chosen)
        self.set_plan(plan, keep, thawed)

    @rule(seed=SEEDS, thawed=st.sampled_from(["fresh", "kept"]), changes=st.integers(2, 5), lines=st.booleans())
    def pause_and_go_on(self, seed: int, thawed: Any, changes: int, lines: bool) -> None:
        """A plan that changes every step or two; mostly rows of some weights and columns of others."""
        rng = np.random.default_rng(seed)
        self.live_off()
        for number in range(changes):
            masks = {}
            for index, (name, weight) in enumerate(self.weights.items()):
                shape = tuple(weight.value.shape)
                by_cols = index % 2 and len(shape) > 1
                size = shape[-1] if by_cols else math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
                some = {"cols" if by_cols else "rows": rng.random(size) < 0.4}
                masks[name] = sf.FreezeMask(shape, **some) if lines else mask(rng, shape)
            self.set_plan(sf.FreezePlan(masks), True, thawed if rng.random() < 0.8 else "fresh")
            self.train(seed + 7 * number, int(rng.integers(1, 3)), False)

    def set_plan(self, plan: sf.FreezePlan, keep: bool = False, thawed: Any = "fresh") -> None:
        off = [name for name, p in self.params().items() if not p.requires_grad and name in plan]
        refused = "requires_grad=False" if off else "are packed" if keep and self.packs() else ""
        for optimizer in self.optimizers.values():
            if refused:
                before = copy.deepcopy(optimizer.state_dict())
                with pytest.raises(ValueError, match=refused):
                    optimizer.set_freeze(plan, keep_state=keep, thawed=thawed)
                assert optimizer.plan == self.plan
                assert_same_state(optimizer.state_dict(), before, "state after a plan was refused")
            else:
                optimizer.set_freeze(plan, keep_state=keep, thawed=thawed)
        if refused:
            return
        changed, self.plan, self.keep = plan.fingerprint != self.plan.fingerprint, plan, keep
        for name, weight in self.weights.items():
            frozen = plan[name].dense() if name in plan else torch.zeros(weight.value.shape, dtype=torch.bool)
            weight.freeze(frozen, keep, thawed)
        if changed:
            self.void()
        self.remember()

    def void(self) -> None:
        if self.pending is not None:
            self.pending = (*self.pending[:2], True)

    @rule(seed=SEEDS, name=st.sampled_from(["up.weight", "vector", "cube"]), late=st.booleans())
    def grow(self, seed: int, name: str, late: bool) -> None:
        """``late``: a step before `set_freeze` is an error."""
        rng, shape = np.random.default_rng(seed), list(self.weights[name].value.shape)
        if max(shape) > 12:
            return
        self.live_off()
        shape[rng.integers(len(shape))] += 1
        more = values(rng, tuple(shape), 0.0)
        for b in BACKENDS:
            p = self.params(b)[name]
            data = more.to(p.dtype, copy=True)
            data[tuple(map(slice, p.shape))] = p.detach()
            p.grad = None
            p.data = data
        weight = self.weights[name]
        if late and not self.troubles() and weight.age is not None:
            for optimizer in self.optimizers.values():
                optimizer.found_inf = optimizer.grad_scale = None
                with pytest.raises(ValueError, match=name):
                    optimizer.step()
        weight.grow(self.params()[name].detach())
        self.left.pop(name, None)
        named = {name: mask(rng, tuple(shape))} if rng.random() < 0.7 and self.params()[name].requires_grad else {}
        keep = bool(seed % 2) and not self.packs()  # which would be refused, with a plan left that no longer fits
        self.set_plan(sf.FreezePlan({n: m for n, m in self.plan.items() if n != name} | named), keep)

    @precondition(lambda self: len(self.names) < 3)
    @rule(seed=SEEDS)
    def add_group(self, seed: int) -> None:
        name, dtype = f"extra{len(self.names)}", self.params()["vector"].dtype
        value = values(np.random.default_rng(seed), (5,), 0.1).to(dtype)
        for b in BACKENDS:
            p = nn.Parameter(value.clone())
            self.nets[b].register_parameter(name, p)
            self.optimizers[b].add_param_group({"params": [(name, p)]})
        self.names.append([name])
        self.weights[name] = self.weight(value)
        self.void()
        self.remember()

    @precondition(lambda self: self.plan)
    @rule()
    def name_twice(self) -> None:
        name = next(iter(self.plan))
        for optimizer in self.optimizers.values():
            groups = len(optimizer.param_groups)
            with pytest.raises(ValueError, match=name):
                optimizer.add_param_group({"params": [(name, nn.Parameter(torch.zeros(self.plan[name].shape)))]})
            assert len(optimizer.param_groups) == groups

    @rule()
    def flip_requires_grad(self) -> None:
        """Of a parameter outside the plan; a plan that names one which does not train is an error."""
        if "vector" not in self.plan:
            for b in BACKENDS:
                p = self.params(b)["vector"]
                p.grad = None
                p.requires_grad_(not p.requires_grad)

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.1]), decay=st.sampled_from([0.0, 0.1, 1.0]))
    def change_hyper_parameters(self, lr: float, decay: float) -> None:
        self.settings |= {"lr": lr, "weight_decay": decay}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.update(lr=lr, weight_decay=decay)

    # -- weights -----------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, how=st.sampled_from(["zero a row", "fill", "clamp"]))
    def rewrite(self, seed: int, how: str) -> None:
        """Weights written from outside are taken as they were written. (Frozen ones too: nobody guards them.)"""
        rng = np.random.default_rng(seed)
        name = rng.choice(list(self.weights))
        row = int(rng.integers(self.weights[name].value.shape[0]))
        for b in BACKENDS:
            p = self.params(b)[name].detach()
            if how == "zero a row":
                p[row] = 0.0
            elif how == "fill":
                p[row] = float(np.float32(rng.standard_normal())) if b == FIRST else self.params()[name].detach()[row]
            else:
                p.clamp_(-0.5, 0.5)
        value, master = self.params()[name].detach(), None
        if self.weights[name].master is not None:  # which of its neighbours the master is, only the optimizer knows
            master = self.optimizers[FIRST].master_weights()[name]
            wrong = master.isnan() & ~value.isnan()
            assert not wrong.any(), f"the master of a rewritten {name} is NaN"
            assert_same_bits(rounded_master(master), value, f"the master of a rewritten {name}, rounded", any_nan=True)
        self.weights[name].rewrite(value, master)
        self.remember()

    @precondition(lambda self: "master" not in self.options)
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def change_dtype(self, dtype: torch.dtype) -> None:
        """As ``model.to(dtype)``: the same parameter objects, other data. Frozen values are then the converted ones."""
        self.live_off()
        for b in BACKENDS:
            for name, p in self.params(b).items():
                if name not in DOUBLE:
                    p.grad = None
                    p.data = p.data.to(dtype)
        for name, p in self.params().items():
            self.weights[name].rewrite(p.detach(), None)
        self.remember()

    @rule(seed=SEEDS)
    def swap(self, seed: int) -> None:
        """Parameters that others took the place of: an error if the plan names one, before anything moves."""
        net = network({name: p.detach() for name, p in self.params().items()})
        optimizer = self.make(net.named_parameters(), freeze=self.plan, lr=0.1)
        kept = {name: p.detach().clone() for name, p in net.named_parameters()}
        net.load_state_dict({name: value.clone() for name, value in kept.items()}, assign=True)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        frozen = any(m.frozen_count for m in self.plan.values())
        with pytest.raises(ValueError, match="another parameter") if frozen else pytest.warns(RuntimeWarning):
            optimizer.step()

    @rule()
    def warm_up(self) -> None:
        """A first step at rate 0 with gradients of zero counts, as in torch."""
        net = network({name: p.detach() for name, p in self.params().items()})
        optimizer = self.make(net.named_parameters(), freeze=self.plan, lr=0.0)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(float(optimizer.state[p]["step"]) == 1 for p in net.parameters())

    # -- copies ------------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def look_at_a_copy(self, how: str) -> None:
        """A copy computes with its own weights, whatever was done to the original."""
        net, before = self.nets[FIRST], self.gradients()
        twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
        for name in ("up", "wide"):
            layer = getattr(twin, name)
            layer.weight.grad = None
            with torch.no_grad():
                layer.weight.fill_(0.25)
            x = torch.ones(2, layer.weight.shape[1], dtype=layer.weight.dtype)
            found = layer(x)
            assert_same_bits(found.detach(), nn.functional.linear(x, layer.weight).detach(), f"a copy's {name}")
            found.sum().backward()
            assert layer.weight.grad is not None and not isinstance(layer.weight.grad, PackedGradient)
        now = self.gradients()
        assert len(now) == len(before)
        assert all(a is c and b == d for (a, b), (c, d) in zip(before, now, strict=True))

    @rule(seed=SEEDS)
    def train_another(self, seed: int) -> None:
        """Another optimizer of this process, that took this one's state, trains; this one does not notice."""
        if self.live or any(isinstance(p.grad, PackedGradient) for p in self.params().values()):
            return
        for b in BACKENDS:
            net, _ = self.twins(b)
            nets, self.nets = self.nets, {**self.nets, b: net}
            other = self.fresh(b)
            self.nets = nets
            other.load_state_dict(self.optimizers[b].state_dict())
            before = copy.deepcopy(self.optimizers[b].state_dict())
            for number in range(2):
                for p in net.parameters():
                    p.grad = values(np.random.default_rng(seed + number), tuple(p.shape), 0.0).to(p.dtype)
                other.step()
            assert_same_state(self.optimizers[b].state_dict(), before, f"{b}: state that another took and trained")

    @rule(before=st.sampled_from(["packed", "kept", "built"]))
    def save_and_load(self, before: str = "packed") -> None:
        """Into an optimizer built with the plan, or that came to it by `set_freeze`; how state is kept is loaded."""
        self.live_off()
        for b in BACKENDS:
            file = io.BytesIO()
            torch.save((self.optimizers[b].state_dict(), self.nets[b].state_dict()), file)
            file.seek(0)
            state, values_ = torch.load(file, weights_only=True)
            old = self.params(b)
            self.nets[b] = network(values_)
            for name, p in self.params(b).items():
                p.requires_grad_(old[name].requires_grad)
                p.grad = old[name].grad
            plan, self.plan = self.plan, self.plan if before == "built" else sf.FreezePlan()
            for p in self.params(b).values():
                p.grad = None if isinstance(p.grad, PackedGradient) and before == "kept" else p.grad
            self.optimizers[b] = self.fresh(b)
            self.plan = plan
            if before != "built":
                self.optimizers[b].set_freeze(plan, keep_state=before == "kept")
            self.optimizers[b].load_state_dict(state)
            assert_same_state(self.optimizers[b].state_dict(), state, f"{b}: state that was saved and loaded")
        self.keep = self.optimizers[FIRST]._whole  # of state in which nothing is frozen, nothing tells
        self.pending = None

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def duplicate(self, how: str) -> None:
        self.live_off()
        for b in BACKENDS:
            grads = {name: p.grad for name, p in self.params(b).items()}
            for p in self.params(b).values():
                p.grad = None
            pair = self.nets[b], self.optimizers[b]
            pair = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
            self.nets[b], self.optimizers[b] = pair
            for name, p in self.params(b).items():
                p.grad = grads[name]
        self.pending = None

    @rule(damage=st.sampled_from(DAMAGES))
    def load_damaged(self, damage: Callable[[dict[str, Any]], bool]) -> None:
        """A damaged state dict is a ValueError, and nothing changed."""
        optimizer = self.optimizers[FIRST]
        state = copy.deepcopy(optimizer.state_dict())
        if damage(state):
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match=r"load_state_dict|parameter group"):
                optimizer.load_state_dict(state)
            assert_same_state(optimizer.state_dict(), before, "state after a damaged one was refused")

    @precondition(lambda self: self.plan)
    @rule(seed=SEEDS)
    def guarded(self, seed: int) -> None:
        """An optimizer that exchanges weights between training and looking at them, guarded."""
        net = network({name: p.detach() for name, p in self.params().items()})
        optimizer = Averaging(net.parameters(), lr=0.1)
        sf.guard(optimizer, self.plan, net)
        for act in (optimizer.step, optimizer.eval, optimizer.train, optimizer.step):
            for number, p in enumerate(net.parameters()):
                p.grad = values(np.random.default_rng(seed + number), tuple(p.shape), 0.0).to(p.dtype)
            act()
            for name, p in net.named_parameters():
                assert_same_bits(p.detach(), self.params()[name].detach(), f"guarded {name}", where=self.frozen(name))

    # -- what holds after each of them ------------------------------------------------------------------------------

    @invariant()
    def all_is_as_the_oracle_says(self) -> None:
        """Frozen parts to the byte; a live NaN may be another NaN on another backend."""
        for b in BACKENDS:
            for name, p in self.params(b).items():
                weight, value = self.weights[name], p.detach()
                if name in DOUBLE and b == FIRST:  # torch's roots of doubles depend on where they lie in a vector
                    torch.testing.assert_close(value, weight.value, rtol=1e-12, atol=1e-12, equal_nan=True)
                    weight.value = torch.where(weight.frozen, weight.value, value)
                if not torch.equal(bits(value), bits(weight.value)):
                    assert_same_bits(value, self.kept[b][name], f"{b}: frozen part of {name}", where=weight.frozen)
                    assert_same_bits(value, weight.value, f"{b}: {name}", any_nan=True)

    @invariant()
    def what_is_frozen_has_no_state(self) -> None:
        """Unless it is kept."""
        for b, optimizer in self.optimizers.items():
            for name, p in self.params(b).items():
                packed = name in self.plan and not self.keep
                shape = self.plan[name].packed_shape if packed else tuple(p.shape)
                for key, value in optimizer.state.get(p, {}).items():
                    if key != "step":
                        assert tuple(value.shape) == shape, f"{b}: {key} of {name}"
                        assert not packed or value.numel() == self.plan[name].live_count, f"{b}: {key} of {name}"


def run(programs: int, operations: int) -> tuple[int, int]:
    before = Training.programs, Training.steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run_state_machine_as_test(
            Training,
            settings=settings(
                max_examples=programs, stateful_step_count=operations, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
            ),
        )  # fmt: skip
    return Training.programs - before[0], Training.steps - before[1]


@pytest.mark.long
def test_frozen_bytes_outlive_any_program() -> None:
    wanted = 300 if set(BACKENDS) == set(LOCAL) else 120  # backends that are made for GPUs are slow here
    programs, steps = run(wanted, 25)
    assert programs >= wanted and steps > 3 * wanted


@pytest.mark.slow
def test_frozen_bytes_outlive_ten_thousand_programs() -> None:
    programs, steps = run(int(os.environ.get("SAFEFREEZE_PROGRAMS", "10000")), 40)
    print(f"{programs:,} programs, {steps:,} steps on {', '.join(BACKENDS)}")
    assert programs >= int(os.environ.get("SAFEFREEZE_PROGRAMS", "10000"))


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_every_damage_of_a_state_dict_is_told(damage: Callable[[dict[str, Any]], bool]) -> None:
    machine = Training()
    machine.begin(KINDS[0], False, 0)
    machine.freeze(3, "new")
    machine.train(0, 2, False)
    machine.freeze(4, "new")  # some rows are thawed, and have ages
    assert damage(copy.deepcopy(machine.optimizers[FIRST].state_dict())), "nothing to damage"
    machine.load_damaged(damage)


def test_the_machine_sees_a_byte_that_moves() -> None:
    """The test above is worth what its invariants notice."""
    machine = Training()
    machine.begin(KINDS[0], False, 0)
    machine.freeze(3, "new")
    name = next(name for name, m in machine.plan.items() if m.frozen_count and name not in DOUBLE)
    machine.all_is_as_the_oracle_says()
    place = tuple(machine.frozen(name).nonzero()[0].tolist())
    with torch.no_grad():
        bits(machine.params(BACKENDS[-1])[name])  # a copy for odd layouts, else a view
        machine.params(BACKENDS[-1])[name].view(torch.int32)[place] ^= 1
    with pytest.raises(pytest.fail.Exception, match="frozen part of"):
        machine.all_is_as_the_oracle_says()


# -- two ranks ----------------------------------------------------------------------------------------------------

STAGES: Final = ("step", "load", "other state", "pickle", "group", "plan", "same plan")


def train_together(rank: int, seeds: list[int]) -> list[tuple[str, bool, list[float]]]:
    """Random programs under DDP: what was said, whether the ranks' plans differed, the weights."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)  # the same draws on both ranks
        torch.manual_seed(0)
        model = nn.Linear(5, 6, bias=False)
        model.register_parameter(f"of{seed}", nn.Parameter(torch.zeros(seed % 7 + 1)))  # each program has its own name
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        differs, said, names = False, "", [f"module.{name}" for name, _ in model.named_parameters()]

        def drawn(rng: np.random.Generator = rng) -> tuple[sf.FreezePlan, bool]:
            rows = [int(rng.integers(6)), int(rng.integers(6))]
            apart = rng.random() < 0.25 and rows[0] != rows[1]
            return sf.FreezePlan({"weight": sf.FreezeMask((6, 5), rows=[rows[rank * apart]])}), apart

        plan, differs = drawn()
        optimizer = sf.MaskedAdamW(zip(names, ddp.parameters(), strict=True), lr=0.1, freeze=plan)
        try:
            for stage in (STAGES[1 + seed % 3], *rng.choice(STAGES, 4)):  # first what once made ranks forget to compare
                if stage == "step":
                    for _ in range(2):  # who leads hears of the others at its second step
                        ddp(torch.ones(2, 5)).square().sum().backward()
                        optimizer.step()
                        optimizer.zero_grad()
                elif stage == "load":
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                elif stage == "other state":
                    stock = torch.optim.AdamW(ddp.parameters(), lr=0.1)
                    for p in ddp.parameters():
                        p.grad = torch.ones_like(p)
                    stock.state = {
                        p: {"step": torch.tensor(1.0), "exp_avg": p.grad * 0, "exp_avg_sq": p.grad}
                        for p in ddp.parameters()
                    }
                    optimizer.zero_grad()
                    if len(optimizer.param_groups) == 1:
                        optimizer.load_state_dict(stock.state_dict())
                elif stage == "group" and len(optimizer.param_groups) == 1:
                    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2)))]})
                elif stage == "plan":
                    plan, differs = drawn()
                    optimizer.set_freeze(plan)
                elif stage == "same plan":
                    optimizer.set_freeze(optimizer.plan)
                elif stage == "pickle":
                    state = pickle.loads(pickle.dumps(optimizer)).__getstate__()
                    optimizer.__setstate__({**state, "state": optimizer.state, "param_groups": optimizer.param_groups})
            for _ in range(2):
                ddp(torch.ones(2, 5)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        except ValueError as error:
            said = str(error)
        torch.distributed.barrier()
        found.append((said, differs, model.weight.detach().flatten().tolist()))
    return found


def trained_together(programs: int) -> int:
    ones, others = run_ranks(2, train_together, list(range(programs)))
    for seed, ((said, differs, one), (also, _, other)) in enumerate(zip(ones, others, strict=True)):
        if said or also:
            assert "different freeze plans" in said and "different freeze plans" in also, (
                f"program {seed}: {said} {also}"
            )
        else:
            assert not differs, f"program {seed}: both ranks trained, with different plans"
            assert one == other, f"program {seed}: the replicas drifted apart"
    return sum(bool(said) for said, *_ in ones)


def test_two_ranks_train_alike_or_say_why() -> None:
    assert 0 < trained_together(20) < 20


@pytest.mark.slow
def test_two_ranks_train_alike_or_say_why_in_many_programs() -> None:
    programs = 300
    print(f"two ranks: {programs} programs, {trained_together(programs)} of them with different plans")
