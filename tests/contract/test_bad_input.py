"""Wrong input: a clear error before anything has changed, and nothing lost.

A message names the operation, the argument or parameter, what it got, what it expected and, for set-up trouble, the
remedy. The plan file's own errors are in test_plan_file.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from conftest import BACKENDS, assert_same_bits, assert_same_state, random_normal
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels import FreezeMask, FreezePlan, MaskedAdam, MaskedAdamW
from safefreeze_kernels.kernels.backend import BackendUnavailableError, backend_states

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"up.weight": (6, 4), "up.bias": (6,), "down.weight": (4, 6)}
PLAN = FreezePlan(
    {
        "up.weight": FreezeMask((6, 4), rows=[0, 3]),
        "up.bias": FreezeMask((6,), rows=[0, 3]),
        "down.weight": FreezeMask((4, 6), cols=[1], elements=torch.eye(4, 6, dtype=torch.bool)),
    }
)


class Param(nn.Parameter):
    """A parameter whose gradient can be replaced by one that torch would not let through, as other devices' are."""

    stand_in: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.stand_in if self.stand_in is not None else torch.Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        torch.Tensor.grad.__set__(self, value)


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Param]:
    return {name: Param(random_normal(i, *shape, dtype=dtype)) for i, (name, shape) in enumerate(shapes.items())}


def give_gradients(params: dict[str, Any], seed: int) -> None:
    for i, p in enumerate(params.values()):
        p.grad = random_normal(1000 * seed + i, *p.shape, dtype=p.dtype)


def steps(opt: torch.optim.Optimizer, params: dict[str, Any], seeds: Iterable[int]) -> None:
    for seed in seeds:
        give_gradients(params, seed)
        opt.step()


class Twins:
    """An optimizer to be spoilt, and one that never is: ``build`` makes parameters and their optimizer."""

    def __init__(self, build: Callable[[], tuple[dict[str, Any], MaskedAdamW]]) -> None:
        (self.params, self.opt), (self.twin, self.never) = build(), build()

    def steps(self, seeds: Iterable[int]) -> None:
        steps(self.opt, self.params, seeds)
        steps(self.never, self.twin, seeds)

    def assert_same(self) -> None:
        assert_same_state(everything(self.opt), everything(self.never), "afterwards")


def planned(**arguments: Any) -> tuple[dict[str, Any], MaskedAdamW]:
    params = parameters()
    return params, MaskedAdamW(params.items(), freeze=PLAN, **arguments)


def everything(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """What an error must leave alone. State made but not used yet (zeros, before a first step) counts as none."""
    seen: dict[str, Any] = {"groups": [], "plan": getattr(getattr(opt, "plan", None), "fingerprint", None)}
    for g, group in enumerate(opt.param_groups):
        seen["groups"].append({key: repr(value) for key, value in group.items() if key != "params"})
        for i, p in enumerate(group["params"]):
            name = group.get("param_names", {i: i})[i] if "param_names" in group else f"{g}.{i}"
            grad = p.grad
            readable = isinstance(grad, Tensor) and grad.layout == torch.strided and grad.device.type != "meta"
            state = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in opt.state.get(p, {}).items()}
            used = any(not isinstance(v, Tensor) or v.any() for v in state.values())
            seen[name] = {
                "param": p.detach().clone() if p.device.type != "meta" else None,
                "grad": grad.detach().clone() if readable else id(grad),
                "state": state if used else {},
            }
    return seen


@contextmanager
def refused(
    kind: type[Exception] | tuple[type[Exception], ...], *words: str, of: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """The block raises ``kind`` with all of ``words`` in its message and changes nothing of the optimizer ``of``."""
    before = everything(of) if of is not None else None
    with pytest.raises(kind) as caught:
        yield
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not say {missing}"
    if of is not None:
        assert_same_state(everything(of), before, "after the error")


# ------------------------------------------------------------------------------------------------ indices and shapes


@pytest.mark.parametrize("part", ["rows", "cols"])
@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ([0, 4], ValueError, ["index 4", "from 0 to 3"]),
        ([-1], ValueError, ["index -1", "from 0 to 3"]),
        (torch.tensor([2**40]), ValueError, [f"index {2**40}", "from 0 to 3"]),
        (np.array([2**64 - 1], np.uint64), ValueError, [f"index {2**64 - 1}", "from 0 to 3"]),
        ([2**70], (TypeError, ValueError), ["expected"]),
        ([1, 2, 1], ValueError, ["index 1 more than once", "once"]),
        (torch.tensor([3, 0, 0]), ValueError, ["index 0 more than once", "once"]),
        ([True, False, True], ValueError, ["bool vector of 3 entries", "expected 4"]),
        (torch.zeros(5, dtype=torch.bool), ValueError, ["bool vector of 5 entries", "expected 4"]),
        ([0.0, 1.0], TypeError, ["float64", "expected integer indices or a bool vector"]),
        (torch.tensor([1.0]), TypeError, ["float32", "expected integer indices or a bool vector"]),
        (torch.tensor([1.0]).bfloat16(), TypeError, ["bfloat16", "expected integer indices or a bool vector"]),
        (["1"], TypeError, ["expected integer indices or a bool vector"]),
        ([None], TypeError, ["object", "expected integer indices or a bool vector"]),
        (2, ValueError, ["0 dimensions", "expected a 1-D list"]),
        ({1, 2}, ValueError, ["expected a 1-D list"]),
        (torch.ones(4, 4, dtype=torch.bool), ValueError, ["2 dimensions", "expected a 1-D list"]),
        ([[1], [2]], ValueError, ["2 dimensions", "expected a 1-D list"]),
        ([[1], [2, 3]], ValueError, ["expected a 1-D list"]),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, list) or len(str(value)) < 30 else "",
)
def test_wrong_indices(part: str, given: Any, kind: Any, words: list[str]) -> None:
    with refused(kind, f"FreezeMask: {part}", *words):
        FreezeMask((4, 4), **{part: given})


def test_indices_of_a_tensor_without_rows() -> None:
    with refused(ValueError, "FreezeMask: rows holds index 0"):
        FreezeMask((0, 3), rows=[0])


