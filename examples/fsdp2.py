"""FSDP2 on several processes: torchrun --nproc-per-node 2 examples/fsdp2.py. Shard first, then build the optimizer."""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import safefreeze_kernels as sf

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
model = LlamaForCausalLM(config)
for layer in model.model.layers:
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

# A plan names rows of whole tensors; every rank loads the same one.
plan = sf.FreezePlan({"model.layers.0.mlp.up_proj.weight": sf.FreezeMask((128, 64), rows=range(0, 128, 3))})
optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1, freeze=plan)
proof = sf.snapshot(model, plan)  # of what this rank holds

for step in range(20):
    batch = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(step * 1000 + dist.get_rank()))
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    norm = sf.clip_grad_norm_(model, 1.0, plan, optimizer=optimizer)  # over all ranks
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 and dist.get_rank() == 0:
        print(f"step {step:2}  loss {loss:.3f}  live gradient norm {norm:.3f}")
proof.verify(model)
print(f"rank {dist.get_rank()}: {proof.nbytes:,} frozen bytes, none moved")

# A distributed checkpoint loads on any number of ranks, and into stock AdamW.
folders = [tempfile.mkdtemp()]
dist.broadcast_object_list(folders)
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folders[0])
dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folders[0])
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
dist.destroy_process_group()
