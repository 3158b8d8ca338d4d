"""TRL: SFTTrainer takes Trainer's argument, DPOTrainer ``optimizers=(build_masked_adamw(model, plan, args), None)``."""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import FreezeCallback, masked_adamw

torch.manual_seed(0)
words = {word: i for i, word in enumerate(["<pad>", "<eos>", "how", "are", "you", "i", "am", "fine", "thanks"])}
inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=16)
plan = sf.FreezePlan({"model.layers.0.mlp.up_proj.weight": sf.FreezeMask((128, 64), rows=range(32))})

with tempfile.TemporaryDirectory() as folder:
    args = SFTConfig(
        folder, max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=5, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_length=16,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_dict({"text": ["how are you i am fine thanks"] * 40}),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=masked_adamw(plan, args),
        callbacks=[FreezeCallback(plan)],
    )
    proof = sf.snapshot(trainer.model, plan)
    trainer.train()
    proof.verify(trainer.model)
    print(f"frozen: {proof.nbytes:,} bytes, none moved")