@pytest.mark.parametrize(
    ("elements", "kind", "words"),
    [
        (torch.ones(4, 3), TypeError, ["float32", "expected bool", "True = frozen"]),
        (torch.ones(4, 3, dtype=torch.uint8), TypeError, ["uint8", "expected bool"]),
        (torch.ones(4, 3, dtype=torch.bfloat16), TypeError, ["bfloat16", "expected bool"]),
        (torch.ones(3, 4, dtype=torch.bool), ValueError, ["shape (3, 4)", "expected (4, 3)"]),
        (torch.ones(12, dtype=torch.bool), ValueError, ["shape (12,)", "expected (4, 3)"]),
        (torch.ones(1, 4, 3, dtype=torch.bool), ValueError, ["shape (1, 4, 3)", "expected (4, 3)"]),
    ],
    ids=["float", "uint8", "bfloat16", "turned", "flat", "one dimension more"],
)
def test_wrong_elements(elements: Tensor, kind: type[Exception], words: list[str]) -> None:
    with refused(kind, "FreezeMask: elements", *words):
        FreezeMask((4, 3), elements=elements)


@pytest.mark.parametrize("shape", [5, "23", (2, -1), (2.5, 2), (None,), ((2, 3),), (math.inf, 2), (math.nan, 2), None])
def test_wrong_shapes(shape: Any) -> None:
    with refused(ValueError, "FreezeMask: shape", repr(shape), "(rows, columns)"):
        FreezeMask(shape)


# ------------------------------------------------------------------------------------------------ plans and parameters


def module_of(params: dict[str, Any]) -> nn.Module:
    """A module whose ``named_parameters`` are ``params``."""
    model = nn.Module()
    for name, p in params.items():
        *path, last = name.split(".")
        home = model
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home._modules[part]
        home.register_parameter(last, p)
    return model


def operations(params: dict[str, Any], plan: Any) -> dict[str, Callable[[], Any]]:
    """Everything that takes a plan, by the name its errors give it."""
    model = module_of(params)
    sgd = torch.optim.SGD(list({id(p): p for p in params.values()}.values()), lr=0.1)
    return {
        "MaskedAdamW": lambda: MaskedAdamW(list(params.items()), freeze=plan),
        "MaskedAdam": lambda: MaskedAdam(list(params.items()), freeze=plan),
        "guard": lambda: sf.guard(sgd, plan, model),
        "zero_frozen_grads_": lambda: sf.zero_frozen_grads_(model, plan),
        "clip_grad_norm_": lambda: sf.clip_grad_norm_(model, 1.0, plan),
        "snapshot": lambda: sf.snapshot(model, plan),
    }


OPERATIONS = list(operations(parameters(), PLAN))


PLANS_THAT_DO_NOT_FIT: dict[str, tuple[Any, list[str]]] = {
    "missing": ({"up.wieght": FreezeMask((6, 4), rows=[0])},
                ["'up.wieght'", "nearest: 'up.weight'", "plan for another model"]),
    "another model": ({f"transformer.h.{i}.c_fc": FreezeMask((8, 8), rows=[0]) for i in range(3)},
                      ["'transformer.h.0.c_fc'", "3 parameters", "plan for another model"]),
    "another shape": ({"down.weight": FreezeMask((6, 4), rows=[0])}, ["'down.weight'", "(4, 6)", "expects (6, 4)"]),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", PLANS_THAT_DO_NOT_FIT)
def test_a_plan_that_does_not_fit(fault: str, operation: str) -> None:
    plan, words = PLANS_THAT_DO_NOT_FIT[fault]
    with refused(ValueError, f"{operation}: ", *words):
        operations(parameters(), FreezePlan(plan))[operation]()


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "snapshot"])
def test_a_plan_for_a_parameter_that_does_not_train(operation: str) -> None:
    params = parameters()
    params["down.weight"].requires_grad_(False)
    with refused(ValueError, f"{operation}: ", "'down.weight' has requires_grad=False", "requires_grad_(True)"):
        operations(params, PLAN)[operation]()


def test_a_snapshot_reads_parameters_that_do_not_train() -> None:
    params = parameters()
    params["down.weight"].requires_grad_(False)
    assert operations(params, PLAN)["snapshot"]().nbytes > 0


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "plan", [{}, dict(PLAN), PLAN["up.weight"], ["up.weight"], "plan.safetensors", False], ids=type
)
def test_a_plan_of_the_wrong_type(operation: str, plan: Any) -> None:
    with refused(TypeError, f"{operation}: ", f" is a {type(plan).__name__}, expected a FreezePlan"):
        operations(parameters(), plan)[operation]()


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "snapshot"])
def test_overlapping_parameters(operation: str) -> None:
    base = torch.zeros(8, 4)
    params = {"up.weight": Param(base[:6]), "other": Param(base[5:])}
    with refused(ValueError, f"{operation}: ", "'up.weight'", "'other'", "share storage"):
        operations(params, FreezePlan({"up.weight": FreezeMask((6, 4), rows=[0])}))[operation]()
    twin = {"up.weight": Param(base[:6]), "other": Param(base[:6])}
    with refused(ValueError, f"{operation}: ", "'up.weight'", "'other'", "share storage"):
        operations(twin, FreezePlan({"up.weight": FreezeMask((6, 4), rows=[0])}))[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tied_weights_with_two_masks(operation: str) -> None:
    tied = Param(torch.zeros(6, 4))
    masks = {"embed.weight": FreezeMask((6, 4), rows=[0]), "head.weight": FreezeMask((6, 4), rows=[1])}
    with refused(
        ValueError, f"{operation}: ", "'embed.weight' and 'head.weight'", "tied", "two different masks", "union"
    ):
        operations({"embed.weight": tied, "head.weight": tied}, FreezePlan(masks))[operation]()


def test_tied_weights_with_two_masks_through_a_model() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    plan = FreezePlan({"embed.weight": FreezeMask((6, 4), rows=[0]), "head.weight": FreezeMask((6, 4), rows=[1])})
    with refused(ValueError, "MaskedAdamW", "'embed.weight' and 'head.weight'", "tied"):
        MaskedAdamW(model.named_parameters(remove_duplicate=False), freeze=plan)
    for name in plan:  # either name reaches it
        opt = MaskedAdamW(model.named_parameters(remove_duplicate=False), freeze=FreezePlan({name: plan[name]}))
        assert opt.plan[name] == plan[name]
    with refused(ValueError, "MaskedAdamW", "'head.weight'", "tied weight", "remove_duplicate=False"):
        MaskedAdamW(model.named_parameters(), freeze=FreezePlan({"head.weight": plan["head.weight"]}))


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "wrapped"])
@pytest.mark.parametrize("shapes", [((6, 4), (6, 4)), ((4, 4), (6, 4)), ((6, 4), (4, 4))], ids=str)
@pytest.mark.parametrize("operation", ["zero_frozen_grads_", "clip_grad_norm_", "snapshot", "FreezePlan.check"])
def test_one_name_for_two_parameters(operation: str, shapes: Any, wrapped: bool) -> None:
    """The last of the name was bound, whichever the plan meant: rows of the first moved without a word."""
    given = "module.up.weight" if wrapped else "up.weight"
    pairs = [("else", Param(torch.zeros(3))), *((given, Param(torch.zeros(shape))) for shape in shapes)]
    plan = FreezePlan({"up.weight": FreezeMask((6, 4), rows=[0])})
    call: dict[str, Callable[[], Any]] = {
        "zero_frozen_grads_": lambda: sf.zero_frozen_grads_(pairs, plan),
        "clip_grad_norm_": lambda: sf.clip_grad_norm_(iter(pairs), 1.0, plan),
        "snapshot": lambda: sf.snapshot(pairs, plan),
        "FreezePlan.check": lambda: plan.check(pairs),
    }
    with refused(ValueError, f"{operation}: ", f"both named {given!r}", *map(str, shapes), "'actor.'", "'critic.'"):
        call[operation]()


