"""PEFT: a plan carried to LoRA's factors (`adapt`), and merged without moving what it freezes (`merge_`).

`W + s * B @ A` leaves row i of W alone while row i of B is zero, and column j while column j of A is: see `Factors`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..model.sharding import is_sharded
from ..plan.adapted import PLAIN_INITIALISATIONS, AdaptedPlan, Factors, first_nonzero, not_zero
from ..plan.binding import BoundMask, bare_name, bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan

__all__ = ["AdaptedPlan", "adapt", "merge_"]


def adapt(plan: FreezePlan, model: nn.Module) -> AdaptedPlan:
    """A plan in the base model's names, carried to the adapters of a PEFT model: freezing is exact there.

    Frozen rows of a weight become rows of its ``lora_B`` that stay zero, frozen columns become columns of ``lora_A``
    that do; of embeddings and of Conv1D, whose weights are transposed, the other way round; of stacked experts
    (``target_parameters``) those of the expert alone. Where a factor is not zero there, but the product is, as before
    training, it is set to zero now: nothing the model computes changes. DoRA's magnitudes of frozen rows are set to the
    norms of these rows, if they are that but for rounding. Weights that train themselves (``modules_to_save``) are
    frozen as ever, those that nothing trains stand anyway.

    Args:
        plan: rows and columns of weights; single elements only of weights that have no adapter.
        model: with LoRA, rsLoRA, DoRA or QLoRA adapters; before it is sharded. It may be wrapped (DDP, compile).

    Returns:
        An `AdaptedPlan`, for whatever takes a plan; give it to `merge_` too.

    Raises:
        TypeError: ``plan`` or ``model`` is something else.
        ValueError: the plan does not fit the model; a weight of it has an adapter under which this cannot hold, and
            why: single elements, adapters that are not LoRA, initialisations that rewrite the base weights (PiSSA,
            OLoRA, CorDA, LoftQ, LoRA-GA), factors that are not zero on frozen lines though their product is not zero,
            DoRA on columns or with a magnitude that is not the row's norm, biases that train beside frozen rows,
            adapters that are merged. Nothing was changed then.
    """
    return _carried(plan, model, "adapt").plan_made()


def _carried(plan: FreezePlan, model: nn.Module, operation: str) -> _Carried:
    """A plan carried to the adapters of a model, of which nothing was changed yet."""
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{operation}: model is a {type(model).__name__}, expected a torch.nn.Module with adapters")
    modules = list(model.modules())
    _check_initialisation(modules)
    carried = _Carried(plan.base if isinstance(plan, AdaptedPlan) else plan, model, modules)
    if not carried.layers:
        raise ValueError(f"{operation}: the model has no adapters; give its plan to the optimizer as it is")
    for entry in carried.bound:
        if entry.mask.frozen_count:
            carried.carry(entry)
    bind(carried.masks, carried.named, operation=operation)  # factors may share memory with others
    return carried


class _Carried:
    """A plan on its way to the adapters of a model.

    Attributes:
        named: (name, tensor) pairs of the model.
        bound: what the plan names; a quantised weight is a stand-in on the meta device, of the shape it stands for.
        layers: name of a weight or bias -> the layers of adapters over it.
        masks: name of a parameter that trains -> what is frozen of it.
        zero: the names of those whose frozen part is zero.
        standing: weights that nothing trains.
        to_set: name -> a parameter that has to be set, which of it, and to what.
    """

    def __init__(self, plan: FreezePlan, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        layers = [layer for layer in modules if isinstance(layer, BaseTunerLayer)]
        self._plan, self.named = plan, named_tensors(model)  # after modules(), which gives some layers other tensors
        self._params = dict(self.named)
        self._names = {id(param): name for name, param in reversed(self.named)}
        self.layers: dict[str, list[BaseTunerLayer]] = {}
        self.masks: dict[str, FreezeMask] = {}
        self.zero: set[str] = set()
        self.standing: list[str] = []
        self.to_set: dict[str, tuple[Tensor, FreezeMask, Tensor]] = {}
        stand_ins: dict[int, Tensor] = {}
        for layer in layers:
            weight = _weight(layer)
            for param in layer.get_base_layer().parameters() if weight is None else _with_bias(layer, weight):
                self.layers.setdefault(self._names[id(param)], []).append(layer)
            if weight is not None and (shape := _shape(layer)) != tuple(weight.shape):
                stand_ins[id(weight)] = torch.empty(shape, device="meta")
        named = [(name, stand_ins.get(id(param), param)) for name, param in self.named]
        self.bound = bind(plan, named, operation="adapt", require_grad=False)

    def carry(self, entry: BoundMask) -> None:
        """Take in what stands still so that the frozen part of one weight or bias does."""
        trains, layers = self._params[entry.name].requires_grad, self.layers.get(entry.name, [])
        if trains:
            self._freeze(entry.name, entry.mask, entry)
        for layer in layers:
            if isinstance(layer, TrainableTokensLayer):
                _check_tokens(entry, layer)
            elif _weight(layer) is None:
                raise ValueError(
                    f"adapt: {entry.name!r} is adapted by {_kind(layer)}, under which rows and columns of a weight do "
                    "not stand still by themselves, expected LoRA of a linear layer, an embedding, a Conv1D or stacked "
                    "experts; take the weight out of the plan, or out of the adapters' target_modules"
                )
            else:
                self._carry_to(layer, entry)
        if not trains and not layers:
            self.standing.append(entry.plan_names[0])

    def _carry_to(self, layer: Any, entry: BoundMask) -> None:
        """The same for one layer of LoRA's."""
        if layer.merged:
            raise ValueError(f"adapt: the adapters of {entry.name!r} are merged; call unmerge_adapter() first")
        is_bias = entry.param is getattr(layer.get_base_layer(), "bias", None)
        for adapter in layer.r:
            _check_variant(layer, adapter, entry)
            if is_bias:
                if layer.lora_bias[adapter]:
                    self._keep_zero([layer.lora_B[adapter].bias], [entry.mask], entry)
                continue
            factors = _factors(layer, adapter)
            if any(map(is_sharded, factors)):
                raise ValueError(f"adapt: the adapters of {entry.name!r} are sharded; adapt first, then shard")
            experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
            a, b = (tuple(factor.shape) for factor in factors)
            try:
                of_a, of_b = Factors(a, b, _transposed(layer), experts).masks(entry.mask)
            except ValueError as error:
                raise ValueError(f"adapt: {entry.name!r}: {error}") from None
            self._keep_zero(factors, [of_a, of_b], entry)
            outputs = of_b.frozen_rows
            self._check_bias(layer, adapter, entry, outputs)
            if adapter in layer.lora_variant:
                if of_a.frozen_count:
                    raise ValueError(
                        f"adapt: {entry.name!r} has DoRA, whose magnitudes scale whole outputs, and inputs of it are "
                        "frozen (columns; of a Conv1D rows), expected outputs alone; use LoRA there"
                    )
                self._keep_magnitudes(layer, adapter, entry, outputs)

    def _keep_zero(self, factors: Sequence[Tensor], masks: Sequence[FreezeMask], entry: BoundMask) -> None:
        """Factors of one product stay zero where their masks say."""
        for factor, mask in zip(factors, masks, strict=True):
            name = self._names[id(factor)]
            if mask.frozen_count and (found := first_nonzero(factor, mask)):
                if all(bool(each.detach().any()) for each in factors):
                    raise ValueError(not_zero("adapt", name, found))
                self.to_set[name] = factor, mask, factor.new_zeros(())
            if mask.frozen_count and factor.requires_grad:
                self.zero.add(name)
                self._freeze(name, mask, entry)

    def _keep_magnitudes(self, layer: Any, adapter: str, entry: BoundMask, outputs: np.ndarray) -> None:
        """DoRA's magnitudes of frozen outputs are the norms of their rows, and stay so: that scales them by exactly 1.

        PEFT computes the first magnitudes in the base's dtype and the norms of a forward pass in the adapters', so that
        a row of a bfloat16 base is scaled by 1 to within rounding until its magnitude is set here.
        """
        module, base = layer.lora_magnitude_vector[adapter], layer.get_base_layer()
        magnitude, name = module.weight, self._names[id(module.weight)]
        weight, nothing = dequantize_module_weight(base).detach(), torch.zeros((), device=magnitude.device)
        norms, first = (
            module.get_weight_norm(weight.to(dtype), nothing.to(dtype), 0.0).to(magnitude.dtype)
            for dtype in (_factors(layer, adapter)[0].dtype, weight.dtype)
        )
        mask = FreezeMask(tuple(magnitude.shape), rows=outputs)
        trained = ((magnitude != norms) & (magnitude != first))[mask.rows.to(magnitude.device)]
        if trained.any():
            raise ValueError(
                f"adapt: {name!r} is not the norm of the base's row {outputs[int(trained.int().argmax())]}, which the "
                "plan freezes: DoRA scales that row already; adapt the plan before training begins"
            )
        self.to_set[name] = magnitude, mask, norms
        if magnitude.requires_grad:
            self._freeze(name, mask, entry)

    def _check_bias(self, layer: Any, adapter: str, entry: BoundMask, outputs: np.ndarray) -> None:
        """Raise ValueError if a bias of frozen outputs trains that the plan does not freeze as well."""
        bias = getattr(layer.get_base_layer(), "bias", None)
        own = layer.lora_B[adapter].bias if layer.lora_bias[adapter] else None
        trained = next((b for b in (bias, own) if b is not None and b.requires_grad), None)
        if trained is None or not outputs.size:
            return
        names = set() if bias is None else {bare_name(self._names[id(bias)])}
        planned = [mask.frozen_rows for name, mask in self._plan.items() if bare_name(name) in names]
        left = np.setdiff1d(outputs, planned[0] if planned else [])
        if left.size:
            raise ValueError(
                f"adapt: the bias {self._names[id(trained)]!r} trains, and moves output {left[0]} of {entry.name!r}, "
                "which the plan freezes; freeze those rows of the layer's bias in the plan too, or leave out "
                "bias='all', bias='lora_only' and lora_bias"
            )

    def _freeze(self, name: str, mask: FreezeMask, entry: BoundMask) -> None:
        if self.masks.setdefault(name, mask) != mask:
            raise ValueError(
                f"adapt: {name!r} is shared by {entry.name!r} and another weight with another mask; give both one mask"
            )

    def plan_made(self) -> AdaptedPlan:
        """Sets what has to be set, and returns the plan."""
        counts = {}
        with torch.no_grad():
            for name, (param, mask, values) in self.to_set.items():
                frozen = mask.dense().to(param.device)
                if changed := int(((param != values) & frozen).sum()):
                    counts[name] = changed
                    param.copy_(torch.where(frozen, values, param))
        return AdaptedPlan(self.masks, self._plan, zero=self.zero, standing=self.standing, changed=counts)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """``model`` with the adapter that a folder holds, to be trained on; nothing is downloaded.

    Raises:
        FileNotFoundError: no such folder, or one without an adapter_config.json.
        ValueError: the folder does not hold an adapter of this model that PEFT can load.
    """
    from safetensors import SafetensorError

    given = repr(os.fspath(folder))
    if not (Path(folder) / "adapter_config.json").is_file():  # PEFT would look for it on the hub
        raise FileNotFoundError(f"load_adapter: {given} has no adapter_config.json, expected a folder saved by PEFT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cast(nn.Module, PeftModel.from_pretrained(cast(Any, model), os.fspath(folder), is_trainable=True))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load_adapter: cannot put the adapter in {given} on this model: {reason}") from error


