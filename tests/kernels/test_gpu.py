"""What only a GPU can show: nothing waits for it, steps are recorded in graphs, streams and devices are respected."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, random_normal
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.backend import backend_state, choose_backend

GPU = torch.device("cuda", 0)
STATES = {name: backend_state(name) for name in ("cuda", "triton")}
REASONS = [f"{name}: {state}" for name, state in STATES.items() if isinstance(state, str)]
BACKENDS = [name for name, state in STATES.items() if not isinstance(state, str) and not state.refusal(GPU)]
pytestmark = pytest.mark.skipif(not BACKENDS, reason=f"GPU only: {'; '.join(REASONS)}")
over_backends = pytest.mark.parametrize("backend", BACKENDS or ["cuda"])

PLAN = sf.FreezePlan(
    {
        "w": sf.FreezeMask((300, 256), rows=range(0, 300, 7)),
        "v": sf.FreezeMask((64, 500), cols=range(0, 500, 3)),
    }
)
SHAPES = {"w": (300, 256), "v": (64, 500), "b": (33,)}


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A module: of a plain dict nobody can tell that it is the same as before, so lists would be made anew."""
    return nn.ParameterDict(
        {
            name: nn.Parameter(random_normal(i, *shape, dtype=dtype).to(device))
            for i, (name, shape) in enumerate(SHAPES.items())
        }
    )


