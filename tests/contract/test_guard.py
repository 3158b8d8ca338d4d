"""`guard`: frozen weights keep their bytes under any torch optimizer, and the live ones step as if they were alone."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import schedulefree
import torch
from conftest import BACKENDS, DTYPES, assert_same_bits, from_bits, random_normal, short
from torch import Tensor, nn

from safefreeze_kernels import FreezeMask, FreezePlan, FrozenDriftError, guard, snapshot
from safefreeze_kernels.optim.guard import guards_of

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLS = 6, 9
MASKS: dict[str, FreezeMask] = {
    "nothing": FreezeMask((ROWS, COLS)),
    "everything": FreezeMask((ROWS, COLS), rows=range(ROWS)),
    "rows": FreezeMask((ROWS, COLS), rows=[0, 3, 5]),
    "columns": FreezeMask((ROWS, COLS), cols=[0, 1, 8]),
    "rows and columns": FreezeMask((ROWS, COLS), rows=[2], cols=[4]),
    "elements": FreezeMask((ROWS, COLS), elements=torch.eye(ROWS, COLS, dtype=torch.bool)),
    "all three": FreezeMask((ROWS, COLS), rows=[1], cols=[0], elements=torch.eye(ROWS, COLS, dtype=torch.bool)),
}


class Lion(torch.optim.Optimizer):
    """As a user would write it: https://arxiv.org/abs/2302.06675, algorithm 2."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(0.9 * momentum + 0.1 * p.grad))
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


Maker = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Maker] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "Lion of a user": lambda p: Lion(p, lr=0.1, weight_decay=0.1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.1)
try:
    import optimi
except ImportError:
    optimi = None
else:
    OPTIMIZERS |= {
        f"optimi {name}": lambda p, name=name: getattr(optimi, name)(p, lr=0.1, weight_decay=0.1, triton=False)
        for name in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW")
    }


def a_model(dtype: torch.dtype = torch.float32, *, matrices_only: bool = False) -> nn.Module:
    """`masked` is what most plans name; `free` is not in any plan; `vector` is."""
    model = nn.Module()
    model.masked = nn.Parameter(random_normal(1, ROWS, COLS, dtype=dtype))
    model.free = nn.Parameter(random_normal(2, 4, 5, dtype=dtype))
    if not matrices_only:
        model.vector = nn.Parameter(random_normal(3, 7, dtype=dtype))
    return model


def a_plan(kind: str, model: nn.Module) -> FreezePlan:
    masks = {"masked": MASKS[kind]}
    if hasattr(model, "vector"):
        masks["vector"] = FreezeMask((7,), rows=[0, 6])
    return FreezePlan(masks, {"kind": kind})


def frozen_of(plan: FreezePlan, model: nn.Module) -> dict[str, Tensor]:
    return {
        n: plan[n].dense() if n in plan else torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()
    }


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def give_gradients(model: nn.Module, seed: int, frozen: dict[str, Tensor] | None = None, poison: float = 0.0) -> None:
    """Gradients from a seed, with ``poison`` at frozen places."""
    for i, (name, p) in enumerate(model.named_parameters()):
        grad = random_normal(1000 * seed + i, *p.shape, dtype=p.dtype)
        p.grad = grad if frozen is None else grad.masked_fill(frozen[name], poison)