def test_one_name_for_two_parameters_that_is_another_name_of_a_tied_one() -> None:
    tied, other = Param(torch.zeros(6, 4)), Param(torch.zeros(6, 4))
    pairs = [("embed.weight", tied), ("head.weight", tied), ("head.weight", other)]
    with refused(ValueError, "snapshot: ", "both named 'head.weight'"):
        sf.snapshot(pairs, FreezePlan({"head.weight": FreezeMask((6, 4), rows=[0])}))


def test_one_name_twice_is_fine_for_one_parameter_or_outside_the_plan() -> None:
    planned = Param(torch.zeros(6, 4))
    pairs = [("up.weight", planned), ("bias", Param(torch.zeros(6))), ("bias", Param(torch.ones(6)))]
    for p in dict.fromkeys(p for _, p in pairs):
        p.grad = torch.ones_like(p)
    pairs.append(("up.weight", planned))
    plan = FreezePlan({"up.weight": FreezeMask((6, 4), rows=[0])})
    assert sf.snapshot(pairs, plan).nbytes == 16
    assert sf.clip_grad_norm_(pairs, 100.0, plan).item() == pytest.approx(math.sqrt(20 + 12))


COMPUTED: dict[str, tuple[Callable[..., Any], str]] = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "'parametrizations.weight.original0' and "),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "'parametrizations.weight.original'"),
    "old weight_norm": (nn.utils.weight_norm, "'weight_g' and "),
    "old spectral_norm": (nn.utils.spectral_norm, "'weight_orig'"),
    "pruning": (lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5), "'weight_orig'"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_weight_that_is_computed_from_others(operation: str, how: str, wrapper: str) -> None:
    """It said that the plan was for another model."""
    layer = nn.Linear(4, 6)
    compute, parts = COMPUTED[how]
    compute(layer)
    params = {wrapper + name: p for name, p in layer.named_parameters()}
    parts = parts.replace("'", f"'{wrapper}", 1)
    with refused(ValueError, f"{operation}: the plan names 'weight'", "computed from", parts, "remove that first"):
        operations(params, FreezePlan({"weight": FreezeMask((6, 4), rows=[0])}))[operation]()


def test_a_plan_by_name_needs_names() -> None:
    with refused(ValueError, "MaskedAdamW", "without names", "model.named_parameters()"):
        MaskedAdamW(parameters().values(), freeze=PLAN)
    opt = MaskedAdamW(parameters().values())
    with refused(ValueError, "MaskedAdamW", "without names", "model.named_parameters()", of=opt):
        opt.set_freeze(PLAN)


def test_set_freeze_refused_keeps_the_plan_in_force() -> None:
    twins = Twins(planned)
    twins.steps([1])
    for kind, plan, words in (
        (ValueError, FreezePlan({"up.weigth": FreezeMask((6, 4))}), ["'up.weigth'", "'up.weight'"]),
        (ValueError, FreezePlan({"up.weight": FreezeMask((4, 6))}), ["(6, 4)", "(4, 6)"]),
        (ValueError, FreezePlan({**PLAN, "up.bias": FreezeMask((7,))}), ["'up.bias'", "(6,)", "(7,)"]),
        (TypeError, {"up.weight": FreezeMask((6, 4))}, ["set_freeze", "dict", "FreezePlan"]),
    ):
        with refused(kind, "MaskedAdamW", *words, of=twins.opt):
            twins.opt.set_freeze(plan)
        assert twins.opt.plan == PLAN
    twins.steps([2])
    twins.assert_same()


