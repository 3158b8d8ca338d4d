"""`live_gradients` of fused experts: plain autograd's gradients where live, nothing computed where frozen."""

from __future__ import annotations

import copy
from typing import Any, Final

import pytest
import torch
from conftest import assert_same_bits
from family_models import model_of
from ranks import run_ranks
from steps import take_step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import safefreeze_kernels as sf
from safefreeze_kernels.model.packed import PackedGradient

STORAGE: Final = pytest.mark.parametrize("storage", ["dense", "packed"])
EXPERTS, HIDDEN, INNER = 5, 16, 8  # strides of 16 bytes: torch's grouped_mm takes no others


class FusedExperts(nn.Module):
    """The ways people multiply fused weights, (experts, out, in) or, transposed, (experts, in, out)."""

    def __init__(self, way: str, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(INNER, HIDDEN), (HIDDEN, INNER)]
        self.up, self.down = (
            nn.Parameter(torch.randn(EXPERTS, *(shape[::-1] if transposed else shape), generator=generator))
            for shape in shapes
        )
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER, generator=generator))
        self.way, self.transposed = way, transposed

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        return self.product(torch.tanh(self.product(x, self.up, counts, self.up_bias)), self.down, counts)

    def product(self, x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None = None) -> Tensor:
        ids = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))
        offs = torch.tensor(counts).cumsum(0).to(torch.int32)
        added = 0 if bias is None else bias[ids].to(x.dtype)
        parts = zip(range(EXPERTS), x.split(counts), strict=True)
        inward = weight if self.transposed else weight.transpose(-2, -1)
        if self.way == "linear":
            outward = [w.t() if self.transposed else w for w in (weight[e] for e in range(EXPERTS))]
            return torch.cat([nn.functional.linear(p, outward[e], None if bias is None else bias[e]) for e, p in parts])
        if self.way == "matmul":
            turned = (lambda e: weight[e]) if self.transposed else (lambda e: weight[torch.tensor(e)].mT)
            return torch.cat([p @ turned(e) for e, p in parts]) + added
        if self.way == "grouped":
            return torch.nn.functional.grouped_mm(x, inward, offs=offs) + added
        if self.way == "picked":
            return torch.bmm(x.unsqueeze(1), weight[ids] if self.transposed else weight[ids].mT).squeeze(1) + added
        if self.way == "picked first":
            return torch.bmm(weight[ids].mT if self.transposed else weight[ids], x.unsqueeze(-1)).squeeze(-1) + added
        if self.way == "batched":  # as Llama 4: as many rows for each expert
            return torch.bmm(x.view(EXPERTS, -1, x.shape[-1]), inward).flatten(0, 1) + added
        return torch.einsum("si,sio->so", x, inward[ids]) + added


WAYS: Final = ("linear", "matmul", "grouped", "picked", "picked first", "batched")
COUNTS: Final = [4] * EXPERTS


def mask_of(weight: Tensor, seed: int) -> sf.FreezeMask:
    """Rows of one expert, columns of another, both, everything, nothing."""
    frozen = torch.zeros(weight.shape, dtype=torch.bool)
    some = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randperm(n, generator=some)[: n - 2] for n in weight.shape[1:])
    frozen[0, rows] = frozen[1][:, cols] = frozen[3] = True
    frozen[2, rows] = frozen[2][:, cols] = True
    return sf.FreezeMask(weight.shape, elements=frozen)


def plan_of(model: nn.Module) -> sf.FreezePlan:
    weights = [(name, p) for name, p in model.named_parameters() if p.dim() == 3]
    return sf.FreezePlan({name: mask_of(p, seed) for seed, (name, p) in enumerate(weights)})


def rows(dtype: torch.dtype = torch.float32, n: int = sum(COUNTS)) -> Tensor:
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_dense() if isinstance(grad, PackedGradient) else grad