def assert_says(caught: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    message = str(caught.value)
    for word in words:
        assert word in message, f"{message!r} does not say {word}"


def decaying_adamw(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)


def assert_same(
    model: nn.Module, expected: dict[str, Tensor], what: str, where: dict[str, Tensor] | None = None
) -> None:
    """The bytes of all parameters, or of some places in them."""
    for name, p in model.named_parameters():
        assert_same_bits(p, expected[name], f"{name} {what}", where=None if where is None else where[name])


def sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class Guarded:
    """A model with an optimizer that guards part of it; what is frozen and live, and the weights as they were first."""

    def __init__(self, kind: str = "rows", make: Maker = sgd, dtype: torch.dtype = torch.float32, **options: Any):
        self.model = a_model(dtype, matrices_only=options.pop("matrices_only", False))
        self.plan = a_plan(kind, self.model)
        self.frozen = frozen_of(self.plan, self.model)
        self.live = {name: ~flags for name, flags in self.frozen.items()}
        self.first, self.proof = copies(self.model), snapshot(self.model, self.plan)
        self.opt = make(self.model.parameters())
        self.watch = guard(self.opt, self.plan, self.model, **options)

    def step(self, seed: int = 1, poison: float | None = None) -> None:
        give_gradients(self.model, seed, *(() if poison is None else (self.frozen, poison)))
        self.opt.step()

    def assert_frozen(self, when: str) -> None:
        assert_same(self.model, self.first, f"frozen, {when}", self.frozen)

    def assert_live_as(self, twin: nn.Module, when: str) -> None:
        assert_same(self.model, copies(twin), f"live, {when}", self.live)


def replace(model: nn.Module, opt: torch.optim.Optimizer, name: str, values: Tensor) -> None:
    """Another parameter object under the old name, in the model and in the optimizer."""
    old, new = model.get_parameter(name), nn.Parameter(values)
    for group in opt.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    setattr(model, name, new)


def put_special(p: Tensor, where: Tensor) -> None:
    """Frozen bytes that arithmetic would not keep: -0.0 and a NaN with a payload among the first frozen elements."""
    nan = {torch.float32: 0x7FA12345, torch.bfloat16: 0x7FA1, torch.float16: 0x7D23}[p.dtype]
    places = where.reshape(-1).nonzero().flatten()[:2].tolist()
    with torch.no_grad():
        for place, value in zip(places, (torch.tensor(-0.0, dtype=p.dtype), from_bits(nan, p.dtype)), strict=False):
            p.view(-1)[place] = value


# ------------------------------------------------------------------------------------------------ it freezes


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["rows", "columns", "all three"])
def test_frozen_bytes_stay_and_live_ones_step_as_with_zeroed_gradients(name: str, kind: str) -> None:
    matrices_only = name == "Muon"
    one, twin = Guarded(kind, OPTIMIZERS[name], matrices_only=matrices_only), a_model(matrices_only=matrices_only)
    for other in (one.model, twin):  # -0.0, which adding 0.0 would turn, where a decay may pass
        with torch.no_grad():
            other.masked[one.frozen["masked"]] = -0.0
    one.watch.refresh()
    first, plain = copies(one.model), OPTIMIZERS[name](twin.parameters())
    for seed in range(4):
        one.step(seed, math.nan if seed % 2 else 1e9)
        give_gradients(twin, seed, one.frozen, 0.0)
        plain.step()
        with torch.no_grad():
            for n, p in twin.named_parameters():
                p[one.frozen[n]] = first[n][one.frozen[n]]
        assert_same(one.model, first, f"frozen, after step {seed}", one.frozen)
        one.assert_live_as(twin, f"after step {seed}")
    assert not torch.equal(one.model.free, first["free"]), "nothing was stepped at all"


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mask_dtype_and_backend(kind: str, dtype: torch.dtype, backend: str) -> None:
    one = Guarded(kind, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), dtype, backend=backend)
    put_special(one.model.masked, one.frozen["masked"])
    one.watch.refresh()
    first = copies(one.model)
    n_frozen = sum(int(flags.sum()) for flags in one.frozen.values())
    assert one.watch.nbytes == n_frozen * torch.empty((), dtype=dtype).element_size()
    for seed in range(3):
        one.step(seed, math.nan)
    assert_same(one.model, first, "frozen", one.frozen)
    for name, p in one.model.named_parameters():
        live = one.live[name]
        assert p[live].isfinite().all(), f"the frozen gradients reached live {name}"
        assert not live.any() or not torch.equal(p[live], first[name][live]), f"live part of {name} did not train"