# ------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("cls", [MaskedAdam, MaskedAdamW])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex32], ids=str)
def test_dtypes_that_cannot_be_stepped(cls: Any, dtype: torch.dtype) -> None:
    odd = nn.Parameter(torch.zeros(4, 3).to(dtype))
    words = [cls.__name__, "'odd.weight'", str(dtype), "expected float32, bfloat16, float16", "requires_grad_(False)"]
    with refused(TypeError, *words):
        cls([("fine.weight", nn.Parameter(torch.zeros(2))), ("odd.weight", odd)])
    opt = cls([("fine.weight", nn.Parameter(torch.zeros(2)))])
    with refused(TypeError, *words, of=opt):
        opt.add_param_group({"params": [("odd.weight", odd)]})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_what_does_not_train_may_have_any_dtype_until_it_gets_a_gradient(dtype: torch.dtype) -> None:
    odd = nn.Parameter(torch.zeros(4, 3).to(dtype), requires_grad=False)
    params = parameters()
    opt = MaskedAdamW([*params.items(), ("odd.weight", odd)], freeze=PLAN)
    steps(opt, params, [1])
    odd.grad = torch.zeros(4, 3).to(dtype)
    give_gradients(params, 2)
    with refused(TypeError, "MaskedAdamW", "'odd.weight'", str(dtype), "expected float32", of=opt):
        opt.step()
    odd.grad = None
    steps(opt, params, [2])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="of a compiled backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_named_compiled_backend_takes_no_float64(dtype: torch.dtype) -> None:
    wide = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
    words = ["MaskedAdamW", "'cpu'", str(dtype).removeprefix("torch."), "backend='auto'"]
    with refused(ValueError, *words):
        MaskedAdamW([("wide", wide)], backend="cpu")
    opt = MaskedAdamW([("fine", nn.Parameter(torch.zeros(2))), ("wide", wide.requires_grad_(False))], backend="cpu")
    wide.requires_grad_().grad = torch.zeros(4, 3, dtype=dtype)
    with refused(ValueError, *words, of=opt):
        opt.step()


def test_complex_moments_cannot_be_bfloat16() -> None:
    with refused(TypeError, "MaskedAdamW", "'w'", "complex64", "state_dtype", "torch.bfloat16"):
        MaskedAdamW([("w", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))], state_dtype=torch.bfloat16)


def test_moments_of_real_numbers_are_no_moments_of_complex_ones() -> None:
    opts = []
    for dtype in (torch.float32, torch.complex64):
        p = nn.Parameter(torch.zeros(3, dtype=dtype))
        p.grad = torch.ones_like(p)
        opts.append(MaskedAdamW([("w", p)]))
        opts[-1].step()
    for opt, other in (opts, opts[::-1]):
        with refused(ValueError, "load_state_dict", "exp_avg of 'w'", "complex64", "float32", of=opt):
            opt.load_state_dict(other.state_dict())


def test_a_dtype_changed_later_is_refused_at_the_step() -> None:
    params, opt = planned()
    steps(opt, params, [1])
    params["down.weight"].data = params["down.weight"].data.double()
    with refused(ValueError, "MaskedAdamW", "'down.weight'", "torch.float32", "expected float64", of=opt):
        opt.step()


SELF_OVERLAPPING = {
    "expanded rows": lambda: torch.zeros(1, 4).expand(6, 4),
    "expanded columns": lambda: torch.zeros(6, 1).expand(6, 4),
    "expanded scalar": lambda: torch.zeros(()).expand(6, 4),
    "windows": lambda: torch.zeros(9).as_strided((6, 4), (1, 1)),
    "windows far apart": lambda: torch.zeros(33).as_strided((6, 4), (4, 4)),
}


@pytest.mark.parametrize("how", SELF_OVERLAPPING)
def test_parameters_that_overlap_themselves(how: str) -> None:
    with refused(TypeError, "MaskedAdamW", "overlaps itself", "clone()"):
        MaskedAdamW([("up.weight", nn.Parameter(SELF_OVERLAPPING[how]()))])
    params, opt = planned()
    steps(opt, params, [1])
    params["up.weight"].data = SELF_OVERLAPPING[how]()
    with refused(TypeError, "MaskedAdamW", "'up.weight'", "overlaps itself", "clone()", of=opt):
        opt.step()


def test_guard_refuses_what_it_cannot_copy() -> None:
    for p, words in (
        (nn.Parameter(torch.zeros(6, 4).to_sparse()), ["sparse", "expected a dense"]),
        (nn.Parameter(torch.zeros(6, 4).to(torch.float8_e4m3fn)), ["float8_e4m3fn", "expected float32"]),
        (nn.Parameter(torch.zeros(1, 4).expand(6, 4)), ["overlaps itself", "clone()"]),
    ):
        model = nn.Module()
        model.weight = p
        sgd, plan = torch.optim.SGD(model.parameters(), lr=0.1), FreezePlan({"weight": FreezeMask((6, 4), rows=[0])})
        with refused(TypeError, "guard", "'weight'", *words):
            sf.guard(sgd, plan, model)


# ------------------------------------------------------------------------------------------------ gradients


def _grad_dtype(p: Param) -> None:
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    half = p.grad.bfloat16()
    p.grad = None
    p.grad_dtype = torch.bfloat16
    p.grad = half


def _data(of: Callable[[Tensor], Tensor]) -> Callable[[Param], None]:
    """The gradient becomes ``of`` it, in a way that torch does not look at."""
    return lambda p: setattr(p.grad, "data", of(p.grad.data))