def assert_live_alike(found: nn.Module, expected: nn.Module, plan: sf.FreezePlan, tolerance: float = 1e-6) -> None:
    """Zero where frozen; live ones differ by roundings of sums in another order, relative to the largest."""
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
            continue
        grad, right = dense(p.grad), q.grad
        if name in plan:
            frozen = plan[name].dense()
            assert_same_bits(grad, torch.zeros_like(grad), name, where=frozen)
            right = right.masked_fill(frozen, 0)
        torch.testing.assert_close(
            grad, right, rtol=0, atol=tolerance * float(q.grad.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def twins(expected: nn.Module, **options: Any) -> tuple[nn.Module, sf.FreezePlan, Any]:
    """A copy with live gradients of all its experts, with the plan and the handle."""
    found, plan = copy.deepcopy(expected), plan_of(expected)
    handle = sf.live_gradients(found, plan, **options)
    assert not [layer for layer in handle.layers if layer.left_alone]
    return found, plan, handle


@STORAGE
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_plain_autograds_where_live(way: str, transposed: bool, storage: Any, dtype: torch.dtype) -> None:
    expected = FusedExperts(way, transposed).to(dtype)
    found, plan, _ = twins(expected, storage=storage)
    inputs = [rows(dtype), rows(dtype)]
    outputs = [net(x, COUNTS) for net, x in zip((expected, found), inputs, strict=True)]
    assert_same_bits(outputs[1].detach(), outputs[0].detach(), "output")
    for output in outputs:
        (output.float().square().mean() + output.float().mean()).backward()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    assert_live_alike(found, expected, plan, tolerance)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=tolerance)
    assert isinstance(found.up.grad, PackedGradient) == (storage == "packed")


@STORAGE
@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_experts_without_tokens_and_accumulation(way: str, storage: Any) -> None:
    expected = FusedExperts(way)
    found, plan, _ = twins(expected, storage=storage)
    for net in (expected, found):
        for counts in ([3, 0, 5, 0, 2], [0, 4, 0, 0, 0], [0, 0, 0, 6, 0]):
            net(rows(n=sum(counts)), counts).square().mean().backward()
    assert_live_alike(found, expected, plan)


@STORAGE
def test_a_graph_is_gone_through_twice_and_in_part(storage: Any) -> None:
    expected = FusedExperts("linear")
    found, plan, _ = twins(expected, storage=storage)
    for net in (expected, found):
        x = rows()
        loss = net(x, COUNTS).square().mean()
        torch.autograd.grad(loss, x, retain_graph=True)  # asks for no weight's gradient
        assert net.up.grad is None
        loss.backward(retain_graph=True)
        loss.backward()
    assert_live_alike(found, expected, plan)


@STORAGE
@pytest.mark.parametrize("way", ["linear", "matmul", "picked first", "batched"])
def test_autocast(way: str, storage: Any) -> None:
    expected = FusedExperts(way)
    found, plan, _ = twins(expected, storage=storage)
    for net in (expected, found):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(rows(), COUNTS).float().square().mean()
        loss.backward()
    assert found.up.grad.dtype == torch.float32
    assert_live_alike(found, expected, plan, 2**-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_checkpointed_activations(way: str, reentrant: bool) -> None:
    expected = FusedExperts(way)
    found, plan, _ = twins(expected)
    for net in (expected, found):
        torch.utils.checkpoint.checkpoint(net, rows(), COUNTS, use_reentrant=reentrant).square().mean().backward()
    assert_live_alike(found, expected, plan)


def test_a_compiled_model_runs_experts_outside_the_graph() -> None:
    expected = nn.Sequential(FusedExperts("grouped"))
    found, plan, _ = twins(expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.tanh(found[0](2 * x, COUNTS)), backend="aot_eager")
    compiled(rows()).square().mean().backward()
    torch.tanh(expected[0](2 * rows(), COUNTS)).square().mean().backward()
    assert_live_alike(found, expected, plan)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_parts_cost_nothing(way: str) -> None:
    """Counted: of weights' gradients the live share is computed, and nothing else changes but that it is less."""
    work = {}
    for frozen in (False, True):
        net = FusedExperts(way)
        plan, live = plan_of(net), 1.0
        if frozen:
            sf.live_gradients(net, plan)
            live = sum(mask.live_count for mask in plan.values()) / sum(mask.numel for mask in plan.values())
        loss = net(rows(), COUNTS).square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        work[live] = counter.get_total_flops()
    one_pass = 2 * 2 * sum(COUNTS) * HIDDEN * INNER  # of both products: gradients of activations, or of whole weights
    of_activations = 0 if way == "grouped" else one_pass  # which, and plain autograd's whole weights, are not counted
    assert work == {1.0: 2 * of_activations, live: of_activations + round(live * one_pass)}


def test_saved_activations_are_the_live_columns() -> None:
    net = FusedExperts("linear")
    plan = sf.FreezePlan({"down": sf.FreezeMask(net.down.shape, cols=range(INNER - 1))})
    sf.live_gradients(net, plan)
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        net(rows(), COUNTS)
    assert saved.count((COUNTS[0], 1)) == EXPERTS


def test_what_is_computed_otherwise_is_an_error_in_backward() -> None:
    """The whole gradient would have been computed, without a word."""
    expected = FusedExperts("einsum")
    found, _, handle = twins(expected)
    loss = found(rows(), COUNTS).square().mean()
    with pytest.raises(
        RuntimeError, match=r"FusedExperts computes with '(up|down)' otherwise than by linear, matmul.*plan"
    ):
        loss.backward()
    handle.remove()
    for net in (expected, found):
        net.zero_grad()
        net(rows(), COUNTS).square().mean().backward()
    assert_same_bits(dense(found.up.grad), dense(expected.up.grad), "removed")


@STORAGE
def test_training_leaves_frozen_bytes_and_moves_the_rest(storage: Any) -> None:
    """Clipped inside the step, with packed moments: the same bits as without live gradients, but for roundings."""
    expected = FusedExperts("grouped")
    start = copy.deepcopy(expected)
    found, plan, handle = twins(expected, storage=storage)
    for net in (expected, found):
        optimizer = sf.MaskedAdamW(net.named_parameters(), lr=1e-2, freeze=plan)
        for _ in range(4):
            net(rows(), COUNTS).square().mean().backward()
            sf.clip_grad_norm_(net, 0.1, plan, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
    sf.snapshot(start, plan).verify(found)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(found.up, start.up)
    assert optimizer.state[found.up]["exp_avg"].shape == plan["up"].packed_shape
    optimizer.set_freeze(sf.FreezePlan({"up": sf.FreezeMask(found.up.shape, rows=[0])}))
    found(rows(), COUNTS).square().mean().backward()
    with pytest.raises(ValueError, match=r"'up' learns where live_gradients computes no gradient"):
        optimizer.step()
    handle.remove()
    with pytest.raises(ValueError, match=r"grad of 'up' (was computed under live_gradients|is packed by another plan)"):
        optimizer.step()


@STORAGE
def test_a_step_inside_the_backward_pass(storage: Any) -> None:
    """A weight steps while the pass goes on: nothing after that may need its values."""
    expected = FusedExperts("linear")
    plan = plan_of(expected)
    found = copy.deepcopy(expected)
    for net in (expected, found):
        sf.live_gradients(net, plan, storage=storage)
        optimizer = sf.MaskedAdamW(net.named_parameters(), lr=1e-2, freeze=plan)
        for _ in range(3):
            take_step(net, optimizer, net(rows(), COUNTS).square().mean(), inside=net is found)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)


@STORAGE
def test_it_is_undone_and_copies_are_ordinary(storage: Any) -> None:
    expected = FusedExperts("linear")
    found, plan, handle = twins(expected, storage=storage)
    copied = copy.deepcopy(found)
    with pytest.raises(ValueError, match=r"'up' has live gradients already"):
        sf.live_gradients(found, plan)
    found(rows(), COUNTS)
    assert not {"up", "down"} & vars(found).keys()  # stand-ins are there while it runs alone
    handle.remove()
    for net in (expected, found, copied):
        assert "forward" not in vars(net)
        net(rows(), COUNTS).square().mean().backward()
    for net in (found, copied):
        assert_same_bits(dense(net.up.grad), dense(expected.up.grad), "gradient")


def test_a_forward_that_fails_leaves_no_stand_in() -> None:
    net, _, _ = twins(FusedExperts("linear"))
    with pytest.raises(RuntimeError, match="split"):
        net(rows(), [1] * EXPERTS)
    assert not {"up", "down"} & vars(net).keys()


def test_lent_tensors_have_ordinary_gradients() -> None:
    expected = FusedExperts("linear")
    found, _, _ = twins(expected)
    lent = {name: p.detach().clone().requires_grad_() for name, p in found.named_parameters()}
    torch.func.functional_call(found, lent, (rows(), COUNTS)).square().mean().backward()
    expected(rows(), COUNTS).square().mean().backward()
    assert found.up.grad is None
    assert_same_bits(dense(lent["up"].grad), dense(expected.up.grad), "lent")


def test_what_is_left_alone_says_why() -> None:
    net = FusedExperts("linear")
    net.conv = nn.Conv1d(4, 4, 3)
    single = torch.zeros(net.up.shape, dtype=torch.bool)
    single[:, : INNER - 1] = True
    single[1, 0, 0] = False
    plan = sf.FreezePlan(
        {
            "up": sf.FreezeMask(net.up.shape, elements=single),
            "down": sf.FreezeMask(net.down.shape, rows=[0]),
            "conv.weight": sf.FreezeMask((4, 4, 3), rows=range(14)),
        }
    )
    reasons = {layer.name: layer.left_alone for layer in sf.live_gradients(net, plan).layers}
    assert reasons == {
        "up": "single elements are frozen",
        "down": "more than 75% of it is live",
        "conv.weight": "Conv1d.weight is no linear layer's weight",
    }


@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 3, 5), (2, 1, 7)])
def test_matrices_of_a_mask(shape: tuple[int, int, int]) -> None:
    frozen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    frozen[0] = True
    frozen[1, 0] = frozen[:, :, 2] = True
    for elements in (
        frozen,
        torch.zeros_like(frozen),
        torch.zeros_like(frozen).index_fill_(2, torch.tensor([1]), True),
    ):
        found = list(sf.FreezeMask(shape, elements=elements).matrices())
        assert found == [sf.FreezeMask(shape[1:], elements=one) for one in elements]