@pytest.mark.filterwarnings("ignore:guard. using the slow:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=short)
def test_dtypes_that_no_compiled_kernel_takes(dtype: torch.dtype) -> None:
    one = Guarded("all three", decaying_adamw, dtype)
    for seed in range(2):
        one.step(seed)
        one.proof.verify(one.model)
    assert not torch.equal(one.model.masked, one.first["masked"])


def test_weights_that_share_a_dtype_group_and_a_step_without_gradients() -> None:
    one = Guarded("rows", decaying_adamw)
    one.opt.step()  # no gradient anywhere
    assert_same(one.model, one.first, "after a step without gradients")
    one.model.masked.grad = torch.ones(ROWS, COLS)
    one.opt.step()
    one.assert_frozen("after a step")
    assert_same_bits(one.model.vector, one.first["vector"], "a parameter without a gradient")


# ------------------------------------------------------------------------------------------------ closures


@pytest.mark.parametrize("call", ["positional", "keyword"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5, history_size=4, line_search_fn="strong_wolfe"),
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5, history_size=4),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: Lion(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["LBFGS with line search", "LBFGS", "SGD", "Lion of a user"],
)
@pytest.mark.parametrize("poison", [math.nan, 1e6])
def test_gradients_a_closure_makes_are_watched_too(make: Maker, call: str, poison: float) -> None:
    one, twin = Guarded("all three", make), a_model()
    losses: dict[int, list[float]] = {id(one.model): [], id(twin): []}

    def closure_of(net: nn.Module, at_frozen: float) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            net.zero_grad()
            loss = sum(((p - 0.5) ** 2)[one.live[n]].sum() for n, p in net.named_parameters())
            loss.backward()
            for n, p in net.named_parameters():
                p.grad[one.frozen[n]] = at_frozen
            losses[id(net)].append(loss.item())
            return loss

        return closure

    plain = make(twin.parameters())
    for _ in range(3):
        closure = closure_of(one.model, poison)
        loss = one.opt.step(closure) if call == "positional" else one.opt.step(closure=closure)
        expected = plain.step(closure_of(twin, 0.0))
        assert loss is not None
        assert_same_bits(loss, expected, "loss")
    found = losses[id(one.model)]
    assert found == losses[id(twin)] and found[-1] < found[0], "the live part did not learn"
    one.assert_frozen("after closures")
    one.assert_live_as(twin, "after closures")


# ------------------------------------------------------------------------------------------------ other methods


SCHEDULE_FREE: dict[str, Maker] = {
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, weight_decay=0.1),
    "AdamW for-loop": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, weight_decay=0.1, foreach=False),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1, weight_decay=0.1),
    "RAdam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_weights_as_they_are_saved(name: str) -> None:
    """``eval()`` and ``train()`` rewrite all weights from the optimizer's state, in which frozen ones decay."""
    one, twin = Guarded("all three", SCHEDULE_FREE[name]), a_model()
    plain = SCHEDULE_FREE[name](twin.parameters())
    for epoch in range(2):
        for opt in (one.opt, plain):
            opt.train()
        one.proof.verify(one.model)
        for seed in range(3 * epoch, 3 * epoch + 3):
            one.step(seed, math.nan)
            give_gradients(twin, seed, one.frozen, 0.0)
            plain.step()
        for opt in (one.opt, plain):
            opt.eval()
        one.proof.verify(one.model)
        one.assert_live_as(twin, f"after epoch {epoch}")


class Writer(torch.optim.SGD):
    """Writes weights in every way that optimizers of users do beside `step`."""

    def first_step(self) -> None:  # sharpness-aware: climb by gradients that nobody has zeroed yet
        self._remember()
        with torch.no_grad():
            for p in self._all():
                p.add_(p.grad, alpha=0.1)

    def second_step(self) -> None:
        for p, old in zip(self._all(), self.old, strict=True):
            p.data = old
        self.step()

    def sync(self) -> None:  # writes first, then calls another method of its own
        self._halve()
        self.sync_slowly(0.5)

    def sync_slowly(self, weight: float) -> None:
        for p in self._all():
            p.data.copy_(p.data.lerp(torch.zeros_like(p), weight))

    @contextmanager
    def averaged(self) -> Iterator[str]:
        self._remember()
        self._halve()
        try:
            yield "weights"
        finally:
            for p, old in zip(self._all(), self.old, strict=True):
                p.data.copy_(old)

    def fail(self) -> None:
        self._halve()
        raise RuntimeError("half-way")

    @staticmethod
    def constant() -> int:
        return 3

    @property
    def now(self) -> float:
        return self.param_groups[0]["lr"]

    def _remember(self) -> None:
        self.old = [p.detach().clone() for p in self._all()]

    def _halve(self) -> None:
        for p in self._all():
            p.data.mul_(0.5)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("method", ["first_step", "second_step", "sync", "sync_slowly", "averaged", "fail"])