WRONG_GRADIENTS: dict[str, tuple[Callable[[Param], None], list[str]]] = {
    "shape": (_data(lambda g: torch.ones(g.shape[::-1])), ["shape (6, 4)", "expected (4, 6)"]),
    "rows": (_data(lambda g: torch.ones_like(g[1:])), ["shape (3, 6)", "expected (4, 6)"]),
    "dtype": (_data(Tensor.double), ["torch.float64", "expected", "float32"]),
    "narrower": (_data(Tensor.bfloat16), ["torch.bfloat16", "expected", "float32"]),
    "grad_dtype": (_grad_dtype, ["torch.bfloat16", "expected", "float32"]),
    "sparse": (lambda p: setattr(p, "grad", torch.ones(p.shape).to_sparse()),
               ["torch.sparse_coo", "expected a dense one"]),
    "device": (lambda p: setattr(p, "stand_in", torch.ones(p.shape, device="meta")), ["meta", "expected"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "age"),
    # torch itself keeps a gradient on its parameter's device; a stand-in gets as far as the first step only
    [
        *((fault, "first step") for fault in WRONG_GRADIENTS),
        *((f, "third step") for f in WRONG_GRADIENTS if f != "device"),
    ],
)
def test_a_wrong_gradient_changes_nothing_and_loses_nothing(fault: str, age: str) -> None:
    spoil, words = WRONG_GRADIENTS[fault]
    twins = Twins(lambda: planned(weight_decay=0.1))
    done = 0 if age == "first step" else 2
    twins.steps(range(done))
    give_gradients(twins.params, done)
    last = twins.params["down.weight"]  # the others might have been stepped already
    spoil(last)
    with refused((ValueError, TypeError, RuntimeError), "MaskedAdamW", "'down.weight'", *words, of=twins.opt):
        twins.opt.step()
    last.stand_in = last.grad = None
    if hasattr(last, "grad_dtype"):
        last.grad_dtype = torch.float32
    twins.steps(range(done, done + 2))
    twins.assert_same()


@pytest.mark.parametrize("operation", ["guard", "zero_frozen_grads_", "clip_grad_norm_"])
@pytest.mark.parametrize("fault", ["shape", "rows", "dtype", "sparse"])
def test_a_wrong_gradient_elsewhere(operation: str, fault: str) -> None:
    spoil, words = WRONG_GRADIENTS[fault]
    params = parameters()
    model, sgd = module_of(params), torch.optim.SGD(params.values(), lr=0.1)
    if operation == "guard":
        sf.guard(sgd, PLAN, model)
    run = {
        "guard": sgd.step,
        "zero_frozen_grads_": lambda: sf.zero_frozen_grads_(model, PLAN),
        "clip_grad_norm_": lambda: sf.clip_grad_norm_(model, 1e-3, PLAN),
    }[operation]
    give_gradients(params, 1)
    spoil(params["down.weight"])
    with refused((ValueError, TypeError, RuntimeError), operation, "'down.weight'", *words, of=sgd):
        run()


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "a part"])
@pytest.mark.parametrize("operation", ["zero_frozen_grads_", "clip_grad_norm_"])
def test_a_model_on_the_meta_device(operation: str, whole: bool) -> None:
    params: dict[str, Any] = parameters()
    give_gradients(params, 1)
    for name in SHAPES if whole else ["down.weight"]:
        params[name] = nn.Parameter(torch.zeros(SHAPES[name], device="meta"))
        params[name].grad = torch.zeros(SHAPES[name], device="meta")
    watched = torch.optim.SGD(params.values(), lr=0.1)
    with refused((ValueError, TypeError), operation, "meta", of=watched):
        if operation == "clip_grad_norm_":
            sf.clip_grad_norm_(params, 1e-3, PLAN)
        else:
            sf.zero_frozen_grads_(params, PLAN)


def test_a_parameter_on_the_meta_device() -> None:
    p = nn.Parameter(torch.zeros(2, 3, device="meta"))
    p.grad = torch.zeros(2, 3, device="meta")
    opt = MaskedAdamW([("w", p)])
    with refused(ValueError, "MaskedAdamW", "'w'", "meta", "materialise", of=opt):
        opt.step()


def test_sparse_gradients_of_an_embedding_name_the_remedy() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    opt = MaskedAdamW(embedding.named_parameters(), freeze=FreezePlan({"weight": FreezeMask((4, 3), rows=[0])}))
    embedding(torch.tensor([1, 2])).sum().backward()
    with refused(RuntimeError, "MaskedAdamW", "'weight'", "sparse", "sparse=False", of=opt):
        opt.step()


# ------------------------------------------------------------------------------------------------ hyper-parameters

NAN, INF = math.nan, math.inf
WRONG_VALUES = [
    ("lr", -1e-3, "learning rate: -0.001"),
    ("lr", NAN, "learning rate: nan"),
    ("lr", INF, "learning rate: inf"),
    ("lr", torch.tensor(NAN), "learning rate: nan"),
    ("lr", torch.tensor(-1.0), "learning rate: -1"),
    ("betas", (-0.1, 0.9), "beta parameter at index 0: -0.1"),
    ("betas", (1.0, 0.9), "beta parameter at index 0: 1.0"),
    ("betas", (0.9, 1.5), "beta parameter at index 1: 1.5"),
    ("betas", (NAN, 0.9), "beta parameter at index 0: nan"),
    ("betas", (0.9, NAN), "beta parameter at index 1: nan"),
    ("betas", (0.9, INF), "beta parameter at index 1: inf"),
    ("eps", -1e-8, "epsilon value: -1e-08"),
    ("eps", NAN, "epsilon value: nan"),
    ("eps", INF, "epsilon value: inf"),
    ("weight_decay", -0.1, "weight_decay value: -0.1"),
    ("weight_decay", NAN, "weight_decay value: nan"),
    ("weight_decay", INF, "weight_decay value: inf"),
]
wrong_values = pytest.mark.parametrize(
    ("key", "value", "words"), WRONG_VALUES, ids=[f"{k}={v}" for k, v, _ in WRONG_VALUES]
)


@wrong_values
@pytest.mark.parametrize("cls", [MaskedAdam, MaskedAdamW])
def test_wrong_hyper_parameters_at_construction(cls: Any, key: str, value: Any, words: str) -> None:
    params = parameters()
    with refused(ValueError, f"Invalid {words}"):
        cls(params.items(), **{key: value}, freeze=PLAN)
    with refused(ValueError, f"Invalid {words}"):
        cls([{"params": list(params.items()), key: value}], freeze=PLAN)


@wrong_values
def test_wrong_hyper_parameters_of_an_added_group(key: str, value: Any, words: str) -> None:
    opt = MaskedAdamW(parameters().items(), freeze=PLAN)
    with refused(ValueError, f"Invalid {words}", of=opt):
        opt.add_param_group({"params": [("other", nn.Parameter(torch.zeros(2)))], key: value})
    opt.add_param_group({"params": [("other", nn.Parameter(torch.zeros(2)))]})
    assert len(opt.param_groups) == 2