def _weight(layer: Any) -> Tensor | None:
    """What a layer of LoRA's adapts; None: it is another kind of layer."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, (_ConvNd, MultiheadAttention, AdaLoraLayer)):
        return None
    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return getattr(layer.get_base_layer(), leaf, None)


def _shape(layer: Any) -> tuple[int, ...]:
    """Shape of what a layer of LoRA's adapts, whatever it is quantised to."""
    if isinstance(layer, ParamWrapper):
        return tuple(cast(Tensor, _weight(layer)).shape)
    shape = layer.out_features, layer.in_features
    return shape[::-1] if _transposed(layer) else shape


def _with_bias(layer: Any, weight: Tensor) -> list[Tensor]:
    bias = None if isinstance(layer, ParamWrapper) else getattr(layer.get_base_layer(), "bias", None)
    return [weight] if bias is None else [weight, bias]


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _transposed(layer: Any) -> bool:
    """Whether the weight is (in, out) while B @ A is (out, in)."""
    if isinstance(layer, ParamWrapper):
        return layer.num_experts > 1 and not layer._did_swap_in_out_features
    return bool(layer.lora_embedding_A) or bool(getattr(layer, "fan_in_fan_out", False))


def _kind(layer: Any) -> str:
    return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"


def _check_variant(layer: Any, adapter: str, entry: BoundMask) -> None:
    """Raise ValueError if an adapter is neither plain LoRA nor DoRA of a linear layer."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) is not DoraLinearVariant:
        raise ValueError(
            f"adapt: adapter {adapter!r} of {entry.name!r} has a {type(variant).__name__}, expected LoRA, rsLoRA, or "
            "DoRA of a linear layer; take the weight out of the plan, or use one of those"
        )


def _check_tokens(entry: BoundMask, layer: Any) -> None:
    """Raise ValueError if rows of an embedding that are trained apart (``trainable_token_indices``) are frozen."""
    trained = np.unique([i for indices in layer.token_indices.values() for i in indices])
    both = np.flatnonzero(entry.mask.frozen_flags().any(axis=1))
    both = np.intersect1d(trained, both)
    if both.size:
        raise ValueError(
            f"adapt: row {both[0]} of {entry.name!r} is among trainable_token_indices, and the plan freezes it; take "
            "it out of one of the two"
        )


def _check_initialisation(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if adapters were initialised by writing into the weights they adapt."""
    found = (vars(module).get("peft_config") for module in modules)  # a wrapper, as DDP, has none
    for adapter, config in (pair for configs in found if isinstance(configs, dict) for pair in configs.items()):
        how = getattr(config, "init_lora_weights", True)
        if how not in PLAIN_INITIALISATIONS:
            raise ValueError(
                f"adapt: adapter {adapter!r} was initialised with init_lora_weights={how!r}, which may rewrite the "
                "base's weights: then what stands still is not the base; use the default, 'gaussian' or 'eva'"
            )