def test_other_methods_that_write_weights(method: str) -> None:
    one, twin = Guarded("all three", lambda p: Writer(p, lr=0.1, weight_decay=0.5)), a_model()
    opt, plain = one.opt, Writer(twin.parameters(), lr=0.1, weight_decay=0.5)

    def compare(when: str) -> None:
        one.assert_frozen(when)
        one.assert_live_as(twin, when)

    for seed in range(3):
        give_gradients(one.model, seed, one.frozen, math.inf)
        give_gradients(twin, seed, one.frozen, 0.0)
        if method == "averaged":
            with opt.averaged() as what, plain.averaged():
                compare("inside")
            assert what == "weights"
        for each in (opt, plain) if method != "averaged" else ():
            if method == "second_step":
                each.first_step()
            if method == "fail":
                with pytest.raises(RuntimeError, match="half-way"):
                    each.fail()
            else:
                getattr(each, method)(*([0.5] if method == "sync_slowly" else []))
        compare(f"after {method}")
        opt.step()
        plain.step()
        compare(f"after the step after {method}")
    assert (opt.constant(), opt.now) == (3, 0.1)


def test_a_drift_is_found_by_other_methods_as_by_the_step() -> None:
    one = Guarded("rows", lambda p: Writer(p, lr=0.1))
    with torch.no_grad():
        one.model.masked.add_(1.0)
    with pytest.raises(FrozenDriftError, match=r"'masked'.*guard\.refresh\(\)"):
        one.opt.sync()


def test_methods_called_for_every_parameter_in_a_step_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a step would put all weights back once per parameter."""

    class Chatty(Lion):
        def step(self, closure: Any = None) -> Any:
            for _ in range(50):
                self.rate()
            return super().step(closure)

        def rate(self) -> float:
            return self.param_groups[0]["lr"]

    one = Guarded("rows", lambda p: Chatty(p, lr=0.1, weight_decay=0.1))
    written = []
    put_back = one.watch.put_back
    monkeypatch.setattr(one.watch, "put_back", lambda: (written.append(1), put_back()))
    one.step()
    assert 1 <= len(written) <= 2  # twice where the step of the base class has hooks of its own
    written.clear()
    one.opt.rate()
    assert len(written) == 1


def test_a_step_that_writes_before_it_calls_that_of_its_base() -> None:
    """The base's step has hooks too, once an optimizer of that class was made: what it sees then is no drift."""

    class Decaying(Lion):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)
            return super().step(closure)

    Lion(a_model().parameters(), lr=0.1, weight_decay=0.1)
    one = Guarded("all three", lambda p: Decaying(p, lr=0.1, weight_decay=0.1))
    for seed in range(2):
        one.step(seed)
        one.proof.verify(one.model)
    with torch.no_grad():
        one.model.masked.add_(1.0)
    with pytest.raises(FrozenDriftError):
        one.opt.step()


def test_a_step_that_raises_half_way_leaves_frozen_weights_in_place() -> None:
    class Fails(Lion):
        fails = True

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)
            if self.fails:
                raise RuntimeError("out of memory, say")

    one = Guarded("all three", lambda p: Fails(p, lr=0.1, weight_decay=0.5))
    with pytest.raises(RuntimeError, match="out of memory"):
        one.step()
    one.proof.verify(one.model)
    one.opt.fails = False
    one.step()
    one.proof.verify(one.model)


# ------------------------------------------------------------------------------------------------ lifetime


def test_remove_ends_it() -> None:
    one = Guarded()
    one.step()
    assert guards_of(one.opt) == [one.watch]
    one.watch.remove()
    one.watch.remove()
    assert guards_of(one.opt) == []
    before = copies(one.model)
    one.step(2)
    expected = {name: before[name].add(p.grad, alpha=-0.1) for name, p in one.model.named_parameters()}
    assert_same(one.model, expected, "after remove()")