@wrong_values
@pytest.mark.parametrize("age", ["first step", "third step"])
def test_hyper_parameters_that_go_wrong_mid_run(age: str, key: str, value: Any, words: str) -> None:
    def build() -> tuple[dict[str, Any], MaskedAdamW]:
        params = parameters()
        first, *others = params.items()
        # the healthy groups come first, in launches of their own and in the broken group's
        groups = [{"params": [first], "amsgrad": True}, {"params": [others[0]]}, {"params": [others[1]]}]
        return params, MaskedAdamW(groups, freeze=PLAN)

    twins = Twins(build)
    done = 0 if age == "first step" else 2
    twins.steps(range(done))
    give_gradients(twins.params, done)
    group = twins.opt.param_groups[2]
    group[key], good = value, group[key]
    with refused(ValueError, f"Invalid {words}", of=twins.opt):
        twins.opt.step()
    group[key] = good
    twins.steps(range(done, done + 2))
    twins.assert_same()


def test_a_scheduler_that_runs_into_nan() -> None:
    params = parameters()
    opt = MaskedAdamW(params.items(), lr=1e-2, freeze=PLAN)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 if step < 2 else NAN)
    for seed in range(2):
        steps(opt, params, [seed])
        scheduler.step()
    give_gradients(params, 9)
    with refused(ValueError, "learning rate: nan", of=opt):
        opt.step()


def test_a_learning_rate_tensor_that_becomes_nan_in_place() -> None:
    params, lr = parameters(), torch.tensor(1e-2)
    opt = MaskedAdamW(params.items(), lr=lr, freeze=PLAN)
    steps(opt, params, [1])
    give_gradients(params, 2)
    lr.fill_(NAN)
    with refused(ValueError, "learning rate: nan", of=opt):
        opt.step()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"state_dtype": torch.float16}, ValueError, ["MaskedAdamW: state_dtype is torch.float16", "torch.bfloat16"]),
        ({"differentiable": True}, ValueError, ["MaskedAdamW: differentiable=True", "torch.optim"]),
        ({"fused": True, "foreach": True}, RuntimeError, ["fused", "foreach"]),
        ({"lr": torch.ones(2)}, ValueError, ["lr", "1-element"]),
        ({"betas": (torch.tensor(0.9), 0.9)}, ValueError, ["betas", "both"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_not_offered(options: dict[str, Any], kind: type[Exception], words: list[str]) -> None:
    with refused(kind, *words):
        MaskedAdamW(parameters().items(), **options)


# ------------------------------------------------------------------------------------------------ backends


def with_backend(name: str) -> dict[str, Callable[[], Any]]:
    params = parameters()
    give_gradients(params, 1)
    model = nn.ParameterDict({"w": params["up.weight"]})
    plan = FreezePlan({"w": PLAN["up.weight"]})
    return {
        "MaskedAdamW": lambda: MaskedAdamW(params.items(), freeze=PLAN, backend=name),
        "guard": lambda: sf.guard(torch.optim.SGD(model.parameters(), lr=0.1), plan, model, backend=name),
        "zero_frozen_grads_": lambda: sf.zero_frozen_grads_(model, plan, backend=name),
        "clip_grad_norm_": lambda: sf.clip_grad_norm_(model, 1.0, plan, backend=name),
    }


@pytest.mark.parametrize("operation", with_backend("auto"))
def test_an_unknown_backend_lists_the_known_ones(operation: str) -> None:
    for name in ("gpu", "", "CPU"):
        with refused(ValueError, f"{operation}: ", repr(name), "'auto'", "'reference'", "'cpu'"):
            with_backend(name)[operation]()


@pytest.mark.parametrize("operation", with_backend("auto"))
def test_a_named_backend_that_does_not_run_never_falls_back(operation: str) -> None:
    absent = {name: state for name, state in backend_states().items() if isinstance(state, str)}
    if not absent:
        pytest.skip("every backend runs here")
    for name, reason in absent.items():
        with refused(BackendUnavailableError, f"{operation}: ", repr(name), reason):
            with_backend(name)[operation]()


def test_a_missing_extension_is_said_once_and_a_named_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from safefreeze_kernels.kernels import backend as kernels

    state = kernels.backend_state
    monkeypatch.setattr(
        kernels, "backend_state", lambda name: "the C++ extension is not built" if name == "cpu" else state(name)
    )
    kernels._warn_once.cache_clear()
    kernels._fastest.cache_clear()
    params = parameters()
    with refused(BackendUnavailableError, "cpu", "not built"):
        steps(MaskedAdamW(params.items(), freeze=PLAN, backend="cpu"), params, [1])
    with pytest.warns(RuntimeWarning, match="slow 'reference' backend.*not built") as said:
        steps(MaskedAdamW(params.items(), freeze=PLAN), params, [1, 2])
    assert len(said) == 1
    kernels._warn_once.cache_clear()
    kernels._fastest.cache_clear()


# ------------------------------------------------------------------------------------------------ state


def test_state_of_another_plan() -> None:
    params, others = parameters(), parameters()
    opt = MaskedAdamW(params.items(), freeze=PLAN)
    steps(opt, params, [1, 2])
    other = MaskedAdamW(others.items(), freeze=FreezePlan({**PLAN, "up.weight": FreezeMask((6, 4), rows=[1, 2])}))
    steps(other, others, [1, 2])
    unmasked = MaskedAdamW(parameters().items())
    for target in (opt, unmasked):
        words = ["MaskedAdamW.load_state_dict", "'up.weight'", "another freeze plan", "dense_state_dict()"]
        with refused(ValueError, *words, of=target):
            target.load_state_dict(other.state_dict())
    opt.load_state_dict(other.dense_state_dict())
    unmasked.load_state_dict(other.dense_state_dict())
    steps(opt, params, [3])


def test_state_of_other_shapes() -> None:
    params = parameters()
    opt = MaskedAdamW(params.items())
    steps(opt, params, [1])
    wider = parameters({"up.weight": (6, 4), "up.bias": (6,), "down.weight": (4, 7)})
    other = MaskedAdamW(wider.items())
    steps(other, wider, [1])
    with refused(ValueError, "load_state_dict", "exp_avg", "'down.weight'", "(4, 7)", "expected (4, 6)", of=opt):
        opt.load_state_dict(other.state_dict())
    fewer = MaskedAdamW(list(parameters().items())[:2])
    with refused(ValueError, "parameter group", of=opt):
        opt.load_state_dict(fewer.state_dict())


def test_state_of_a_later_version() -> None:
    opt = MaskedAdamW(parameters().items(), freeze=PLAN)
    state_dict = opt.state_dict()
    group = state_dict["param_groups"][0]
    group["freeze"] = group["freeze"].replace('"version": 1', '"version": 4')
    with refused(ValueError, "MaskedAdamW.load_state_dict", "version 4", "reads 1 to 3", "upgrade", of=opt):
        opt.load_state_dict(state_dict)
    for damaged in ("", "{}", '{"version": 1}', 7):
        group["freeze"] = damaged
        with refused(ValueError, "MaskedAdamW.load_state_dict", "param_groups[0]['freeze']", of=opt):
            opt.load_state_dict(state_dict)


MEDDLED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "another shape": (lambda state: state.update(exp_avg=torch.zeros(9, 9)), ["exp_avg", "(9, 9)", "(4, 4)"]),
    "a flat shape": (lambda state: state.update(exp_avg_sq=torch.zeros(16)), ["exp_avg_sq", "(16,)", "(4, 4)"]),
    "full size": (lambda state: state.update(exp_avg=torch.zeros(6, 4)), ["exp_avg", "(6, 4)", "(4, 4)"]),
}


@pytest.mark.parametrize("how", MEDDLED)
def test_state_somebody_wrote_to(how: str) -> None:
    params, opt = planned()
    steps(opt, params, [1])
    give_gradients(params, 2)
    meddle, words = MEDDLED[how]
    meddle(opt.state[params["up.weight"]])
    with refused((ValueError, TypeError), "MaskedAdamW", "'up.weight'", *words, of=opt):
        opt.step()


def _moved(state: dict[str, Tensor]) -> None:  # as offloading does, and back
    for key in ("exp_avg", "exp_avg_sq"):
        state[key].data = state[key].data.clone()


MOVED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "turned_state": lambda state: state.update(exp_avg=state["exp_avg"].t().contiguous().t()),
    "turned_in_place": lambda state: setattr(state["exp_avg"], "data", state["exp_avg"].data.t().contiguous().t()),
    "moved_in_place": _moved,
}


