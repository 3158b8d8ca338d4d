"""A tiny random chat model in a folder, as the commands and the examples load it, and what they write."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from typer.testing import CliRunner

from safefreeze_kernels.calibration import NAMES, load_pairs
from safefreeze_kernels.cli import app

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def save_model(folder: Path, d_ff: int = 24) -> Path:
    """Llama of 3 layers, 4 heads, 2 KV heads, and ``d_ff`` channels; a word tokenizer with a chat template."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [text for name in NAMES for pair in load_pairs(name) for text in pair]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=800, special_tokens=special))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=d_ff, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(argument) for argument in arguments])


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def fails(result, *words: str) -> None:  # type: ignore[no-untyped-def]
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit)
    text = " ".join(result.output.split())
    assert "Traceback" not in text
    for word in words:
        assert word in text, text