def test_an_outside_change_of_frozen_weights_is_found_at_the_next_step() -> None:
    one = Guarded("all three")
    one.step()
    with torch.no_grad():
        one.model.masked[1, 3] += 1.0
    before = copies(one.model)
    with pytest.raises(FrozenDriftError) as caught:
        one.step(2)
    moved = repr(before["masked"][1, 3].item())
    assert_says(caught, "guard", "'masked'", "row 1, column 3", "guard.refresh()", "1 of", moved)
    assert_same(one.model, before, "after the error")


def test_an_outside_change_of_live_weights_is_nobodys_business() -> None:
    one = Guarded()
    one.step()
    with torch.no_grad():
        one.model.masked[one.live["masked"]] += 1.0
        one.model.free += 1.0
    before = copies(one.model)
    one.step(2)
    one.assert_frozen("after the step")
    moved = {name: before[name].add(p.grad, alpha=-0.1) for name, p in one.model.named_parameters()}
    assert_same(one.model, moved, "after the step", one.live)


def test_changes_autograd_does_not_see_are_put_back() -> None:
    one = Guarded("all three")
    one.step()
    one.model.masked.data.mul_(2.0)
    one.step(2)
    one.assert_frozen("after the step")


def test_other_memory_under_a_frozen_weight_is_found() -> None:
    """As loaders assign it: autograd's version counter stays as it is, and loaded rows were undone without a word."""
    one = Guarded("all three")
    one.model.masked.data = one.model.masked.detach().clone()
    one.step()
    one.model.masked.data = one.model.masked.detach() + 1.0
    with pytest.raises(FrozenDriftError, match=r"'masked'.*guard\.refresh\(\)"):
        one.opt.step()


def test_refresh_takes_the_present_values() -> None:
    one, other = Guarded("all three", OPTIMIZERS["AdamW foreach"]), a_model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    one.step()
    one.model.load_state_dict(other.state_dict())
    with pytest.raises(FrozenDriftError, match=r"guard\.refresh\(\)"):
        one.step(2)
    one.watch.refresh()
    one.step(3)
    assert_same(one.model, copies(other), "frozen", one.frozen)
    assert not torch.equal(one.model.free, other.free)


def test_loading_the_same_frozen_weights_needs_no_refresh() -> None:
    one = Guarded()
    one.step()
    one.model.load_state_dict(one.first)
    one.step(2)
    one.assert_frozen("after loading")


def test_the_copy_is_not_the_weights() -> None:
    model = a_model()
    everything = FreezePlan({name: FreezeMask(p.shape, rows=range(p.shape[0])) for name, p in model.named_parameters()})
    first, opt = copies(model), sgd(model.parameters())
    guard(opt, everything, model)
    give_gradients(model, 1)
    opt.step()
    assert_same(model, first, "after a step")


def test_a_replaced_parameter_object_is_found_by_its_name() -> None:
    one = Guarded("rows", decaying_adamw)
    replace(one.model, one.opt, "masked", one.model.masked.detach().clone())  # as frameworks do
    one.step()
    one.assert_frozen("after the step")
    live = one.live["masked"]
    assert not torch.equal(one.model.masked[live], one.first["masked"][live])


def anew(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


OTHER_PARAMETERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "assign": lambda model, group: model.load_state_dict(
        {n: anew(t) for n, t in model.state_dict().items()}, assign=True
    ),
    "replace in the model": lambda model, group: setattr(model, "masked", anew(model.masked)),
    "replace in the optimizer": lambda model, group: group.update(params=list(map(anew, group["params"]))),
    "remove the group": lambda model, group: group.update(params=group["params"][1:]),
}


@pytest.mark.parametrize("call", ["step", "eval"])
@pytest.mark.parametrize("change", OTHER_PARAMETERS)
def test_an_optimizer_that_holds_other_parameters_than_the_model_is_an_error(change: str, call: str) -> None:
    """It trained parameters that nobody used, and gradients piled up on those that were guarded."""
    one = Guarded("rows", lambda p: schedulefree.SGDScheduleFree(p, lr=0.1))
    one.opt.train()
    one.step()
    OTHER_PARAMETERS[change](one.model, one.opt.param_groups[0])
    give_gradients(one.model, 2)
    before, grad = copies(one.model), one.model.masked.grad.clone()
    with pytest.raises(
        ValueError, match=r"guard: the model's 'masked' is not among.*assign=True.*make the optimizer anew"
    ):
        getattr(one.opt, call)()
    assert_same(one.model, before, "after the error")
    assert_same_bits(one.model.masked.grad, grad, "gradient after the error")