@pytest.mark.parametrize("how", MOVED)
def test_state_that_lies_elsewhere_now_is_used_where_it_lies(how: str) -> None:
    twins = Twins(planned)
    twins.steps([1])
    MOVED[how](twins.opt.state[twins.params["up.weight"]])
    twins.steps([2, 3])
    twins.assert_same()


def test_a_parameter_that_shrank_is_refused() -> None:
    params = parameters()
    opt = MaskedAdamW(params.items())
    steps(opt, params, [1])
    p = params["up.weight"]
    p.grad = None
    p.data = p.data[:3]
    p.grad = random_normal(2, 6, 4)[:3]
    with refused((ValueError, TypeError), "MaskedAdamW", "'up.weight'", "(3, 4)", "(6, 4)", of=opt):
        opt.step()


# ------------------------------------------------------------------------------------------------ wrong arguments


def test_wrong_arguments_of_the_clip() -> None:
    params = parameters()
    give_gradients(params, 1)
    watched = torch.optim.SGD(params.values(), lr=0.1)
    for max_norm in (-1.0, NAN):
        with refused(ValueError, "clip_grad_norm_: max_norm", str(max_norm), "expected", of=watched):
            sf.clip_grad_norm_(params, max_norm, PLAN)
    for norm_type in (0.0, 3.0, -INF, NAN):
        with refused(ValueError, "clip_grad_norm_: norm_type", str(norm_type), "2.0, 1.0 or inf", of=watched):
            sf.clip_grad_norm_(params, 1.0, PLAN, norm_type=norm_type)
    # zero_frozen_grads_ takes its plan second, so this slip is near
    with refused(TypeError, "clip_grad_norm_: max_norm", "FreezePlan", of=watched):
        sf.clip_grad_norm_(params, PLAN, 1.0)  # type: ignore[call-overload]


@pytest.mark.parametrize("model", [[1, 2], {"w": 3}, 5, "model"], ids=str)
def test_a_model_that_is_none(model: Any) -> None:
    for run in (
        lambda: sf.snapshot(model, FreezePlan()),
        lambda: sf.zero_frozen_grads_(model, FreezePlan()),
        lambda: sf.clip_grad_norm_(model, 1.0),
    ):
        with refused(TypeError, "torch.nn.Module", "name -> tensor"):
            run()


def test_no_parameters_at_all() -> None:
    with refused(ValueError, "empty parameter list"):
        MaskedAdamW([])
    with refused(TypeError, "Tensor"):
        MaskedAdamW(torch.zeros(2))


# ------------------------------------------------------------------------------------------------ odd but right

ODD_SHAPES = {
    "scalar": (), "one": (1,), "none": (0,), "no rows": (0, 4), "no columns": (3, 0), "deep": (2, 0, 3),
    "weight": (5, 4),
}  # fmt: skip


