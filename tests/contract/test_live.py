"""`live_gradients`: weight gradients equal plain autograd's where live, and are zero where frozen."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from conftest import assert_same_bits
from family_models import NAMED, model_of
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import find_units, units_from
from safefreeze_kernels.grads import forwards as live
from safefreeze_kernels.grads.linear import LiveLinear
from safefreeze_kernels.model.packed import PackedGradient

SHAPE: Final = (12, 8)
MASKS: Final = {
    "rows": sf.FreezeMask(SHAPE, rows=[0, 2, 3, 5, 7, 8, 10, 11]),
    "columns": sf.FreezeMask(SHAPE, cols=[1, 2, 3, 5, 6]),
    "both": sf.FreezeMask(SHAPE, rows=[0, 4, 5, 6, 11], cols=[0, 2, 7]),
    "all": sf.FreezeMask(SHAPE, rows=range(12)),
}


class Conv1D(nn.Module):
    """As transformers' GPT-2 has it: the weight is (in, out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Net(nn.Module):
    def __init__(self, kind: str = "Linear", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 8)
        self.layer: Any = nn.Linear(8, 12) if kind == "Linear" else Conv1D(12, 8)
        self.last = nn.Linear(12 if kind == "Linear" else 8, 12)
        self.kind = kind
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x if self.kind == "Linear" else torch.nn.functional.pad(x, (2, 2))
        return self.last(torch.tanh(self.layer(x))).square().mean()


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan_of(mask: str | sf.FreezeMask) -> sf.FreezePlan:
    return sf.FreezePlan({"layer.weight": MASKS[mask] if isinstance(mask, str) else mask})