@pytest.mark.parametrize("form", [dict, list, iter])
def test_mappings_and_pairs_are_models_too(form: Callable[..., Any]) -> None:
    model = a_model()
    plan = a_plan("rows", model)
    proof = snapshot(model, plan)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    guard(opt, plan, form(model.named_parameters()))
    give_gradients(model, 1)
    opt.step()
    proof.verify(model)
    replace(model, opt, "masked", model.masked.detach().clone())
    with pytest.raises(ValueError, match="'masked' is not among the parameters that the optimizer holds"):
        opt.step()


NO_LONGER_FITS: dict[str, tuple[Callable[[Any, Any], Any], list[str]]] = {
    "a parametrization": (
        lambda model, opt: nn.utils.parametrizations.weight_norm(model, "masked"),
        ["'parametrizations.masked.original0'", "remove that first"],
    ),
    "more rows": (
        lambda model, opt: replace(model, opt, "masked", torch.ones(ROWS + 2, COLS)),
        [f"({ROWS + 2}, {COLS})", f"({ROWS}, {COLS})"],
    ),
    "another dtype": (lambda model, opt: model.bfloat16(), ["torch.bfloat16", "torch.float32"]),
    "renamed": (lambda model, opt: model._parameters.update(x=model._parameters.pop("masked")), []),
}


@pytest.mark.parametrize("change", NO_LONGER_FITS)
def test_a_weight_that_no_longer_fits_is_an_error_before_the_step(change: str) -> None:
    make, words = NO_LONGER_FITS[change]
    one = Guarded()
    one.step()
    one.model.zero_grad()
    make(one.model, one.opt)
    before = copies(one.model)
    with pytest.raises((ValueError, TypeError, FrozenDriftError)) as caught:
        one.step(2)
    assert_says(caught, "guard", "'masked'", *words)
    assert_same(one.model, before, "after the error")


def test_a_weight_on_another_device_is_an_error_before_the_step() -> None:
    one = Guarded()
    replace(one.model, one.opt, "masked", one.model.masked.detach().to("meta"))
    with pytest.raises(
        ValueError, match=r"'masked' is \(6, 9\) .* on meta, expected .* on cpu as before; guard it anew"
    ):
        one.opt.step()


def test_two_guards_of_one_optimizer() -> None:
    model = a_model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    first = copies(model)
    one, two = FreezeMask((ROWS, COLS), rows=[0]), FreezeMask((ROWS, COLS), cols=[1])
    guard(opt, FreezePlan({"masked": one}), model)
    guard(opt, FreezePlan({"masked": two}), model)
    for seed in range(2):
        give_gradients(model, seed)
        opt.step()
    assert_same_bits(model.masked, first["masked"], "frozen part", where=(one | two).dense())
    assert not torch.equal(model.masked[1:, 2:], first["masked"][1:, 2:])


def test_schedulers_and_scalers_work_through_it() -> None:
    one = Guarded("columns")
    scheduler = torch.optim.lr_scheduler.StepLR(one.opt, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected, live = one.first["masked"].clone(), one.live["masked"]
    for seed in range(3):
        give_gradients(one.model, seed)
        for p in one.model.parameters():
            p.grad.mul_(scaler.get_scale())
        scaler.scale(torch.zeros(()))
        scaler.step(one.opt)
        scaler.update()
        scheduler.step()
        expected -= 0.1 * 0.5**seed * random_normal(1000 * seed, ROWS, COLS)
    torch.testing.assert_close(one.model.masked[live], expected[live], rtol=1e-5, atol=1e-6)
    one.assert_frozen("after three steps")


# ------------------------------------------------------------------------------------------------ unusual weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, COLS)
        self.head = nn.Linear(COLS, ROWS, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]], ids="+".join)
