"""What an installed wheel must be able to do: ``python wheel_smoke.py [--cuda]`` in a folder without the sources.

``--cuda``: the CUDA part must be in it, driver or not.
"""

import sys
import tempfile
from pathlib import Path

import torch

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.backend import backend_states


def main() -> None:
    states = backend_states()
    print(sf.info())
    assert not isinstance(states["cpu"], str), states["cpu"]
    if "--cuda" in sys.argv:
        assert not isinstance(states["cuda"], str) or "no CUDA part" not in states["cuda"], states["cuda"]
    torch.manual_seed(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, state in states.items():
            if isinstance(state, str):
                continue
            device = "cpu" if not state.refusal(torch.device("cpu")) else "cuda"
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).to(device)
            plan = sf.FreezePlan({"0.weight": sf.FreezeMask((32, 16), rows=range(0, 32, 3))})
            plan.save(Path(folder) / "plan.safetensors")
            plan = sf.FreezePlan.load(Path(folder) / "plan.safetensors")
            proof = sf.snapshot(model, plan)
            opt = sf.MaskedAdamW(model.named_parameters(), lr=1e-2, freeze=plan, backend=name)
            for seed in range(5):
                inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(device)
                opt.zero_grad()
                model(inputs).square().mean().backward()
                sf.zero_frozen_grads_(model, plan, backend=name)
                sf.clip_grad_norm_(model, 1.0, plan, optimizer=opt, backend=name)
                opt.step()
            proof.verify(model)
            results[name] = (device, model[0].weight.detach().cpu())
    for name, (device, weight) in results.items():
        same = results["reference"][1] if device == "cpu" else weight
        assert torch.equal(weight, same), f"{name} and reference differ"
        print(f"{name} on {device}: ok")


if __name__ == "__main__":
    main()