def copies(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same_weights(net: nn.Module, expected: nn.Module | dict[str, Tensor]) -> None:
    right = expected if isinstance(expected, dict) else dict(expected.named_parameters())
    for name, p in net.named_parameters():
        assert_same_bits(p.detach(), right[name].detach(), name)


def frozen_gradient(net: Any, mask: str = "rows") -> Tensor:
    """The elements of ``layer.weight``'s gradient that should not be there."""
    grad = net.layer.weight.grad
    return (grad.to_dense() if isinstance(grad, PackedGradient) else grad)[MASKS[mask].dense()]


def train(net: nn.Module, model: nn.Module, plan: sf.FreezePlan, seeds: int, max_norm: float | None = None) -> None:
    """``net`` trains in ``model``, which is itself or wraps it."""
    optimizer = adamw(net, plan)
    for seed in range(seeds):
        model(batch(seed=seed)).backward()
        if max_norm is not None:
            sf.clip_grad_norm_(net, max_norm, plan)
        optimizer.step()
        optimizer.zero_grad()


def adamw(net: nn.Module, plan: sf.FreezePlan, **options: Any) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(net.named_parameters(), lr=1e-2, freeze=plan, **options)


def live_net(mask: str = "rows", **options: Any) -> tuple[Any, sf.FreezePlan, Any]:
    """A model with live gradients, the plan, and their handle."""
    net, plan = Net(), plan_of(mask)
    return net, plan, sf.live_gradients(net, plan, **options)


FEW: Final = plan_of(sf.FreezeMask(SHAPE, rows=[0]))


def twins(mask: str, net: nn.Module | None = None, **options: Any) -> tuple[Any, Any, sf.FreezePlan]:
    """A model and an equal one that has live gradients."""
    expected = net or Net()
    found, plan = copy.deepcopy(expected), plan_of(mask)
    sf.live_gradients(found, plan, **options)
    return expected, found, plan


def assert_live_alike(found: nn.Module, expected: nn.Module, plan: sf.FreezePlan, tolerance: float = 1e-6) -> None:
    """Zero where frozen. Live: sums of 21 products in another order, a few roundings of values below 1."""
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        frozen = plan[name].dense() if name in plan else torch.zeros(p.shape, dtype=torch.bool)
        assert p.grad is not None and q.grad is not None, name
        grad = p.grad.to_dense() if isinstance(p.grad, PackedGradient) else p.grad
        assert_same_bits(grad, torch.zeros_like(p), name, where=frozen)
        torch.testing.assert_close(
            grad.masked_fill(frozen, 0), q.grad.masked_fill(frozen, 0), rtol=0, atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


STORAGE: Final = pytest.mark.parametrize("storage", ["dense", "packed"])


@STORAGE
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_plain_autograds_where_live(mask: str, kind: str, bias: bool, storage: Any) -> None:
    expected = Net(kind)
    if not bias and kind == "Linear":
        expected.layer.bias = None
    found, plan = copy.deepcopy(expected), plan_of(mask)
    handle = sf.live_gradients(found, plan, storage=storage, most_live=0.9)
    assert [(layer.name, layer.left_alone) for layer in handle.layers] == [("layer.weight", "")]
    assert handle.layers[0].live == pytest.approx(1 - MASKS[mask].frozen_fraction)
    losses = [net(batch()) for net in (expected, found)]
    assert_same_bits(losses[1].detach(), losses[0].detach(), "loss")
    for loss in losses:
        loss.backward()
    assert_live_alike(found, expected, plan)


@STORAGE
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_gradients_of_complex_layers_are_conjugated_as_autograd_does(kind: str, storage: Any) -> None:
    expected, found, plan = twins("both", Net(kind).to(torch.complex64), storage=storage)
    x = torch.complex(batch(), batch(seed=1))
    for net in (expected, found):
        net(x).abs().backward()
    assert_live_alike(found, expected, plan)


@pytest.mark.parametrize("mask", ["rows", "columns", "both"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(mask: str, transposed: bool) -> None:
    """In float64; the weight's gradient only where live, so the frozen part is held as a constant."""
    rows, cols = (torch.from_numpy(index) for index in (MASKS[mask].live_rows, MASKS[mask].live_cols))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12 if transposed else 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(SHAPE, dtype=torch.float64)
    bias = torch.randn(8 if transposed else 12, dtype=torch.float64, requires_grad=True)
    live = weight[rows][:, cols].clone().requires_grad_()

    def function(x: Tensor, live: Tensor, bias: Tensor) -> Tensor:
        whole = weight.index_put((rows[:, None], cols), live)
        return LiveLinear.apply(x, whole, bias, rows, cols, transposed, None)

    assert torch.autograd.gradcheck(function, (x, live, bias))


@STORAGE
def test_accumulation_and_a_module_called_twice(storage: Any) -> None:
    expected, found, plan = twins("rows", storage=storage)
    for net in (expected, found):
        for seed in range(3):
            net(batch(seed=seed)).backward()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
            (net.layer(x).mean() + net.layer(2 * x).square().mean()).backward()
    assert_live_alike(found, expected, plan, 1e-5)


@STORAGE
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool, storage: Any) -> None:
    expected, found, plan = twins("columns", storage=storage)
    for net in (expected, found):
        checkpoint(net, batch().requires_grad_(), use_reentrant=reentrant).backward()
    assert_live_alike(found, expected, plan)


@STORAGE
def test_autocast(storage: Any) -> None:
    expected, found, plan = twins("both", storage=storage, most_live=0.9)
    for net in (expected, found):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(batch())
        loss.backward()
    assert found.layer.weight.grad.dtype == torch.float32
    assert_live_alike(found, expected, plan, 2**-8)  # of bfloat16 products


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    expected, found, plan = twins("rows")
    torch._dynamo.reset()
    torch.compile(found, backend=backend, fullgraph=True)(batch()).backward()
    expected(batch()).backward()
    assert_live_alike(found, expected, plan)


def test_saved_activations_are_the_live_columns() -> None:
    saved: list[int] = []
    net, *_ = live_net("columns")
    x = torch.randn(6, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        net.layer(x)
    assert 6 * MASKS["columns"].live_cols.size in saved and 6 * 8 not in saved


@STORAGE
def test_it_is_undone(storage: Any) -> None:
    net, plan = Net(), plan_of("rows")
    state, names = copy.deepcopy(net.state_dict()), [type(m).__name__ for m in net.modules()]
    with sf.live_gradients(net, plan, storage=storage) as handle:
        assert "forward" in vars(net.layer)
        assert [type(m).__name__ for m in net.modules()] == names and net.state_dict().keys() == state.keys()
        with pytest.raises(ValueError, match=r"'layer\.weight' has live gradients already"):
            sf.live_gradients(net, plan)
    assert "forward" not in vars(net.layer)
    handle.remove()  # once more does nothing
    net(batch()).backward()
    assert (frozen_gradient(net) != 0).any()
    sf.live_gradients(net, plan).remove()


@STORAGE
def test_the_generation_tells_of_every_change(storage: Any) -> None:
    """Who remembers what `check_live_gradients` said must be told; nothing told it."""
    net, plan = Net(), plan_of("rows")
    seen = [live.generation()]
    handle = sf.live_gradients(net, plan, storage=storage)
    seen.append(live.generation())
    net(batch()).backward()
    assert live.generation() == seen[-1]  # training is no change
    handle.remove()
    seen.append(live.generation())
    handle.remove()
    assert live.generation() == seen[-1] and seen == sorted(set(seen))


def test_a_handle_is_entered_once() -> None:
    """A second ``with`` did nothing, or ended the first one's, without a word."""
    _, _, handle = live_net()
    with handle, pytest.raises(RuntimeError, match=r"entered or removed before.*call live_gradients again"):
        handle.__enter__()
    with pytest.raises(RuntimeError, match="entered or removed before"):
        handle.__enter__()


def test_the_input_may_be_given_by_its_name() -> None:
    net, *_ = live_net()
    net.layer(input=torch.ones(8)).sum().backward()
    assert_same_bits(net.layer.weight.grad, (~MASKS["rows"].dense()).float(), "gradient")


def test_a_weight_of_another_shape_is_refused() -> None:
    """Rows added later would have had no gradient."""
    net, _, handle = live_net()
    net.layer.weight = nn.Parameter(torch.ones(15, 8))
    net.layer.bias = None
    with pytest.raises(ValueError, match=r"'layer\.weight' has shape \(15, 8\), expected \(12, 8\) as before"):
        net.layer(torch.ones(8))
    handle.remove()
    net.layer(torch.ones(8)).sum().backward()
    assert_same_bits(net.layer.weight.grad, torch.ones(15, 8), "gradient")


def test_what_is_left_alone_says_why() -> None:
    net = Net()
    net.tied, net.other = nn.Linear(8, 12), nn.Linear(8, 12)
    net.tied.weight = net.other.weight
    elements = torch.zeros(12, 12, dtype=torch.bool)
    elements[:, :6] = torch.eye(12, dtype=torch.bool)[:, :6]
    cases = {
        "layer.weight": (sf.FreezeMask(SHAPE, rows=[0]), "more than 75% of it is live"),
        "layer.bias": (sf.FreezeMask((12,), rows=range(9)), "Linear.bias is no linear layer's weight"),
        "last.weight": (sf.FreezeMask((12, 12), elements=elements), "single elements"),
        "tied.weight": (MASKS["rows"], "several modules share"),
        "first.weight": (sf.FreezeMask((8, 5), rows=range(6)), ""),
    }
    handle = sf.live_gradients(net, sf.FreezePlan({name: mask for name, (mask, _) in cases.items()}))
    for layer in handle.layers:
        _, words = cases[layer.name]
        assert words in layer.left_alone and bool(words) == bool(layer.left_alone), layer
    text = handle.summary()
    begin = "1 of 5 weights have live gradients only (dense); 25.0% of them on average; it pays up to 75%"
    assert text.startswith(begin) and text.count("left alone") == 4
    assert sum(layer.live for layer in handle.layers) == 4.25


def test_a_thawed_weight_needs_its_gradient() -> None:
    net, plan, handle = live_net()
    optimizer = adamw(net, plan)
    net(batch()).backward()
    optimizer.step()
    start = copies(net)
    optimizer.set_freeze(plan_of(sf.FreezeMask(SHAPE, rows=[0, 2])))
    with pytest.raises(ValueError, match=r"'layer\.weight' learns where live_gradients computes no gradient"):
        optimizer.step()
    assert_same_weights(net, start)
    handle.remove()
    with pytest.raises(ValueError, match=r"grad of 'layer\.weight' was computed under live_gradients, without"):
        optimizer.step()
    optimizer.zero_grad()
    net(batch()).backward()
    optimizer.step()
    sf.live_gradients(net, plan)
    optimizer.set_freeze(plan_of("all"))  # freezing more than that is fine
    optimizer.step()


def test_a_second_derivative_is_refused() -> None:
    net, *_ = live_net()
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(net(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((Net(), {"layer.weight": MASKS["rows"]}), TypeError, "plan is a dict, expected a FreezePlan"),
        (([], plan_of("rows")), TypeError, "model is a list, expected a torch.nn.Module"),
        ((Net(), sf.FreezePlan({"leyer.weight": MASKS["rows"]})), ValueError, "nearest: 'layer.weight'"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sf.live_gradients(*arguments)
    with pytest.raises(ValueError, match=r"most_live is 1\.5"):
        sf.live_gradients(Net(), plan_of("rows"), most_live=1.5)
    with pytest.raises(ValueError, match=r"storage is 'sparse', expected 'dense' or 'packed'"):
        sf.live_gradients(Net(), plan_of("rows"), storage="sparse")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- copies, wraps, swapped parameters


def saved(net: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: Final[dict[str, Callable[[Any], Any]]] = {
    "deepcopy": copy.deepcopy,
    "a copy's copy": lambda net: copy.deepcopy(copy.deepcopy(net)),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "a moving average": lambda net: torch.optim.swa_utils.AveragedModel(net).module,
    "of a compiled model": lambda net: copy.deepcopy(torch.compile(net, backend="eager"))._orig_mod,
    "of a list": lambda net: copy.deepcopy([net.layer, net])[1],
    "of a module that holds it": lambda net: copy.deepcopy(nn.Sequential(net))[0],
}


@STORAGE
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_an_ordinary_model(way: str, storage: Any) -> None:
    """It computed with the original's weights, while live gradients were on and after; its gradients went there."""
    net, expected, plan = Net(), Net(), plan_of("rows")
    with sf.live_gradients(net, plan, storage=storage):
        found = COPIES[way](net)
        assert vars(found.layer).keys() == vars(expected.layer).keys()
        train(net, net, plan, 1)
        moved = net.layer.weight.detach().clone()
        for during in (True, False):
            losses = [model(batch()) for model in (found, expected)]
            assert_same_bits(losses[0].detach(), losses[1].detach(), "loss")
            for loss in losses:
                loss.backward()
            assert net.layer.weight.grad is None
            for (name, p), q in zip(found.named_parameters(), expected.named_parameters(), strict=True):
                assert_same_bits(p.grad, q[1].grad, name)
            for model in (found, expected):
                model.zero_grad()
                if during:
                    # it trains by a plan of its own, and may have live gradients of its own
                    with sf.live_gradients(model, FEW, storage=storage, most_live=1.0):
                        train(model, model, FEW, 1)
        net(batch()).backward()
        assert isinstance(net.layer.weight.grad, PackedGradient) == (storage == "packed")
    assert_same_bits(net.layer.weight.detach(), moved, "the original")


@STORAGE
def test_a_pickle_needs_nothing_of_ours(storage: Any) -> None:
    net, *_ = live_net(storage=storage)
    net(batch()).backward()
    assert b"safefreeze" not in pickle.dumps(net)


def test_a_model_may_hold_its_handle() -> None:
    net, _, net.handle = live_net()
    found = copy.deepcopy(net)
    found.handle.remove()
    with pytest.raises(RuntimeError, match="or is a copy"):
        found.handle.__enter__()
    net(batch()).backward()
    assert not frozen_gradient(net).any()


def test_neither_a_model_nor_its_copy_is_kept() -> None:
    net, _, handle = live_net()
    gc.disable()
    try:
        gone = [weakref.ref(copy.deepcopy(net).layer.weight), weakref.ref(net.layer.weight)]
        del net
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
    handle.remove()


def test_a_forward_that_something_else_wrapped() -> None:
    """What it wraps must not go on leaving gradients out once live gradients were removed, nor come into a copy."""
    expected = Net()
    net, plan, handle = live_net()
    layer = net.layer
    layer._old_forward = layer.forward  # as accelerate's hooks do it
    layer.forward = lambda *args: layer._old_forward(*args)
    net(batch()).backward()
    assert not frozen_gradient(net).any()
    found = copy.deepcopy(net)
    assert found.layer._old_forward.__self__ is found.layer
    handle.remove()
    net.zero_grad()
    for model in (net, expected):
        model(batch()).backward()
    assert_same_bits(layer.weight.grad, expected.layer.weight.grad, "while it is wrapped")
    layer.forward = layer._old_forward
    del layer._old_forward
    with sf.live_gradients(net, plan) as again:
        assert not again.layers[0].left_alone
        net.zero_grad()
        net(batch()).backward()
        assert not frozen_gradient(net).any()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_notices_that_they_are_gone(backend: str) -> None:
    net, expected, plan = Net(), Net(), plan_of("rows")
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    with sf.live_gradients(net, plan):
        compiled(batch()).backward()
        assert not frozen_gradient(net).any()
        found = copy.deepcopy(compiled)
    for model in (compiled, found, expected):
        model.zero_grad()
        model(batch()).backward()
    for model in (net, found._orig_mod):
        torch.testing.assert_close(model.layer.weight.grad, expected.layer.weight.grad)


def swap_parameters(net: nn.Module, way: str) -> None:
    if way == "assign":
        net.load_state_dict({name: p.to(torch.bfloat16) for name, p in net.state_dict().items()}, assign=True)
        return
    switch = getattr(torch.__future__, f"set_{way}_module_params_on_conversion", lambda on: None)
    switch(True)
    try:
        net.to(torch.bfloat16)
    finally:
        switch(False)


SWAPS: Final = pytest.mark.parametrize("way", ["data", "swap", "overwrite", "assign"])


@STORAGE
@SWAPS
def test_swapped_parameters_have_live_gradients_too(way: str, storage: Any) -> None:
    """The optimizer was not told that their gradients lack parts, and they could not be asked for a second time."""
    net, plan, handle = live_net(storage=storage)
    swap_parameters(net, way)
    net(batch(torch.bfloat16)).backward()
    grad: Any = net.layer.weight.grad
    assert grad.dtype == torch.bfloat16 and isinstance(grad, PackedGradient) == (storage == "packed")
    assert not frozen_gradient(net).any()
    with pytest.raises(ValueError, match="learns where live_gradients computes no gradient"):
        adamw(net, FEW).step()
    with pytest.raises(ValueError, match="has live gradients already"):
        sf.live_gradients(net, plan)
    handle.remove()
    net.zero_grad()
    net(batch(torch.bfloat16)).backward()
    assert type(net.layer.weight.grad) is Tensor and frozen_gradient(net).any()
    adamw(net, FEW).step()


@STORAGE
def test_lent_tensors_have_ordinary_gradients(storage: Any) -> None:
    """A score of weights by their gradients found none where the training plan freezes; `torch.func` did not run."""
    net, plan = Net(), plan_of("rows")
    lent = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    net(batch()).backward()
    expected = net.layer.weight.grad
    net.zero_grad()
    with sf.live_gradients(net, plan, storage=storage):
        torch.func.functional_call(net, lent, batch()).backward()
        held = {name: p.detach() for name, p in net.named_parameters()}
        found = torch.func.grad(lambda held: torch.func.functional_call(net, held, batch()))(held)
        assert net.layer.weight.grad is None
    assert_same_bits(lent["layer.weight"].grad, expected, "functional_call")
    assert_same_bits(found["layer.weight"], expected, "torch.func.grad")


# ------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("way", ["data", "swap", "overwrite"])
def test_a_packed_gradient_is_converted_with_its_weight(way: str) -> None:
    """What it held kept its dtype when torch set ``data``: the gradient said bfloat16, and the optimizer float32."""
    net, plan, _ = live_net(storage="packed")
    net(batch()).backward()
    right = net.layer.weight.grad.packed.to(torch.bfloat16)
    swap_parameters(net, way)
    grad = net.layer.weight.grad
    assert isinstance(grad, PackedGradient) and grad.dtype == torch.bfloat16
    assert_same_bits(grad.packed, right, "packed")
    adamw(net, plan).step()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_packed_gradients(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, *_ = live_net(storage="packed")
    net(batch()).backward()
    grad = net.layer.weight.grad
    right = grad.packed.clone()
    monkeypatch.setattr(PackedGradient, "seen", False)  # as in another process
    found = COPIES[way](grad)
    assert PackedGradient.seen  # torch's own optimizers refuse it before they change anything
    assert isinstance(found, PackedGradient) and found.mask == grad.mask and found.shape == SHAPE
    grad.zero_()
    assert_same_bits(found.packed, right, "its own values")


def packed_and_dense(mask: str, dtype: torch.dtype = torch.float32) -> tuple[list[Net], sf.FreezePlan]:
    """Two equal models with live gradients: the gradients of the first are packed."""
    nets, plan = [Net(dtype=dtype), Net(dtype=dtype)], plan_of(mask)
    for net, storage in zip(nets, ("packed", "dense"), strict=True):
        sf.live_gradients(net, plan, storage=storage, most_live=0.9)  # type: ignore[arg-type]
    return nets, plan


def shard(net: Net) -> None:
    """FSDP2, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for layer in (net.first, net.layer, net.last, net):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"capturable": True}, {"backend": "reference"}, {"dtype": torch.bfloat16},
     {"dtype": torch.bfloat16, "master": "remainder"}, {"dtype": torch.bfloat16, "rounding": "stochastic"}],
    ids=str,
)  # fmt: skip
def test_training_with_packed_gradients_is_the_same(mask: str, options: dict[str, Any]) -> None:
    """Accumulated, clipped in both ways, stepped: the same bits as with full-size gradients that are zero elsewhere."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    nets, plan = packed_and_dense(mask, dtype)
    start = nets[0].layer.weight.detach().clone()
    optimizers = [adamw(n, plan, **options) for n in nets]
    for step in range(6):
        norms = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            for seed in range(2):
                net(batch(dtype, seed=2 * step + seed)).backward()
            sf.zero_frozen_grads_(net, plan)  # nothing to do
            clipped_inside = {"optimizer": optimizer} if step % 2 else {}
            norms.append(sf.clip_grad_norm_(net, 0.05, plan, return_raw=True, **clipped_inside))
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 3)
        # sums of the same squares, those of zeros left out
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
        assert norms[0].live == norms[0].raw
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7, msg=name)
    assert_same_bits(nets[0].layer.weight.detach(), start, "frozen", where=MASKS[mask].dense())
    held = optimizers[0].state[nets[0].layer.weight]["exp_avg"]
    assert held.shape == MASKS[mask].packed_shape


def test_unclipped_steps_are_the_same_bits() -> None:
    nets, plan = packed_and_dense("both")
    for net in nets:
        train(net, net, plan, 4)
    assert_same_weights(*nets)


def test_a_packed_gradient_takes_the_live_share() -> None:
    net, *_ = live_net("both", storage="packed", most_live=0.9)
    net(batch()).backward()
    grad = net.layer.weight.grad
    assert grad.shape == SHAPE and grad.packed.shape == MASKS["both"].packed_shape
    assert grad.packed.untyped_storage().nbytes() == 4 * MASKS["both"].live_count
    assert "35 of 96 elements held" in repr(grad)
    net.zero_grad()
    assert net.layer.weight.grad is None


def test_storage_may_change_between_steps() -> None:
    """What is there is read: packed, dense, packed again; the optimizer and clipping notice."""
    nets, plan = [Net(), Net()], plan_of("rows")
    optimizers = [adamw(net, plan) for net in nets]
    for step in range(6):
        storage: Any = "packed" if step % 2 else "dense"
        with sf.live_gradients(nets[0], plan, storage=storage), sf.live_gradients(nets[1], plan):
            for net, optimizer in zip(nets, optimizers, strict=True):
                net(batch(seed=step)).backward()
                assert (type(net.layer.weight.grad) is PackedGradient) == (net is nets[0] and storage == "packed")
                sf.clip_grad_norm_(net, 1e6, plan)
                optimizer.step()
                optimizer.zero_grad()
    assert_same_weights(*nets)


def test_torchs_own_clipping_and_scaler_take_packed_gradients() -> None:
    nets, plan = packed_and_dense("rows")
    norms = []
    for net in nets:
        optimizer = adamw(net, plan)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(net(batch())).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05, foreach=net is nets[0]))
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(norms[0], norms[1])
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_compiled_model_runs_packed_layers_outside_the_graph() -> None:
    expected, found, plan = twins("rows", storage="packed")
    torch._dynamo.reset()
    torch.compile(found, backend="aot_eager")(batch()).backward()
    expected(batch()).backward()
    assert isinstance(found.layer.weight.grad, PackedGradient)
    assert_live_alike(found, expected, plan)


def guarded_before(net: Net, grad: Tensor) -> torch.optim.Optimizer:
    net.layer.weight.grad = None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sf.guard(optimizer, plan_of("rows"), net)
    net.layer.weight.grad = grad
    return optimizer


NEEDS_ORDINARY: Final[dict[str, Any]] = {
    "SGD": lambda net, g: torch.optim.SGD(net.parameters(), lr=0.1).step(),
    "AdamW": lambda net, g: torch.optim.AdamW(net.parameters(), lr=0.1).step(),
    "Adagrad": lambda net, g: torch.optim.Adagrad(net.parameters(), lr=0.1).step(),
    "fused AdamW": lambda net, g: torch.optim.AdamW(net.parameters(), lr=0.1, fused=True).step(),
    "guard": lambda net, g: sf.guard(torch.optim.SGD(net.parameters(), lr=0.1), plan_of("rows"), net),
    "guard made before": lambda net, g: guarded_before(net, g).step(),
    "a sum with numbers": lambda net, g: g + 1.0,
    "a sum with an ordinary one": lambda net, g: g.add_(torch.zeros(SHAPE)),
    "an ordinary one's": lambda net, g: torch.zeros(SHAPE).add_(g),
    "a product with a mask": lambda net, g: g.mul_(torch.ones(SHAPE)),
    "a product into a buffer": lambda net, g: torch.mul(g, torch.tensor(0.5), out=torch.zeros(SHAPE)),
    "a norm per row": lambda net, g: torch.linalg.vector_norm(g, dim=1),
    "the smallest": lambda net, g: torch.linalg.vector_norm(g, -float("inf")),
    "indexing": lambda net, g: g[0],
    "other places": lambda net, g: g.add_(PackedGradient(torch.zeros(7, 8), sf.FreezeMask(SHAPE, rows=range(5)))),
}  # fmt: skip


@pytest.mark.parametrize("what", NEEDS_ORDINARY)
def test_what_needs_an_ordinary_gradient_is_refused(what: str) -> None:
    net, *_ = live_net(storage="packed")
    net(batch()).backward()
    before = net.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"storage='dense'"):
        NEEDS_ORDINARY[what](net, net.layer.weight.grad)
    assert_same_bits(net.layer.weight.detach(), before, "weight")


def test_packed_by_another_plan() -> None:
    """More, less or something else frozen than was packed."""
    net, *_ = live_net(storage="packed")
    net(batch()).backward()
    start = copies(net)
    for other in (sf.FreezeMask(SHAPE, rows=[0, 2]), "all", "columns"):
        with pytest.raises(ValueError, match=r"'layer\.weight'.*(with the new plan)"):
            adamw(net, plan_of(other)).step()
    with pytest.raises(ValueError, match=r"packed by another plan: 32 of 96 elements are held, expected 0"):
        sf.clip_grad_norm_(net, 1.0, plan_of("all"))
    assert_same_weights(net, start)


def packed_on_ranks(rank: int, way: str) -> str:
    from torch.nn.parallel import DistributedDataParallel

    net, plan = Net(), plan_of("rows")
    if way == "FSDP2":
        shard(net)
    try:
        sf.live_gradients(net, plan, storage="packed")
        if way == "FSDP2 afterwards":
            shard(net)
        model = DistributedDataParallel(net) if way == "DDP" else net  # backward needs it to stay
        model(batch()).backward()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2 afterwards"])
def test_packed_gradients_are_for_one_device(way: str) -> None:
    for message in run_ranks(2, packed_on_ranks, way):
        assert "use storage='dense'" in message or "or storage='dense'" in message, message


def on_ranks(rank: int, way: str) -> dict[str, Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    net = Net()
    if way == "FSDP2":
        shard(net)
    plan = plan_of("rows")
    assert not sf.live_gradients(net, plan).layers[0].left_alone
    train(net, DistributedDataParallel(net) if way == "DDP" else net, plan, 3, max_norm=0.1)
    return {n: (p.full_tensor() if way == "FSDP2" else p).detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_on_several_ranks(way: str) -> None:
    net, plan = Net(), plan_of("rows")
    start = copies(net)
    train(net, net, plan, 3, max_norm=0.1)
    for found in run_ranks(2, on_ranks, way):
        for name, p in net.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), rtol=0, atol=3e-2 * 2**-8)
        assert_same_bits(found["layer.weight"], start["layer.weight"], "frozen", where=MASKS["rows"].dense())


# ---------------------------------------------------------------------------------------------------- families


@STORAGE
@pytest.mark.parametrize("case", NAMED)
def test_every_family_of_the_mask_builder(case: str, storage: Any) -> None:
    """Most heads and channels frozen: what is live has plain autograd's gradient, in every family."""
    model = copy.deepcopy(model_of(case))
    layout = find_units(model)
    frozen = {
        "heads": {layer: range(layout.n_heads - 1) for layer in range(layout.n_layers)},
        "channels": {layer: range(layout.d_ff - layout.d_ff // 5) for layer in range(layout.n_layers)},
    }
    plan = units_from(layout, **frozen).build(model)
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        output = model(input_ids=tokens).logits
        output.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    handle = sf.live_gradients(model, plan, storage=storage)
    assert any(not layer.left_alone for layer in handle.layers), handle.summary()
    found = gradients()
    assert found.keys() == expected.keys()
    packed = {name for name, grad in found.items() if isinstance(grad, PackedGradient)}
    assert packed == ({layer.name for layer in handle.layers if not layer.left_alone} if storage == "packed" else set())
    for name, right in expected.items():
        grad = found[name].to_dense() if name in packed else found[name]
        if name in {layer.name for layer in handle.layers if not layer.left_alone}:
            right = right.masked_fill(plan[name].dense(), 0.0)
            assert_same_bits(grad, torch.zeros_like(grad), name, where=plan[name].dense())
        # sums of 18 products in another order, in each of the layers that gradients come through
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()), msg=name)


def test_replicas_for_data_parallel_compute_with_their_own_weights() -> None:
    net = Net()
    with sf.live_gradients(net, plan_of("rows")):
        replica = net.layer._replicate_for_data_parallel()
        replica._parameters = {"weight": torch.zeros_like(net.layer.weight), "bias": None}
        x = torch.ones(2, net.layer.weight.shape[1])
        assert (replica(x) == 0).all()
    assert "_replicate_for_data_parallel" not in vars(net.layer)