def test_tied_weights_under_either_name(names: list[str]) -> None:
    model = Tied()
    mask = MASKS["all three"]
    first = model.embed.weight.detach().clone()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    watch = guard(opt, FreezePlan(dict.fromkeys(names, mask)), model)
    assert watch.nbytes == mask.frozen_count * 4, "one tensor, one copy"
    for seed in range(3):
        give_gradients(model, seed)
        opt.step()
    assert_same_bits(model.head.weight, first, "frozen part", where=mask.dense())
    assert not torch.equal(model.head.weight[~mask.dense()], first[~mask.dense()])


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.zeros(COLS, ROWS).t(),
    "every second column": lambda: torch.zeros(ROWS, 2 * COLS)[:, ::2],
    "part of a row": lambda: torch.zeros(ROWS, COLS + 4)[:, 1:-3],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_weights(layout: str, kind: str, backend: str) -> None:
    model, twin = nn.Module(), nn.Module()
    model.masked = nn.Parameter(LAYOUTS[layout]().copy_(random_normal(1, ROWS, COLS)))
    twin.masked = nn.Parameter(random_normal(1, ROWS, COLS))
    plan = FreezePlan({"masked": MASKS[kind]})
    frozen = plan["masked"].dense()
    for net in (model, twin):
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        guard(opt, plan, net, backend=backend)
        for seed in range(3):
            give_gradients(net, seed, {"masked": frozen}, math.nan)
            opt.step()
    assert not model.masked.is_contiguous()
    assert_same_bits(model.masked, twin.masked, "all of it")
    assert_same_bits(model.masked, random_normal(1, ROWS, COLS), "frozen part", where=frozen)


def test_a_weight_the_optimizer_holds_in_a_later_group() -> None:
    model = a_model()
    plan = a_plan("rows", model)
    opt = torch.optim.SGD([{"params": [model.free]}, {"params": [model.vector]}, {"params": [model.masked]}], lr=0.1)
    first = copies(model)
    guard(opt, plan, model)
    give_gradients(model, 1)
    opt.step()
    assert_same_bits(model.masked, first["masked"], "frozen rows", where=plan["masked"].dense())


# ------------------------------------------------------------------------------------------------ refusals


def test_a_weight_the_optimizer_does_not_hold() -> None:
    model = a_model()
    opt = torch.optim.SGD([model.free], lr=0.1)
    with pytest.raises(ValueError, match="guard: 'masked' is in the plan and the model but not in the optimizer"):
        guard(opt, a_plan("rows", model), model)
    give_gradients(model, 1)
    opt.step()  # no hook was left behind


class Wrapper:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class OptimizingWrapper(Wrapper, torch.optim.Optimizer):
    """As accelerate's: torch's constructor never ran, so its step calls no hooks and nothing would be guarded."""


@pytest.mark.parametrize(
    "given",
    [
        object(),
        nn.Linear(2, 2),
        "sgd",
        None,
        *(kind(sgd(a_model().parameters())) for kind in (Wrapper, OptimizingWrapper)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_optimizer(given: Any) -> None:
    model = a_model()
    words = rf"guard: optimizer is a {type(given).__name__}, expected a torch\.optim.*unwrap a wrapper first"
    with pytest.raises(TypeError, match=words):
        guard(given, a_plan("rows", model), model)


def test_a_refused_guard_leaves_the_optimizer_alone() -> None:
    model = a_model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for bad, error in (
        (FreezePlan({"maskd": MASKS["rows"]}), ValueError),
        (FreezePlan({"masked": FreezeMask((2, 2))}), ValueError),
        ({"masked": MASKS["rows"]}, TypeError),
    ):
        with pytest.raises(error, match="guard"):
            guard(opt, bad, model)  # type: ignore[arg-type]
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks


def test_a_guard_goes_with_its_optimizer() -> None:
    import weakref

    model = a_model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    gone = weakref.ref(guard(opt, a_plan("rows", model), model))
    gc.collect()
    assert gone() is not None, "the guard must last as long as the optimizer, also if nobody holds it"
    give_gradients(model, 1)
    opt.step()
    del opt
    gc.collect()
    assert gone() is None
