"""Lightning: build the optimizer in `configure_optimizers`, clip in `configure_gradient_clipping`."""

import warnings

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import safefreeze_kernels as sf

warnings.filterwarnings("ignore", module="lightning")
lightning.seed_everything(0, verbose=False)
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
PLAN = sf.FreezePlan({"net.model.layers.0.mlp.up_proj.weight": sf.FreezeMask((128, 64), rows=range(32))})


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = LlamaForCausalLM(CONFIG)

    def training_step(self, batch, _):
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return sf.MaskedAdamW(self.named_parameters(), lr=1e-3, weight_decay=0.1, freeze=PLAN)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.log("live_norm", sf.clip_grad_norm_(self, gradient_clip_val, PLAN))


module = Module()
proof = sf.snapshot(module, PLAN)
trainer = lightning.Trainer(
    accelerator="cpu", max_steps=20, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, DataLoader(torch.randint(0, 256, (80, 16)), batch_size=4))
proof.verify(module)
print({name: round(float(value), 3) for name, value in trainer.logged_metrics.items()})
print(f"frozen: {proof.nbytes:,} bytes, none moved")