def test_zero_size_and_0_dim_parameters_step_like_torch() -> None:
    plan = FreezePlan(
        {
            "none": FreezeMask((0,)),
            "no rows": FreezeMask((0, 4), cols=[1]),
            "no columns": FreezeMask((3, 0), rows=[1]),
            "deep": FreezeMask((2, 0, 3)),
            "weight": FreezeMask((5, 4), rows=[1]),
        }
    )
    ours, theirs = parameters(ODD_SHAPES), parameters(ODD_SHAPES)
    opt = MaskedAdamW(ours.items(), lr=1e-2, weight_decay=0.1, freeze=plan)
    stock = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    steps(opt, ours, range(3))
    steps(stock, theirs, range(3))
    for name, p in ours.items():
        live = ~plan[name].dense() if name in plan else torch.ones(p.shape, dtype=torch.bool)
        torch.testing.assert_close(
            p[live], theirs[name][live], rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert_same_bits(ours["weight"][1], parameters(ODD_SHAPES)["weight"][1], "the frozen row")
    opt.load_state_dict(opt.state_dict())
    opt.set_freeze(FreezePlan({"scalar": FreezeMask((), rows=[0]), "one": FreezeMask((1,), rows=[0])}))
    before = ours["scalar"].detach().clone(), ours["one"].detach().clone()
    steps(opt, ours, range(3, 5))
    assert_same_bits(ours["scalar"], before[0], "the frozen scalar")
    assert_same_bits(ours["one"], before[1], "the frozen entry")


@pytest.mark.parametrize("frozen", [False, True])
def test_zero_size_and_0_dim_tensors_everywhere_else(frozen: bool) -> None:
    params = parameters(ODD_SHAPES)
    give_gradients(params, 1)
    masks = {name: FreezeMask(p.shape) for name, p in params.items()}
    if frozen:
        masks = {n: FreezeMask(p.shape, elements=torch.ones(p.shape, dtype=torch.bool)) for n, p in params.items()}
    plan = FreezePlan(masks)
    model = nn.ParameterDict(dict(params))
    before = {name: p.detach().clone() for name, p in params.items()}
    proof = sf.snapshot(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = sf.guard(optimizer, plan, model)
    norm = sf.clip_grad_norm_(model, 1e9, plan)
    expected = 0.0 if frozen else math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params.values()))
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    sf.zero_frozen_grads_(model, plan)
    assert all(bool((p.grad == 0).all()) is (frozen or p.numel() == 0) for p in params.values())
    optimizer.step()
    assert proof.nbytes == guard.nbytes == (22 * 4 if frozen else 0)
    proof.verify(model)
    for name, p in params.items():
        if frozen:
            assert_same_bits(p, before[name], name)


def _turned(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(*reversed(shape)).permute(*reversed(range(len(shape))))


LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "transposed": _turned,
    "every second column": lambda shape: torch.zeros(*shape[:-1], shape[-1] * 2)[..., ::2],
    "every second row": lambda shape: torch.zeros(shape[0] * 2, *shape[1:])[::2],
    "part of a row": lambda shape: torch.zeros(*shape[:-1], shape[-1] + 3)[..., 1:-2],
    "one of a last dimension": lambda shape: torch.zeros(*shape, 3)[..., 1],
    "offset": lambda shape: torch.zeros(math.prod(shape) + 3)[3:].view(shape),
}


@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)], ids=str)
def test_strided_tensors_step_like_contiguous_ones(shape: tuple[int, ...], layout: str, which: str) -> None:
    def laid_out(values: Tensor) -> Tensor:
        strided = LAYOUTS[layout](shape)
        strided.untyped_storage().copy_(
            torch.full_like(torch.empty(strided.untyped_storage().size() // 4), 7.0).untyped_storage()
        )
        return strided.copy_(values)

    everything_else = torch.zeros(shape, dtype=torch.bool)
    everything_else.view(-1)[::5] = True
    for mask in (
        FreezeMask(shape),
        FreezeMask(shape, rows=[0, 3]),
        FreezeMask(shape, cols=[1, 2]),
        FreezeMask(shape, rows=[2], cols=[0], elements=everything_else),
    ):
        values = random_normal(1, *shape)
        odd = nn.Parameter(laid_out(values) if which != "gradient" else values.clone())
        even = nn.Parameter(values.clone())
        first = odd.detach().clone()
        storage = odd.untyped_storage()
        around = torch.empty(0).set_(storage).clone()
        plan = FreezePlan({"w": mask})
        opts = [MaskedAdamW([("w", p)], lr=1e-2, weight_decay=0.1, freeze=plan) for p in (odd, even)]
        for seed in range(3):
            grad = random_normal(seed + 10, *shape)
            odd.grad = laid_out(grad) if which != "parameter" else grad.clone()
            even.grad = grad
            for opt in opts:
                opt.step()
        assert not odd.is_contiguous() or which == "gradient" or layout == "offset"
        assert_same_bits(odd, even, f"{mask!r}")
        assert_same_bits(odd, first, f"{mask!r}: frozen elements", where=mask.dense())
        if which != "gradient":  # what lies between the parameter's elements
            inside = torch.zeros_like(around)
            torch.as_strided(inside, shape, odd.stride(), odd.storage_offset()).fill_(1.0)
            assert_same_bits(torch.empty(0).set_(storage), around, f"{mask!r}: neighbours", where=inside == 0)


def test_an_expanded_gradient_steps_like_a_full_one() -> None:
    plan = FreezePlan({"w": FreezeMask((6, 4), rows=[1], cols=[2])})
    ours = {key: {"w": nn.Parameter(random_normal(1, 6, 4))} for key in ("expanded", "full")}
    for key, params in ours.items():
        opt = MaskedAdamW(params.items(), lr=1e-2, freeze=plan)
        for seed in range(3):
            grad = random_normal(seed, 4).expand(6, 4)
            params["w"].grad = grad if key == "expanded" else grad.contiguous()
            opt.step()
    assert_same_bits(ours["expanded"]["w"], ours["full"]["w"], "parameter")


def test_a_parameter_turned_in_memory_mid_run_is_stepped_as_it_lies_now() -> None:
    plan = FreezePlan({"w": FreezeMask((4, 4), rows=[1])})
    turned, twin = {"w": nn.Parameter(random_normal(1, 4, 4))}, {"w": nn.Parameter(random_normal(1, 4, 4))}
    opts = [(MaskedAdamW(p.items(), lr=1e-2, weight_decay=0.1, freeze=plan), p) for p in (turned, twin)]
    for opt, params in opts:
        steps(opt, params, [1])
    with torch.no_grad():  # the same memory, read the other way round
        turned["w"].data = turned["w"].data.t()
        twin["w"].data = twin["w"].data.t().contiguous()
    frozen = twin["w"].detach()[1].clone()
    for opt, params in opts:
        steps(opt, params, [2, 3])
    assert_same_bits(twin["w"][1], frozen, "the twin's frozen row")
    assert_same_bits(turned["w"], twin["w"], "parameter")