# ------------------------------------------------------------------------------------------------- real models


@pytest.mark.parametrize(
    ("family", "way", "storage"),
    [
        ("mixtral", "eager", "packed"),
        ("mixtral", "grouped_mm", "dense"),
        ("gpt_oss", "eager", "dense"),
        ("gpt_oss", "grouped_mm", "packed"),
        ("gpt_oss", "batched_mm", "dense"),
        ("qwen3_moe", "grouped_mm", "packed"),
        ("qwen3_moe", "batched_mm", "packed"),
    ],
)
def test_models_of_transformers(family: str, way: str, storage: Any) -> None:
    expected: Any = copy.deepcopy(model_of(family)).train()
    expected.set_experts_implementation(way)
    found, plan, handle = twins(expected, storage=storage)
    assert len(handle.layers) == 4
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = [net(input_ids=tokens, labels=tokens).loss for net in (expected, found)]
    assert_same_bits(losses[1].detach(), losses[0].detach(), "loss")
    for loss in losses:
        loss.backward()
    assert_live_alike(found, expected, plan, 5e-6)


def test_plans_of_units_are_suited() -> None:
    """Channels of experts are rows of what makes them and columns, each of one expert, of what reads them."""
    from safefreeze_kernels.attribution import find_units, units_from

    model = copy.deepcopy(model_of("mixtral"))
    channels = {0: range(72), 1: range(12, 90)}  # of 4 × 24: whole experts, and parts of one
    plan = units_from(find_units(model), heads={}, channels={k: list(v) for k, v in channels.items()}).build(model)
    planned = sf.memory_plan(model, plan, storage="packed").masked["cpu"].gradients
    assert planned == 4 * sum(plan[n].live_count if n in plan else p.numel() for n, p in model.named_parameters())
    handle = sf.live_gradients(model, plan, storage="packed")
    assert {layer.name: layer.left_alone for layer in handle.layers} == dict.fromkeys(plan, "")


# --------------------------------------------------------------------------------------------------------- ranks


class Outer(nn.Module):
    """What holds experts: FSDP2 frees their weights between forward and backward, but not those of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.last = FusedExperts("grouped"), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(x, COUNTS)).square().mean()


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    expected = Outer()
    found, plan, _ = twins(expected)
    for module in (found.experts, found):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    for net in (expected, found):
        net(rows()).backward()
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        right = q.grad.masked_fill(plan[name].dense(), 0) if name in plan else q.grad
        torch.testing.assert_close(p.grad.full_tensor(), right, rtol=0, atol=1e-6, msg=name)


def test_fully_sharded() -> None:
    run_ranks(2, _sharded)
