"""`FreezePlan.of`: what a pattern chooses is what NumPy's indexing chooses; whatever fits nothing is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import safefreeze_kernels as sf

SHAPES = {
    "layers.0.up.weight": (6, 4), "layers.1.up.weight": (6, 4), "layers.1.up.bias": (6,),
    "layers.1.down.weight": (4, 6), "experts.weight": (3, 4, 5), "scale": (),
}  # fmt: skip


def frozen(plan: sf.FreezePlan) -> dict[str, np.ndarray]:
    return {name: mask.dense().numpy() for name, mask in plan.items()}


@st.composite
def indexed(draw: st.DrawFn) -> tuple[str, tuple[int, ...], str]:
    """A parameter, its shape, and an index of it as text that Python reads too."""
    name = draw(st.sampled_from([name for name, shape in SHAPES.items() if shape]))
    shape, parts = SHAPES[name], []
    for size in shape[: draw(st.integers(1, len(shape)))]:
        number = st.integers(-size, size - 1)
        bound = st.one_of(st.just(""), st.integers(-size - 2, size + 2).map(str))
        kinds = [
            number.map(str),
            st.tuples(bound, bound).map(":".join),
            st.tuples(bound, bound, st.just("2")).map(":".join),
        ]
        parts.append(draw(st.one_of(kinds)))
    return name, shape, ", ".join(parts)


@settings(max_examples=300, deadline=None)
@given(indexed())
def test_an_index_chooses_what_numpy_does(given: tuple[str, tuple[int, ...], str]) -> None:
    name, shape, index = given
    expected = np.zeros(shape, bool)
    expected[eval(f"np.s_[{index}]")] = True
    if not expected.any():
        with pytest.raises(ValueError, match="is left empty"):
            sf.FreezePlan.of(SHAPES, [f"{name}[{index}]"])
        return
    assert (frozen(sf.FreezePlan.of(SHAPES, [f"{name}[{index}]"]))[name] == expected).all()
    live = sf.FreezePlan.of(SHAPES, train_only=[f"{name}[{index}]"])
    assert (live[name].dense().numpy() != expected).all() if name in live else expected.all()
    assert all(mask.live_count == 0 for other, mask in live.items() if other != name)
    assert live.keys() | {name} == SHAPES.keys()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layers.*.up.weight[1:3]"], {f"layers.{i}.up.weight": {"rows": [1, 2]} for i in (0, 1)}),
        (["*.down.weight[:, [0:2, 5]]"], {"layers.1.down.weight": {"cols": [0, 1, 5]}}),
        (["*.up.weight[[0, -1]]", "*.0.up.weight[:,2]"], {
            "layers.0.up.weight": {"rows": [0, 5], "cols": [2]}, "layers.1.up.weight": {"rows": [0, 5]},
        }),
        (["experts.weight[1]"], {"experts.weight": {"rows": range(4, 8)}}),
        (["experts.weight[:, :, 3]"], {"experts.weight": {"cols": [3]}}),
        (["*.bias", "scale"], {"layers.1.up.bias": {"rows": range(6)}, "scale": {"rows": [0]}}),
    ],
)  # fmt: skip
def test_patterns(patterns: list[str], expected: dict[str, dict[str, list[int]]]) -> None:
    plan = sf.FreezePlan.of(SHAPES, patterns)
    assert plan == sf.FreezePlan({name: sf.FreezeMask(SHAPES[name], **lines) for name, lines in expected.items()})
    assert plan.metadata["patterns"]["freeze"] == patterns


def test_a_model_is_taken_by_its_bare_names_and_tied_weights_once() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embed"].weight
    for model in (net, torch.nn.DataParallel(net), torch.compile(net)):
        plan = sf.FreezePlan.of(model, ["head.weight[:2]", "embed.weight[4]"])
        assert len(plan) == 1
        (mask,) = plan.values()
        assert mask.rows.tolist() == [0, 1, 4]
        sf.MaskedAdamW(model.named_parameters(), freeze=plan)
    assert sf.FreezePlan.of(net, train_only=["*.weight"]) == sf.FreezePlan()


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["layers.*.upp.weight[0]"], r"pattern 'layers\.\*\.upp\.weight\[0\]' matches none of 6 .* such as 'layers"),
        (["up.weight"], "matches none of 6 parameters"),
        (["*.up.weight[0:2"], "cannot be read, expected a name"),
        (["*.up.weight[a]"], "cannot be read"),
        (["*.up.weight[...]"], "cannot be read"),
        ([""], "cannot be read"),
        (
            ["*.up.weight[6]"],
            r"'layers\.0\.up\.weight' of shape \(6, 4\): index 6 is out of range, expected less than 6",
        ),
        (["*.up.weight[:, -5]"], "index -5 is out of range"),
        (["*.up.weight[3:3]"], "dimension 0 is left empty"),
        (["*.up.*[0, 1]"], r"'layers\.1\.up\.bias' of shape \(6,\): 2 dimensions are indexed, expected 1"),
        ([], "0 patterns and 0 of train_only given, expected one kind"),
    ],
)
def test_bad_patterns(patterns: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sf.FreezePlan.of(SHAPES, patterns)


def test_one_text_is_no_list() -> None:
    for options in ({"freeze": "*.bias"}, {"train_only": "*.bias"}):
        with pytest.raises(TypeError, match="a single text was given, expected a list"):
            sf.FreezePlan.of(SHAPES, **options)
    with pytest.raises(ValueError, match="1 patterns and 1 of train_only given"):
        sf.FreezePlan.of(SHAPES, ["*.bias"], train_only=["scale"])
