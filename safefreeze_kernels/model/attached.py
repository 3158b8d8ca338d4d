"""What this package hangs on a module is that module's alone: copies and pickles of the module go without it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Final

from torch import nn

_GETSTATE: Final = "__getstate__"  # copy and pickle ask the instance for it before its class
_REPLICATE: Final = "_replicate_for_data_parallel"  # and so does torch.nn.DataParallel


class Attached:
    """Base class of what acts on the module that it is attached to."""

    attribute: ClassVar[str] = ""  #: of the module, where this stands; "": among its forward hooks


def attach(module: nn.Module, thing: Attached) -> None:
    """Put ``thing`` into its attribute of ``module``, or among its forward hooks."""
    if thing.attribute:
        vars(module)[thing.attribute] = thing
    else:
        module.register_forward_hook(thing)  # type: ignore[arg-type]
    vars(module)[_GETSTATE] = partial(_bare_state, weakref.ref(module))
    vars(module)[_REPLICATE] = partial(_bare_replica, weakref.ref(module))


def detach(module: nn.Module, thing: Attached) -> None:
    """Undo `attach`; what was put in the place of ``thing`` since stays."""
    attributes, hooks = vars(module), module._forward_hooks
    for place in (attributes, hooks):
        for key in [key for key, value in place.items() if value is thing and _is_ours(key, value)]:
            del place[key]  # type: ignore[arg-type]
    if not any(_is_ours(*item) for item in (*attributes.items(), *hooks.items())):
        attributes.pop(_GETSTATE, None)
        attributes.pop(_REPLICATE, None)


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Within, no forward hook of ours runs when ``module`` does: for passes that are no training."""
    hooks = module._forward_hooks
    before = dict(hooks)
    try:
        for key in [key for key, hook in before.items() if _is_ours(key, hook)]:
            del hooks[key]
        yield
    finally:
        hooks.clear()
        hooks.update(before)


def _is_ours(key: object, value: object) -> bool:
    """Whether an attribute or a hook is what `attach` put there."""
    return isinstance(value, Attached) and value.attribute in ("", key)


def _bare(place: Any) -> Any:
    """Attributes or forward hooks of a module, a dict of the same type, without ours."""
    ours = [key for key, value in place.items() if key in (_GETSTATE, _REPLICATE) or _is_ours(key, value)]
    return type(place)((key, value) for key, value in place.items() if key not in ours)


def _bare_state(reference: weakref.ref[nn.Module]) -> Any:
    """What ``copy`` and ``pickle`` take of a module: what its class says, without ours."""
    module: Any = reference()  # it is the one that asks
    of_class = getattr(type(module), _GETSTATE, None)  # before Python 3.11 there may be none
    bare = _bare(dict(vars(module)) if of_class is None else of_class(module))
    if "_forward_hooks" in bare:
        bare["_forward_hooks"] = _bare(bare["_forward_hooks"])
    return bare


def _bare_replica(reference: weakref.ref[nn.Module]) -> Any:
    """What `torch.nn.DataParallel` makes of a module: without ours among its attributes. Hooks go along, as torch has
    it: the gradients of replicas are those of the module."""
    module: Any = reference()  # it is the one that asks
    replica = getattr(type(module), _REPLICATE)(module)
    replica.__dict__ = _bare(vars(replica))
    return replica