def merge_(model: nn.Module, plan: FreezePlan, **options: Any) -> nn.Module:
    """Merge adapters into their weights as PEFT's ``merge_and_unload`` does, without moving what a plan freezes: not a
    byte, though a plain merge adds zero there and turns -0.0 into 0.0.

    Args:
        model: the PEFT model, in its dtype of training; taken apart, as by ``merge_and_unload``.
        plan: what `adapt` returned, or the plan it was given.
        options: of ``merge_and_unload`` (``safe_merge``, ``adapter_names``, ``progressbar``).

    Returns:
        The base model, merged. ``sf.snapshot(base, plan).verify`` holds for it.

    Raises:
        TypeError: ``model`` is no PeftModel.
        ValueError: as `adapt`: a factor is not zero where it should be, so that the adapters move what is frozen; or a
            weight of the plan is quantised and has an adapter: merging would round all of it anew.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"merge_: model is a {type(model).__name__}, expected a PeftModel")
    carried = _carried(plan, model, "merge_")
    filled: dict[int, tuple[Any, FreezeMask]] = {}
    biases: list[BoundMask] = []
    for entry in carried.bound:
        for layer in carried.layers.get(entry.name, ()):
            if entry.param.is_meta:
                raise ValueError(
                    f"merge_: {entry.name!r} is quantised, and merging would round all of it anew, expected a base in "
                    "float32, bfloat16 or float16; put the saved adapters on that base, and merge there"
                )
            if entry.param is _weight(layer):
                filled[id(layer)] = layer, entry.mask
            elif isinstance(layer, LoraLayer):
                biases.append(entry)
    carried.plan_made()
    kept = [entry.param.detach()[entry.mask.rows] for entry in biases]
    for layer, mask in filled.values():
        layer.get_delta_weight = functools.partial(_filled_delta, layer, layer.get_delta_weight, mask)
    try:
        merged: nn.Module = cast(Any, model).merge_and_unload(**options)
    finally:
        for layer, _ in filled.values():
            del layer.get_delta_weight
    for entry, values in zip(biases, kept, strict=True):
        entry.param.data[entry.mask.rows] = values
    return merged


def _filled_delta(layer: Any, delta_weight: Callable[..., Tensor], mask: FreezeMask, *args: Any) -> Tensor:
    """What an adapter adds to a weight, with -0.0 where that is frozen: the one number that changes no other by being
    added, where 0.0 turns -0.0 into 0.0. ``args`` of PEFT's ``delta_weight``, of which the first names the adapter."""
    lines = [index for index in (mask.frozen_rows, mask.frozen_cols) if index.size]
    if type(layer) is Linear and args[0] not in layer.lora_variant and len(lines) == 1:
        a, b = (factor.detach() for factor in _factors(layer, args[0]))
        if bool((a.sum() + b.sum()).isfinite()):
            return _signed_delta(a, b, layer.scaling[args[0]], mask, transposed=_transposed(layer))
    delta = delta_weight(*args)
    delta = delta if delta.ndim == 2 else delta.contiguous()
    matrix = delta.view(mask.matrix_shape)
    for dim, index in enumerate((mask.rows, mask.cols)):
        if len(index):
            matrix.index_fill_(dim, index.to(delta.device), -0.0)
    return delta


def _signed_delta(a: Tensor, b: Tensor, scale: float, mask: FreezeMask, *, transposed: bool) -> Tensor:
    """The same of finite factors of a linear layer, whose frozen rows or columns are zero: where PEFT scales what they
    make, frozen lines are multiplied by -1. Zeros may have either sign until 0.0 is added."""
    dtype = a.dtype
    if a.device.type == "cpu" and dtype != torch.float32:  # as PEFT does
        a, b = a.float(), b.float()
    axis, index = (0, mask.rows) if mask.frozen_rows.size else (1, mask.cols)
    factors = a.new_full((mask.matrix_shape[axis],), scale).index_fill_(0, index.to(a.device), -1.0)
    product = a.T @ b.T if transposed else b @ a
    return product.add_(0.0).mul_(factors if axis else factors[:, None]).to(dtype)
