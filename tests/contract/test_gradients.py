"""`zero_frozen_grads_` and `clip_grad_norm_`, against dense oracles and against torch."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same_bits, from_bits, random_normal, short
from torch import Tensor, nn

from safefreeze_kernels import FreezeMask, FreezePlan, clip_grad_norm_, live_gradients, zero_frozen_grads_
from safefreeze_kernels.grads.clip import _bindings
from safefreeze_kernels.model.packed import PackedGradient

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf
ROWS, COLS = 11, 37


def _scattered(every: int, shape: tuple[int, ...] = (ROWS, COLS)) -> Tensor:
    return (torch.arange(math.prod(shape)) % every == 1).reshape(shape)


MASKS: dict[str, FreezeMask] = {
    "nothing": FreezeMask((ROWS, COLS)),
    "everything": FreezeMask((ROWS, COLS), rows=range(ROWS)),
    "rows": FreezeMask((ROWS, COLS), rows=[0, 3, 4, 10]),
    "columns": FreezeMask((ROWS, COLS), cols=[0, 8, 9, 36]),
    "all columns but one": FreezeMask((ROWS, COLS), cols=[c for c in range(COLS) if c != 5]),
    "rows and columns": FreezeMask((ROWS, COLS), rows=[1, 2, 9], cols=[3, 30]),
    "elements": FreezeMask((ROWS, COLS), elements=_scattered(7)),
    "all three": FreezeMask((ROWS, COLS), rows=[0, 5], cols=[1, 36], elements=_scattered(5)),
    "a vector's entries": FreezeMask((COLS,), rows=[0, 5, 36]),
    "a scalar": FreezeMask((), rows=[0]),
    "three dimensions": FreezeMask((3, 4, 5), rows=[1, 11], cols=[0], elements=_scattered(9, (3, 4, 5))),
    "no elements": FreezeMask((0, 4), cols=[1]),
}
over_masks = pytest.mark.parametrize("kind", MASKS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def with_gradient(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(random_normal(seed, *shape, dtype=dtype))
    p.grad = random_normal(100 + seed, *shape, dtype=dtype)
    return p


def a_model(kind: str, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], FreezePlan]:
    """The masked tensor between one that no plan names and one without a gradient."""
    mask = MASKS[kind]
    params = {
        "first": with_gradient((5, 3), 1, dtype),
        "masked": with_gradient(mask.shape, 2, dtype),
        "idle": nn.Parameter(random_normal(3, 4, 4, dtype=dtype)),
    }
    return params, FreezePlan({"masked": mask, "idle": FreezeMask((4, 4), rows=[1])})


def special(dtype: torch.dtype) -> Tensor:
    """Values a careless pass would change: -0.0, NaNs with payloads, the smallest, inf, the largest."""
    wide = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}[dtype]
    nan = {torch.float32: 0x7FA12345, torch.bfloat16: 0x7FA1, torch.float16: 0x7D23}[dtype]
    patterns = [1 << (wide - 1), nan, nan | 1 << (wide - 1), 1]
    finite = torch.finfo(dtype)
    return torch.stack(
        [from_bits(pattern, dtype) for pattern in patterns]
        + [torch.tensor(v, dtype=dtype) for v in (INF, -INF, finite.max, finite.min)]
    )


def put_special(target: Tensor, where: Tensor) -> None:
    values = special(target.dtype)
    count = int(where.sum())
    target[where] = values.repeat(count // len(values) + 1)[:count]


def live_of(params: dict[str, nn.Parameter], plan: FreezePlan) -> dict[str, Tensor]:
    return {n: ~plan[n].dense() if n in plan else torch.ones(p.shape, dtype=torch.bool) for n, p in params.items()}


def gradients(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in params.items() if p.grad is not None}


def norm_of(values: list[Tensor], norm_type: float = 2.0) -> float:
    flat = torch.cat([v.reshape(-1).double().abs() for v in values])
    if not flat.numel():
        return 0.0
    if norm_type == INF:
        return float(flat.max())
    return float(flat.sum() if norm_type == 1.0 else (flat * flat).sum().sqrt())


# ------------------------------------------------------------------------------------------------ zero_frozen_grads_


@over_masks
@over_dtypes
@over_backends
def test_zero_sets_frozen_gradients_to_zero_and_visits_nothing_else(
    kind: str, dtype: torch.dtype, backend: str
) -> None:
    params, plan = a_model(kind, dtype)
    frozen = plan["masked"].dense()
    put_special(params["masked"].grad, frozen)
    put_special(params["first"].grad, torch.ones(5, 3, dtype=torch.bool))
    if (~frozen).any():
        params["masked"].grad[~frozen] = special(dtype).repeat(frozen.numel())[: int((~frozen).sum())]
    before = gradients(params)
    assert zero_frozen_grads_(params, plan, backend=backend) is None
    assert_same_bits(params["masked"].grad, before["masked"], "live gradients", where=~frozen)
    assert_same_bits(params["masked"].grad, torch.zeros(frozen.shape, dtype=dtype), "frozen gradients", where=frozen)
    assert_same_bits(params["first"].grad, before["first"], "gradient the plan does not name")
    assert params["idle"].grad is None


def test_zeroing_does_not_freeze_and_says_so() -> None:
    assert "does NOT freeze" in zero_frozen_grads_.__doc__
    p = with_gradient((4, 3), 1)
    first = p.detach().clone()
    plan = FreezePlan({"w": FreezeMask((4, 3), rows=[2])})
    decayed = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1)
    zero_frozen_grads_({"w": p}, plan)
    decayed.step()
    assert not torch.equal(p[2], first[2]), "weight decay moves a row whose gradient is zero"
    assert torch.equal(p[2], first[2] * (1 - 1e-2 * 0.1))
    pushed, start = with_gradient((4, 3), 2), None
    momentum = torch.optim.SGD([pushed], lr=0.1, momentum=0.9)
    momentum.step()
    start = pushed.detach().clone()
    zero_frozen_grads_({"w": pushed}, plan)
    momentum.step()
    assert not torch.equal(pushed[2], start[2]), "old momentum moves a row whose gradient is zero"


# ------------------------------------------------------------------------------------------------ clip_grad_norm_


@over_masks
@over_dtypes
@over_backends
def test_clip_counts_and_scales_live_gradients_only(kind: str, dtype: torch.dtype, backend: str) -> None:
    params, plan = a_model(kind, dtype)
    live = live_of(params, plan)
    put_special(params["masked"].grad, ~live["masked"])
    before = gradients(params)
    expected = norm_of([before[name][live[name]] for name in before])
    norm = clip_grad_norm_(params, 0.5, plan, backend=backend)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    for name in before:
        after, factor = params[name].grad, 0.5 / (expected + 1e-6)
        assert_same_bits(after, before[name], f"frozen gradients of {name}", where=~live[name])
        torch.testing.assert_close(
            after[live[name]].double(),
            before[name][live[name]].double() * factor,
            rtol=1.01 * torch.finfo(dtype).eps,
            atol=torch.finfo(dtype).smallest_normal,
            msg=lambda m, name=name: f"live gradients of {name}: {m}",
        )
    assert params["idle"].grad is None


@over_masks
@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@over_backends
def test_norms_of_every_type_with_and_without_the_frozen_part(kind: str, norm_type: float, backend: str) -> None:
    params, plan = a_model(kind, torch.float32)
    before, live = gradients(params), live_of(params, plan)
    clipped = clip_grad_norm_(params, 1e9, plan, norm_type, return_raw=True, backend=backend)
    expected = norm_of([before[name][live[name]] for name in before], norm_type)
    assert clipped.live.item() == pytest.approx(expected, rel=1e-6)
    assert clipped.raw.item() == pytest.approx(norm_of(list(before.values()), norm_type), rel=1e-6)
    assert (clipped.raw.dtype, clipped.raw.shape) == (torch.float32, ())
    with_elements = [p for p in params.values() if p.numel()]  # torch has no largest of nothing
    stock = torch.nn.utils.clip_grad_norm_(with_elements, 1e9, norm_type)
    assert clipped.raw.item() == pytest.approx(stock.item(), rel=1e-5)
    for name in before:
        assert_same_bits(params[name].grad, before[name], f"{name}, below the largest norm")


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["rows", "columns", "elements", "all three", "a vector's entries"])
@over_backends
def test_poison_in_a_frozen_gradient_reaches_the_raw_norm_only(
    kind: str, poison: float, norm_type: float, backend: str
) -> None:
    params, plan = a_model(kind, torch.float32)
    clean, _ = a_model(kind, torch.float32)
    params["masked"].grad[plan["masked"].dense()] = poison
    got = clip_grad_norm_(params, 0.1, plan, norm_type, error_if_nonfinite=True, return_raw=True, backend=backend)
    expected = clip_grad_norm_(clean, 0.1, plan, norm_type, backend=backend)
    assert_same_bits(got.live, expected, "live norm")
    assert (math.isnan if math.isnan(poison) else math.isinf)(got.raw.item())
    live = ~plan["masked"].dense()
    assert_same_bits(params["masked"].grad, clean["masked"].grad, "live gradients", where=live)
    assert_same_bits(params["first"].grad, clean["first"].grad, "other gradients")


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@pytest.mark.parametrize("poison", [NAN, INF])
@over_backends
def test_poison_in_a_live_gradient(poison: float, norm_type: float, backend: str) -> None:
    params, plan = a_model("rows", torch.float32)
    params["masked"].grad[1, 1] = poison
    before = gradients(params)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_: the live gradient norm is (nan|inf)"):
        clip_grad_norm_(params, 1.0, plan, norm_type, error_if_nonfinite=True, backend=backend)
    for name in before:
        assert_same_bits(params[name].grad, before[name], f"{name} after the error")
    norm = clip_grad_norm_(params, 1.0, plan, norm_type, backend=backend)
    assert (math.isnan if math.isnan(poison) else math.isinf)(norm.item())
    frozen = plan["masked"].dense()
    assert_same_bits(params["masked"].grad, before["masked"], "frozen gradients", where=frozen)
    live = params["masked"].grad[~frozen]
    if math.isnan(poison):
        assert live.isnan().all(), "torch spreads a NaN norm too"
    else:
        assert int(live.isnan().sum()) == 1
        assert (live.nan_to_num(0.0) == 0).all()


SCENARIOS: dict[str, tuple[Callable[[dict[str, nn.Parameter]], Any], float]] = {
    "clipped": (lambda params: None, 0.1),
    "below the limit": (lambda params: None, 1e9),
    "just at it": (lambda params: params["first"].grad.mul_(0), 1.0),
    "limit of zero": (lambda params: None, 0.0),
    "no limit": (lambda params: None, INF),
    "zero gradients": (lambda params: [p.grad.zero_() for p in params.values() if p.grad is not None], 1.0),
    "no gradients": (lambda params: [setattr(p, "grad", None) for p in params.values()], 1.0),
    "NaN": (lambda params: params["masked"].grad.view(-1)[3].fill_(NAN), 1.0),
    "inf": (lambda params: params["masked"].grad.view(-1)[3].fill_(INF), 1.0),
    "inf without a limit": (lambda params: params["masked"].grad.view(-1)[3].fill_(-INF), INF),
    "tiny": (lambda params: [p.grad.mul_(1e-4) for p in params.values() if p.grad is not None], 1e-6),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@over_dtypes
@over_backends
def test_with_nothing_frozen_it_is_torchs(scenario: str, norm_type: float, dtype: torch.dtype, backend: str) -> None:
    ours, _ = a_model("rows", dtype)
    theirs, _ = a_model("rows", dtype)
    prepare, max_norm = SCENARIOS[scenario]
    prepare(ours)
    prepare(theirs)
    rtol = 1e-5 if dtype is torch.float32 else 0.02
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm, norm_type).float()
    got = clip_grad_norm_(ours, max_norm, None, norm_type, backend=backend)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0.0, equal_nan=True)
    for name, p in ours.items():
        if theirs[name].grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(
                p.grad, theirs[name].grad, rtol=rtol, atol=torch.finfo(dtype).tiny, equal_nan=True
            )


@over_backends
def test_a_plan_that_freezes_nothing_is_no_plan(backend: str) -> None:
    one, plan = a_model("nothing", torch.float32)
    two, _ = a_model("nothing", torch.float32)
    plan = FreezePlan({"masked": plan["masked"]})
    got = clip_grad_norm_(one, 0.1, plan, return_raw=True, backend=backend)
    assert_same_bits(got.live, clip_grad_norm_(two, 0.1, backend=backend), "norm")
    assert_same_bits(got.raw, got.live, "raw norm")
    assert_same_bits(one["masked"].grad, two["masked"].grad, "gradients")


@over_backends
def test_norms_are_added_in_double(backend: str) -> None:
    halves = {"w": nn.Parameter(torch.zeros(1000, 66, dtype=torch.float16))}
    halves["w"].grad = torch.full((1000, 66), 60000.0, dtype=torch.float16)
    plan = FreezePlan({"w": FreezeMask((1000, 66), cols=[0, 1])})
    norm = clip_grad_norm_(halves, 1.0, plan, backend=backend)
    # a square overflows float16 by far, and 64,000 of them added one by one lose digits in float32
    assert norm.item() == pytest.approx(float(torch.tensor(60000.0, dtype=torch.float16)) * math.sqrt(64000), rel=1e-6)
    assert halves["w"].grad.isfinite().all()


@pytest.mark.parametrize("kind", ["rows", "columns", "elements", "all three"])
@over_backends
def test_tensors_of_several_pieces(kind: str, backend: str) -> None:
    shape = (300, 401)  # more elements than a thread takes at a time
    dense = MASKS[kind].dense().repeat(28, 11)[:300, :401]
    plan = FreezePlan({"w": FreezeMask(shape, elements=dense)})
    ours = {"w": with_gradient(shape, 7)}
    put_special(ours["w"].grad, dense)
    before = ours["w"].grad.clone()
    norm = clip_grad_norm_(ours, 1.0, plan, backend=backend)
    expected = norm_of([before[~dense]])
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert_same_bits(ours["w"].grad, before, "frozen gradients", where=dense)
    torch.testing.assert_close(ours["w"].grad[~dense], before[~dense] / expected, rtol=1e-6, atol=0.0)
    zero_frozen_grads_(ours, plan, backend=backend)
    assert_same_bits(ours["w"].grad, torch.zeros(shape), "zeroed gradients", where=dense)
    torch.testing.assert_close(ours["w"].grad[~dense], before[~dense] / expected, rtol=1e-6, atol=0.0)


# ------------------------------------------------------------------------------------------------ gradients as they lie

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "every second column": lambda g: torch.stack([g, torch.full_like(g, 7.0)], dim=-1).flatten(-2)[:, ::2],
    "part of a row": lambda g: torch.nn.functional.pad(g, (2, 3), value=7.0)[:, 2:-3],
    "offset": lambda g: torch.cat([torch.full((3,), 7.0), g.flatten()])[3:].view(g.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["rows", "columns", "elements", "all three", "everything"])
@over_backends
def test_strided_gradients_are_treated_like_contiguous_ones(kind: str, layout: str, backend: str) -> None:
    odd, plan = a_model(kind, torch.float32)
    even, _ = a_model(kind, torch.float32)
    odd["masked"].grad = LAYOUTS[layout](odd["masked"].grad)
    storage = odd["masked"].grad.untyped_storage()
    grad, strides = odd["masked"].grad, odd["masked"].grad.stride()
    around = torch.empty(0).set_(storage).clone()
    inside = torch.zeros_like(around, dtype=torch.bool)
    inside.as_strided(grad.shape, strides, grad.storage_offset()).fill_(True)
    got = clip_grad_norm_(odd, 0.1, plan, return_raw=True, backend=backend)
    expected = clip_grad_norm_(even, 0.1, plan, return_raw=True, backend=backend)
    assert_same_bits(got.live, expected.live, "norm")
    assert_same_bits(got.raw, expected.raw, "raw norm")
    assert_same_bits(odd["masked"].grad, even["masked"].grad, "clipped gradients")
    for params in (odd, even):
        zero_frozen_grads_(params, plan, backend=backend)
    assert_same_bits(odd["masked"].grad, even["masked"].grad, "zeroed gradients")
    assert odd["masked"].grad is grad
    assert grad.stride() == strides
    assert_same_bits(torch.empty(0).set_(storage), around, "what lies between", where=~inside)


@pytest.mark.parametrize("operation", ["clip_grad_norm_", "zero_frozen_grads_"])
def test_an_expanded_gradient_is_refused_before_any_other_is_changed(operation: str) -> None:
    params, plan = a_model("rows", torch.float32)
    plan = FreezePlan({**plan, "first": FreezeMask((5, 3), rows=[0]), "last": FreezeMask((4, 3), rows=[0])})
    params["last"] = nn.Parameter(torch.zeros(4, 3))
    params["last"].grad = torch.autograd.grad(params["last"].sum(), params["last"])[0]  # one element, seen twelve times
    assert params["last"].grad.stride() == (0, 0)
    before = gradients(params)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"{operation}.*'last'"):
        if operation == "clip_grad_norm_":
            clip_grad_norm_(params, 0.1, plan)
        else:
            zero_frozen_grads_(params, plan)
    for name in before:
        assert_same_bits(params[name].grad, before[name], f"gradient of {name} after the error")


@over_backends
def test_autograd_is_told_that_gradients_were_written(backend: str) -> None:
    params, plan = a_model("rows", torch.float32)
    versions = [params["masked"].grad._version]
    clip_grad_norm_(params, 0.1, plan, backend=backend)
    versions.append(params["masked"].grad._version)
    zero_frozen_grads_(params, plan, backend=backend)
    versions.append(params["masked"].grad._version)
    assert versions[0] < versions[1] < versions[2], f"version counters {versions}"


# ------------------------------------------------------------------------------------------------ models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.up = nn.Linear(4, 6)
        self.head = nn.Linear(4, 8, bias=False)
        for i, p in enumerate(self.parameters()):
            p.grad = random_normal(i, *p.shape)


UP = FreezePlan({"up.weight": FreezeMask((6, 4), rows=[1])})


def live_norm(model: nn.Module, plan: FreezePlan = UP) -> float:
    named = dict(model.named_parameters())
    live = live_of(named, plan)
    return norm_of([p.grad[live[name]] for name, p in named.items() if p.grad is not None])


def norm_now(model: Any, plan: FreezePlan | None = UP) -> float:
    return clip_grad_norm_(model, 1e9, plan).item()


def test_modules_mappings_and_pairs_are_all_models() -> None:
    model = Net()
    expected = pytest.approx(live_norm(model), rel=1e-6)
    for given in (model, dict(model.named_parameters()), list(model.named_parameters()), model.named_parameters()):
        assert clip_grad_norm_(given, 1e9, UP).item() == expected
    zero_frozen_grads_(model.named_parameters(), UP)
    assert (model.up.weight.grad[1] == 0).all()


def test_a_model_nobody_else_holds() -> None:
    def parameters() -> Any:
        yield "w", with_gradient((4, 4), 1)
        yield "v", with_gradient((3,), 2)

    plan = FreezePlan({"w": FreezeMask((4, 4), rows=[1])})
    live = ~plan["w"].dense()
    expected = norm_of([random_normal(101, 4, 4)[live], random_normal(102, 3)])
    assert clip_grad_norm_(parameters(), 1e9, plan).item() == pytest.approx(expected, rel=1e-6)


def test_a_tied_weight_counts_once() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    plan = FreezePlan({"head.weight": FreezeMask((8, 4), rows=[0])})
    named = dict(model.named_parameters())
    live = ~plan["head.weight"].dense()
    expected = norm_of([p.grad[live] if name == "embed.weight" else p.grad for name, p in named.items()])
    assert norm_now(model, plan) == pytest.approx(expected, rel=1e-6)
    pairs = list(model.named_parameters(remove_duplicate=False))
    assert clip_grad_norm_(pairs, 1e9, plan).item() == pytest.approx(expected, rel=1e-6)
    zero_frozen_grads_(model, plan)
    assert (model.embed.weight.grad[0] == 0).all()
    assert (model.embed.weight.grad[1:] != 0).all()


def linear(seed: int, n_in: int, n_out: int) -> nn.Linear:
    made = nn.Linear(n_in, n_out)
    made.weight, made.bias = with_gradient((n_out, n_in), seed), with_gradient((n_out,), seed + 1)
    return made


def put(home: nn.Module, name: str, new: Any) -> Any:
    """``new`` under ``name``. What was there is returned, so that somebody may keep it: its parameters live on, with
    their gradients."""
    old = getattr(home, name, None)
    setattr(home, name, new)
    return old


def remove_a_submodule(model: Net) -> nn.Module:
    old = model.head
    del model.head
    return old


def gain_gradients(model: Net) -> None:
    for p in model.parameters():
        p.grad = random_normal(58, *p.shape)


CHANGES: dict[str, Callable[[Net], Any]] = {
    "replace_a_parameter": lambda model: setattr(model.up, "weight", with_gradient((6, 4), 50)),
    "replace_an_unnamed_parameter": lambda model: setattr(model.up, "bias", with_gradient((6,), 51)),
    "swap_a_submodule": lambda model: put(model, "up", linear(52, 4, 6)),
    "swap_a_submodule_and_forget_it": lambda model: setattr(model, "up", linear(52, 4, 6)),
    "add_a_parameter": lambda model: put(model.up, "scale", with_gradient((4,), 54)),
    "add_a_submodule": lambda model: put(model, "adapter", linear(55, 4, 4)),
    "remove_a_parameter": lambda model: put(model.up, "bias", None),
    "remove_a_submodule": remove_a_submodule,
    "tie": lambda model: put(model.head, "weight", model.embed.weight),
    "untie": lambda model: setattr(model.head, "weight", with_gradient((8, 4), 57)),
    "untie_the_first": lambda model: setattr(model.embed, "weight", with_gradient((8, 4), 59)),
    "lose_a_gradient": lambda model: setattr(model.up.weight, "grad", None),
    "gain_gradients": gain_gradients,
    "change_dtype": nn.Module.bfloat16,
}

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda model: model,
    "mapping": lambda model: dict(model.named_parameters()),
    "pairs": lambda model: list(model.named_parameters()),
    "generator": nn.Module.named_parameters,
    "every_name": lambda model: model.named_parameters(remove_duplicate=False),
}
over_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
pairs = FORMS["pairs"]


@over_forms
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_seen(change: str, form: Callable[[nn.Module], Any]) -> None:
    model = Net()
    if change.startswith("untie"):
        model.head.weight = model.embed.weight
    assert norm_now(form(model)) == pytest.approx(live_norm(model), rel=1e-6)
    zero_frozen_grads_(form(model), UP)
    kept = CHANGES[change](model)
    assert norm_now(form(model)) == pytest.approx(live_norm(model), rel=1e-6), "the old parameters' norm"
    clip_grad_norm_(form(model), 1e-3, UP)
    assert live_norm(model) == pytest.approx(1e-3, rel=0.02), "the old parameters were clipped"
    if model.up.weight.grad is not None:
        model.up.weight.grad.fill_(1.0)
        zero_frozen_grads_(form(model), UP)
        assert (model.up.weight.grad[1] == 0).all()
        assert (model.up.weight.grad[2] == 1).all()
    del kept


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work lists that were compiled."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        compile_list = getattr(module, name)
        return lambda *given: (calls.append(name), compile_list(*given))[1]

    module = sys.modules[clip_grad_norm_.__module__]
    for name in ("compile_live", "compile_frozen"):
        monkeypatch.setattr(module, name, counting(name))
    return calls


OTHER = FreezePlan({"up.weight": FreezeMask((6, 4), rows=[2, 3]), "head.weight": FreezeMask((8, 4), cols=[0])})


@over_forms
def test_lists_are_compiled_once(form: Callable[[nn.Module], Any], compiled: list[str]) -> None:
    """Anything but a module was bound anew at every call, with a blocking copy to a GPU each time."""
    model = Net()
    for _ in range(3):
        clip_grad_norm_(form(model), 1.0, UP)
        zero_frozen_grads_(form(model), UP)
    assert compiled == ["compile_live", "compile_frozen"]


def test_a_parameter_dict_is_bound_once(compiled: list[str]) -> None:
    model = Net()
    given = nn.ParameterDict({name.replace(".", "_"): p for name, p in model.named_parameters()})
    plan = FreezePlan({"up_weight": UP["up.weight"]})
    for _ in range(3):
        clip_grad_norm_(given, 1.0, plan)
        clip_grad_norm_(given.items(), 1.0, plan)
    assert compiled == ["compile_live", "compile_live"], "once as a module, once as pairs"


@over_forms
def test_plans_and_parts_taken_in_turn_are_all_remembered(
    form: Callable[[nn.Module], Any], compiled: list[str]
) -> None:
    model = Net()
    for _ in range(3):
        for plan in (UP, OTHER):
            assert norm_now(form(model), plan) == pytest.approx(live_norm(model, plan), rel=1e-6)
        part = [("up.weight", model.up.weight)]
        assert clip_grad_norm_(part, 1e9, UP).item() == pytest.approx(norm_of([model.up.weight.grad[[0, 2, 3, 4, 5]]]))
    assert compiled == ["compile_live"] * 3


def test_what_is_remembered_is_little(compiled: list[str]) -> None:
    model = Net()
    tensors = pairs(model)
    for rows in range(6):
        for given in (model, tensors):
            clip_grad_norm_(given, 1.0, FreezePlan({"up.weight": FreezeMask((6, 4), rows=range(rows))}))
    assert len(compiled) == 12
    assert sum(len(_bindings[owner]) for owner in (model, tensors[0][1])) <= 8


def test_other_names_for_the_same_tensors_are_seen() -> None:
    model = Net()
    model.head = nn.Linear(4, 6, bias=False)
    model.head.weight = with_gradient((6, 4), 61)
    named = pairs(model)
    zero_frozen_grads_(named, UP)
    swapped = {"up.weight": "head.weight", "head.weight": "up.weight"}
    zero_frozen_grads_([(swapped.get(name, name), p) for name, p in named], UP)
    for weight in (model.up.weight, model.head.weight):
        assert (weight.grad[1] == 0).all()


@over_forms
def test_a_planned_weight_that_no_longer_trains_is_refused(form: Callable[[nn.Module], Any]) -> None:
    model = Net()
    zero_frozen_grads_(form(model), UP)
    model.up.bias.requires_grad_(False)
    zero_frozen_grads_(form(model), UP)  # not in the plan
    model.up.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"zero_frozen_grads_: 'up\.weight' has requires_grad=False"):
        zero_frozen_grads_(form(model), UP)


@over_forms
def test_another_dtype_is_bound_anew(form: Callable[[nn.Module], Any], compiled: list[str]) -> None:
    """Otherwise every later call took the slow way."""
    model = Net()
    norm_now(form(model))
    model.bfloat16()
    for _ in range(4):
        assert norm_now(form(model)) == pytest.approx(live_norm(model), rel=1e-6)
    assert compiled == ["compile_live", "compile_live"]


@over_forms
def test_gradients_that_become_packed_are_seen(form: Callable[[nn.Module], Any]) -> None:
    model, x = Net(), random_normal(7, 3, 4)
    mostly = FreezePlan({"up.weight": FreezeMask((6, 4), rows=[0, 1, 3, 4])})

    def norm() -> tuple[float, bool]:
        model.zero_grad()
        model.up(x).square().sum().backward()
        return norm_now(form(model), mostly), isinstance(model.up.weight.grad, PackedGradient)

    expected, packed = norm()
    assert not packed
    with live_gradients(model, mostly, storage="packed"):
        assert norm() == (pytest.approx(expected, rel=1e-5), True)
    assert norm() == (pytest.approx(expected, rel=1e-6), False)


@over_forms
def test_another_shape_of_the_same_parameter_is_seen(form: Callable[[nn.Module], Any]) -> None:
    model = Net()
    norm_now(form(model))
    model.up.bias.grad = None
    model.up.bias.data = torch.ones(7)
    model.up.bias.grad = torch.ones(7)
    assert norm_now(form(model)) == pytest.approx(live_norm(model), rel=1e-6)
    model.up.weight.grad = None
    model.up.weight.data = torch.ones(7, 4)
    with pytest.raises(ValueError, match=r"'up\.weight' has shape \(7, 4\), the plan expects \(6, 4\)"):
        norm_now(form(model))


def test_a_changed_plan_is_seen() -> None:
    model = Net()
    for plan in (UP, OTHER, UP, FreezePlan(), OTHER, None):
        assert norm_now(model, plan) == pytest.approx(live_norm(model, plan or FreezePlan()), rel=1e-6)
    zero_frozen_grads_(model, UP)
    zero_frozen_grads_(model, OTHER)
    assert (model.up.weight.grad[1:4] == 0).all()
    assert (model.up.weight.grad[4:] != 0).all()


def test_a_model_that_no_longer_fits_is_refused() -> None:
    model = Net()
    assert norm_now(model) > 0
    model.up.weight = with_gradient((7, 4), 60)
    with pytest.raises(
        ValueError, match=r"clip_grad_norm_: 'up\.weight' has shape \(7, 4\), the plan expects \(6, 4\)"
    ):
        norm_now(model)
    model.up = nn.Identity()
    with pytest.raises(ValueError, match=r"zero_frozen_grads_: the plan names 'up\.weight'"):
        zero_frozen_grads_(model, UP)


def test_models_do_not_share_what_was_found() -> None:
    one, two = Net(), Net()
    two.up.weight.grad.mul_(3.0)
    for _ in range(2):
        for model in (one, two):
            assert norm_now(model) == pytest.approx(live_norm(model), rel=1e-6)


# As trainers and sharding wrappers do: what the parameter holds leads back to the model.
LEADING_BACK: dict[str, Callable[[Net], Any]] = {
    "plain": lambda model: None,
    "hook_on_a_parameter": lambda model: model.up.weight.register_hook(lambda g: g * model.up.weight.new_ones(())),
    "cycle": lambda model: setattr(model.up, "parent", [model]),
}


@pytest.mark.parametrize("also", LEADING_BACK)
def test_a_deleted_model_is_let_go(also: str) -> None:
    model = Net()
    LEADING_BACK[also](model)
    for form in FORMS.values():
        clip_grad_norm_(form(model), 1.0, UP)
        zero_frozen_grads_(form(model), UP)
    gone = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    gone += [weakref.ref(bound) for owner in (model, model.embed.weight) for bound in _bindings[owner]]
    assert len(gone) > 6
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone), "a cache keeps the model's tensors alive"