def give_gradients(params: Any, step: int) -> None:
    """In place where there is one: a graph reads them where they were."""
    for i, p in enumerate(params.values()):
        grad = random_normal(100 * step + i, *p.shape, dtype=p.dtype).to(p.device)
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], Any]]:
    """Call it, and whatever makes the host wait for the GPU is an error from then on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@over_backends
def test_auto_takes_the_fastest(backend: str) -> None:
    assert choose_backend("auto", GPU, "test").name == BACKENDS[0]
    assert choose_backend(backend, GPU, "test").name == backend


@pytest.mark.parametrize("settings", [{}, {"capturable": True}, {"master": "remainder"}], ids=str)
@over_backends
def test_nothing_waits(backend: str, settings: dict[str, Any], no_waiting: Callable[[], Any]) -> None:
    params = parameters(GPU, torch.bfloat16)
    opt = sf.MaskedAdamW(params.items(), lr=0.1, freeze=PLAN, backend=backend, **settings)

    def train(step: int) -> None:
        sf.zero_frozen_grads_(params, PLAN, backend=backend)
        sf.clip_grad_norm_(params, 0.5, PLAN, backend=backend)
        sf.clip_grad_norm_(params, 0.5, PLAN, optimizer=opt, backend=backend)
        opt.step()

    for step in range(2):  # set-up may wait
        give_gradients(params, step)
        train(step)
    give_gradients(params, 2)
    no_waiting()
    train(2)


@pytest.mark.parametrize("settings", [{"capturable": True}, {"fused": True}], ids=str)
@over_backends
def test_a_loss_scale_is_read_on_the_gpu(backend: str, settings: dict[str, Any], no_waiting: Callable[[], Any]) -> None:
    runs = []
    for device in (torch.device("cpu"), GPU):
        params = parameters(device)
        opt = sf.MaskedAdamW(
            params.items(), lr=0.1, freeze=PLAN, backend="cpu" if device.type == "cpu" else backend, **settings
        )
        for step in range(5):
            give_gradients(params, step)
            opt.grad_scale = torch.full((1,), 2.0**step, device=device)
            opt.found_inf = torch.full((1,), float(step == 3), device=device)
            if device.type == "cuda" and step > 1:
                no_waiting()
            opt.step()
            torch.cuda.set_sync_debug_mode("default")
        runs.append((params, opt))
    (ours, stock), (there, opt) = runs
    for name in SHAPES:
        assert_same_bits(there[name].detach().cpu(), ours[name].detach(), name)
        assert opt.state[there[name]]["step"].item() == stock.state[ours[name]]["step"].item() == 4.0


@over_backends
def test_clip_and_step_in_a_graph(backend: str) -> None:
    """Recorded once, replayed with other gradients and another lr: the bits of as many ordinary steps."""
    graphed, plain = parameters(GPU), parameters(GPU)
    lr = torch.tensor(0.1, device=GPU, dtype=torch.float64)
    settings: dict[str, Any] = {"freeze": PLAN, "capturable": True, "backend": backend}
    opt, other = sf.MaskedAdamW(graphed.items(), lr=lr, **settings), sf.MaskedAdamW(plain.items(), lr=0.1, **settings)

    def train(params: Any, optimizer: sf.MaskedAdamW) -> Tensor:
        norm = sf.clip_grad_norm_(params, 0.5, PLAN, optimizer=optimizer, backend=backend)
        optimizer.step()
        return norm

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch's notes on graphs have it: warm up on a stream of its own
        for step in range(2):
            give_gradients(graphed, step)
            train(graphed, opt)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(graphed, opt)
    for step in range(2):
        give_gradients(plain, step)
        train(plain, other)
    for step in range(2, 6):
        rate = 0.1 / step
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        give_gradients(graphed, step)
        graph.replay()
        give_gradients(plain, step)
        train(plain, other)
        for name in SHAPES:
            assert_same_bits(graphed[name].detach().cpu(), plain[name].detach().cpu(), f"step {step}: {name}")


@over_backends
def test_streams_may_change_between_steps(backend: str) -> None:
    """Tables that one stream uploaded are read on another, and outlive their work list there."""
    params, expected = parameters(GPU), parameters(GPU)
    opts = [sf.MaskedAdamW(p.items(), lr=0.1, freeze=PLAN, backend=backend) for p in (params, expected)]
    plans = [PLAN, sf.FreezePlan({"w": sf.FreezeMask((300, 256), rows=range(0, 300, 5))})]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for step in range(9):
        stream = streams[step % 3]
        stream.wait_stream(streams[(step - 1) % 3])
        with torch.cuda.stream(stream):
            give_gradients(params, step)
            torch.cuda._sleep(20_000_000)
            opts[0].step()
            if step % 4 == 3:
                opts[0].set_freeze(plans[(step // 4 + 1) % 2])
                torch.full((1 << 22,), -1, device=GPU, dtype=torch.int32)  # takes what memory was given back
        torch.cuda.synchronize()
        give_gradients(expected, step)
        opts[1].step()
        if step % 4 == 3:
            opts[1].set_freeze(plans[(step // 4 + 1) % 2])
        for name in SHAPES:
            assert_same_bits(params[name].detach().cpu(), expected[name].detach().cpu(), f"step {step}: {name}")


@over_backends
def test_the_callers_stream_is_used(backend: str) -> None:
    params, expected = parameters(GPU), parameters(GPU)
    opts = [sf.MaskedAdamW(p.items(), lr=0.1, freeze=PLAN, backend=backend) for p in (params, expected)]
    for step in range(2):
        give_gradients(params, step)
        give_gradients(expected, step)
        opts[1].step()
        for p in params.values():
            p.grad.fill_(float("nan"))  # until the stream gets to them
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for name, p in params.items():
                p.grad.copy_(expected[name].grad)
            opts[0].step()
        torch.cuda.current_stream().wait_stream(side)
    for name in SHAPES:
        assert_same_bits(params[name].detach().cpu(), expected[name].detach().cpu(), name)


@over_backends
def test_devices_mix_in_an_optimizer_and_nowhere_else(backend: str) -> None:
    """One launch for each device; a norm over several, or a gradient elsewhere, is refused."""
    params = nn.ParameterDict({"w": parameters(GPU)["w"], "b": parameters(torch.device("cpu"))["b"]})
    plan = sf.FreezePlan({"w": PLAN["w"]})
    opt = sf.MaskedAdamW(params.items(), lr=0.1, freeze=plan)
    give_gradients(params, 0)
    before = copy.deepcopy({name: p.detach().cpu() for name, p in params.items()})
    opt.step()
    frozen = plan["w"].dense()
    assert_same_bits(params["w"].detach().cpu(), before["w"], "frozen rows", where=frozen)
    assert not torch.equal(params["b"].detach(), before["b"])
    with pytest.raises(ValueError, match="expected one device"):
        sf.clip_grad_norm_(params, 1.0, plan)
    with pytest.raises(ValueError, match=f"'{backend}' was given tensors on cpu"):
        sf.MaskedAdamW(params.items(), freeze=plan, backend=backend)
    with pytest.raises(ValueError, match="'cpu' was given tensors on cuda"):
        sf.MaskedAdamW(params.items(), freeze=plan, backend="cpu")


@over_backends
def test_all_backends_train_alike(backend: str) -> None:
    """Frozen bytes, live bits, moments: on the GPU as on the CPU."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        here, there = parameters(torch.device("cpu"), dtype), parameters(GPU, dtype)
        opts = [
            sf.MaskedAdamW(here.items(), lr=0.1, freeze=PLAN, rounding="stochastic", seed=3),
            sf.MaskedAdamW(there.items(), lr=0.1, freeze=PLAN, rounding="stochastic", seed=3, backend=backend),
        ]
        proof = sf.snapshot(there, PLAN)
        for step in range(5):
            give_gradients(here, step)
            give_gradients(there, step)
            if step == 3:
                for opt in opts:
                    opt.set_freeze(sf.FreezePlan({"w": sf.FreezeMask((300, 256), rows=[1, 2], cols=[5])}))
            for opt in opts:
                opt.step()
            if step == 2:
                proof.verify(there)
        for name in SHAPES:
            assert_same_bits(there[name].detach().cpu(), here[name].detach(), f"{dtype} {name}")
            for key, value in opts[0].state[here[name]].items():
                assert_same_bits(opts[1].state[there[name]][key].cpu(), value, f"{dtype} {name} {key}")
