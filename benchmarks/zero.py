"""``python -m benchmarks.zero``: what freezing costs and saves under DeepSpeed's ZeRO-2 and 3.

Two processes of one thread each, joined by gloo, train 24 matrices of 1024 x 1024 in float32, of which 7.5 and 80% of
the rows are frozen. Beside each engine with `MaskedAdamW` one with torch's fused AdamW, nothing frozen, in turns:
the optimizer's part of a step (what DeepSpeed hands its partitions to), the engine's whole step (with norm, copies and
collectives, which are the same for both), and the backward pass, in which frozen gradients are zeroed. And what memory
a resume takes. Results are checked before they are timed. ``--cpu-adam`` adds DeepSpeed's own AdamW for CPUs, which it
compiles at first use. Writes results/zero-*.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.measure.timing import turns

from .measure import as_entry, at_least_one, describe_machine, print_entry, ratio_entry, save_result

RANKS: Final = 2
LAYERS: Final = 24
WIDTH: Final = 1024
OURS: Final = "sf.MaskedAdamW"
PEER: Final = "torch fused"
CPU_ADAM: Final = "DeepSpeed's CPUAdam"
PARTS: Final = ("optimizer", "engine step", "backward")


def plan_of(model: nn.Module, share: float) -> sf.FreezePlan:
    """A share of the rows of every matrix, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    return sf.FreezePlan(
        {
            name: sf.FreezeMask(tuple(p.shape), rows=torch.rand(p.shape[0], generator=draw) < share)
            for name, p in model.named_parameters()
        }
    )


class Trained:
    """An engine with one of the optimizers."""

    def __init__(self, who: str, stage: int, share: float) -> None:
        import deepspeed

        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.plan = plan_of(self.model, share)
        named = list(self.model.named_parameters())
        if who == OURS:
            self.optimizer: Any = sf.MaskedAdamW(named, lr=1e-4, weight_decay=0.1, freeze=self.plan)
        elif who == PEER:
            self.optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-4, weight_decay=0.1, fused=True)
        else:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            self.optimizer = DeepSpeedCPUAdam([p for _, p in named], lr=1e-4, weight_decay=0.1)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        self.engine = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)[0]
        self._spent, step = 0.0, self.optimizer.step

        def timed_step(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            found = step(*given, **named)
            self._spent += time.perf_counter() - begun
            return found

        self.optimizer.step = timed_step

    def step(self) -> dict[str, float]:
        """Milliseconds of the parts of one step."""
        loss = self.engine(torch.ones(1, WIDTH)).square().mean()
        begun, self._spent = time.perf_counter(), 0.0
        self.engine.backward(loss)
        between = time.perf_counter()
        self.engine.step()
        ended = time.perf_counter()
        spent = (self._spent, ended - between, between - begun)
        return {part: 1e3 * seconds for part, seconds in zip(PARTS, spent, strict=True)}

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone() for name, p in self.model.named_parameters()}


def checked(ours: Trained, peer: Trained) -> None:
    """After one step from the same weights: frozen bytes are as they were, live ones what torch's are."""
    start = ours.weights()
    ours.engine.optimizer.clip_grad = peer.engine.optimizer.clip_grad = 0.0  # norms differ, and so would live weights
    ours.step(), peer.step()
    ours.engine.optimizer.clip_grad = peer.engine.optimizer.clip_grad = 1.0
    for (name, found), expected in zip(ours.weights().items(), peer.weights().values(), strict=True):
        frozen = ours.plan[name].dense()
        assert torch.equal(found[frozen].view(torch.int32), start[name][frozen].view(torch.int32)), name
        torch.testing.assert_close(found[~frozen], expected[~frozen], rtol=0, atol=1e-7)


def growth(act: Callable[[], object]) -> tuple[float, float]:
    """How far the process's memory rose while ``act`` ran, and by how much more it has in the end: MB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    act()
    return _memory("VmHWM") - before, _memory("VmRSS") - before


def _memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1]) / 1e3


def resumed(who: str, stage: int, share: float, folder: str) -> dict[str, float]:
    """MB of one rank: the state that is loaded, and how far memory rises while the optimizer, and the engine, load."""
    first = Trained(who, stage, share)
    first.step()
    first.engine.save_checkpoint(folder, tag="one")
    state = (
        sum(v.nbytes for entry in first.optimizer.state.values() for v in entry.values() if torch.is_tensor(v)) / 1e6
    )
    del first
    again = Trained(who, stage, share)
    load, inside = again.optimizer.load_state_dict, []
    again.optimizer.load_state_dict = lambda given: inside.append(growth(lambda: load(given))[0])
    again.engine.load_checkpoint(folder, tag="one")
    del again.optimizer.load_state_dict
    other = Trained(who, stage, share)
    whole = growth(lambda: other.engine.load_checkpoint(folder, tag="one"))[0]
    return {"state": state, "optimizer's load": inside[0], "engine's load": whole}


def measure(stage: int, share: float, rounds: int, peers: list[str]) -> dict[str, Any]:
    engines = {who: Trained(who, stage, share) for who in (OURS, *peers)}
    checked(engines[OURS], engines[PEER])
    times: dict[str, list[dict[str, float]]] = {who: [] for who in engines}
    for number, who in turns(list(engines), rounds, 3):
        spent = engines[who].step()
        if number >= 0:
            times[who].append(spent)
    ours = engines[OURS]
    assert float(sum(v.numel() for entry in ours.optimizer.state.values() for v in entry.values() if v.dim())) > 0
    found: dict[str, Any] = {}
    for part in PARTS:
        of = {who: [spent[part] for spent in each] for who, each in times.items()}
        found |= {f"{part}, {who}, ms": as_entry(values) for who, values in of.items()}
        found |= {f"{part} / {who}": ratio_entry(of[OURS], of[who]) for who in peers}
    return found


def work(rank: int, port: int, rounds: int, cpu_adam: bool, sending: Any) -> None:
    """One rank. The first sends what was found."""
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo sums, and nothing is compiled
    peers = [PEER, CPU_ADAM] if cpu_adam else [PEER]
    cases: dict[str, Any] = {}
    for stage in (2, 3):
        for share in (0.075, 0.8):
            cases[f"ZeRO-{stage}, {share:.1%} frozen"] = measure(stage, share, rounds, peers)
        with tempfile.TemporaryDirectory() as folder:
            shared = [folder]
            dist.broadcast_object_list(shared)
            for who in (OURS, PEER):
                cases.setdefault(f"ZeRO-{stage}, 7.5% frozen, resume", {})[who] = {
                    what: round(value, 1) for what, value in resumed(who, stage, 0.075, f"{shared[0]}/{who}").items()
                }
            dist.barrier()
    if rank == 0:
        sending.put((cases, deepspeed.__version__))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero", description=__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=20)
    parser.add_argument("--cpu-adam", action="store_true", help="beside it DeepSpeed's CPUAdam, compiled at first use")
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    sending = context.SimpleQueue()
    arguments = (port, given.rounds, given.cpu_adam, sending)
    ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    cases, version = sending.get()
    for process in ranks:
        process.join()
    for name, found in cases.items():
        for what, entry in found.items():
            if "median" in entry:
                print_entry(f"{name:22} {what:34}", entry)
            else:
                print(f"{name:22} {what:34}", ", ".join(f"{key} {value:.1f} MB" for key, value in entry.items()))
    report = {"date": time.strftime("%Y-%m-%d"), "ranks": RANKS, "rounds": given.rounds, "deepspeed": version}
    save_result("zero", describe_machine(1), {**report, "cases": cases}, given.output)


if __name__ == "__main__":
    main()
