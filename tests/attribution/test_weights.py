"""Scores of every weight that trains, and the plans they make."""

from __future__ import annotations

import json
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from attribution_models import SAFETY, UTILITY, ToyLM, batch_of, refused, split_batches, state_of, tiny, toy_batches
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import (
    MaskBuilder,
    SquaredGradients,
    WeightScores,
    encode_pairs,
    find_units,
    score_units,
    score_weights,
)  # fmt: skip
from safefreeze_kernels.attribution.batches import read_passes
from safefreeze_kernels.attribution.files import write_tensors
from safefreeze_kernels.attribution.saliency import Margin
from safefreeze_kernels.attribution.units import unit_masks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:score_weights. the mean refusal margin:UserWarning"),  # of random models
    pytest.mark.filterwarnings("ignore:score_weights. 1 parameters have no gradient:UserWarning"),  # a saturated gate
]


class Linear(nn.Module):
    """Logits of a token are its row of a table times a matrix: gradients by hand."""

    def __init__(self, table: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = nn.Parameter(weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.table[input_ids])


def by_hand() -> tuple[Linear, list[dict[str, Tensor]]]:
    """A model that gives every token the probability 1/3, and two rows: prompt 1 or 2, response 0."""
    table = torch.tensor([[9.0, 9.0], [1.0, 2.0], [-3.0, 0.5]])
    return Linear(table, torch.zeros(3, 2)), [batch_of([[1, 0], [2, 0]], [1, 1])]


def scored(model: nn.Module | None = None, **options: Any) -> WeightScores:
    safety, utility, task = (toy_batches([4, 4, 3], seed) for seed in (1, 2, 3))
    return score_weights(ToyLM() if model is None else model, safety, utility, task, **options)


def made_up(values: dict[str, Tensor], task: dict[str, Tensor] | None = None, **more: Any) -> WeightScores:
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    below = None if task is None else SquaredGradients(task)
    return WeightScores(shapes, SquaredGradients(values), task=below, **more)


def frozen(plan: sf.FreezePlan, scores: WeightScores) -> np.ndarray:
    """Flat, of all weights in their order."""
    nothing = {name: sf.FreezeMask(shape) for name, shape in scores.shapes.items()}
    return torch.cat([mask.dense().reshape(-1) for mask in {**nothing, **plan}.values()]).numpy()


# --------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(("rows", "means"), [(1, [[0], [1]]), (2, [[0, 1]]), (4, [[0, 1]])])
def test_squares_by_hand(rows: int, means: list[list[int]]) -> None:
    """M = z0 - logsumexp(z1, z2): ∂M/∂z = (1, -½, -½) where all z are 0; ∂z_i/∂W_i = x. L: p - (1, 0, 0)."""
    model, batches = by_hand()
    inputs = model.table[1:].double()
    scores = score_weights(model, batches, batches, rows_per_gradient=rows)
    assert scores.utility is not None
    for found, slope in ((scores.safety, (1, -0.5, -0.5)), (scores.utility, (-2 / 3, 1 / 3, 1 / 3))):
        expected = sum(torch.outer(torch.tensor(slope).double(), inputs[of].mean(0)).square() for of in means)
        torch.testing.assert_close(found.values["head.weight"], expected.float())
    assert scores.safety.mean == pytest.approx(-np.log(2)) and scores.utility.mean == pytest.approx(np.log(3))
    assert scores.safety.n_positions == 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_every_weight_has_the_square_of_its_gradient(model_type: str) -> None:
    model = tiny(model_type, tie_word_embeddings=True)
    scores = score_weights(model, SAFETY, UTILITY)
    names = dict(model.named_parameters())
    assert list(scores.shapes) == list(names) and scores.total == sum(p.numel() for p in names.values())
    wanted = {name: torch.zeros_like(p) for name, p in names.items()}
    for one in read_passes(SAFETY, "safety", 4):
        gradients = torch.autograd.grad(Margin(None, None).of(model, one).mean(), list(names.values()))
        for name, gradient in zip(names, gradients, strict=True):
            wanted[name] += gradient.square()
    for name, square in wanted.items():
        torch.testing.assert_close(scores.safety.values[name], square, msg=name)


def test_sums_over_units_are_the_scores_of_units() -> None:
    model = tiny("llama", num_key_value_heads=4)
    whole, units = score_weights(model, SAFETY, UTILITY), score_units(model, SAFETY, UTILITY, "decision_fisher")
    layout = units.layout
    for kind, shape in layout.unit_shapes.items():
        for layer, unit in np.ndindex(*shape):
            flags = {word: np.zeros(size, bool) for word, size in layout.unit_shapes.items()}
            flags[kind][layer, unit] = True
            masks = unit_masks(layout, flags["heads"], flags["channels"])
            for word in ("safety", "utility"):
                values = getattr(whole, word).values
                total = sum(values[name][mask.dense()].double().sum() for name, mask in masks.items())
                torch.testing.assert_close(total.float(), getattr(getattr(units, word), kind)[layer, unit])


def test_forms_divide_by_what_else_is_needed() -> None:
    scores = scored()
    assert scores.utility is not None and scores.task is not None
    for form, below in (("S/U", scores.utility), ("S/T", scores.task)):
        floor = 1e-3 * torch.cat([value.reshape(-1) for value in below.values.values()]).double().mean()
        ratios = scores.form(form)  # type: ignore[arg-type]
        assert list(ratios) == list(scores.shapes) and len(ratios) == len(scores.shapes)
        for name, value in scores.safety.values.items():
            torch.testing.assert_close(ratios[name], value / (below.values[name] + floor.float()))
    assert scores.form("S") is scores.safety.values


# ---------------------------------------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("grain", ["element", "row"])
def test_scores_do_not_depend_on_batching_or_padding(grain: Any) -> None:
    model = tiny()
    one = score_weights(model, split_batches([6]), grain=grain)
    for sizes, side in (([1, 5], "left"), ([2, 2, 2], "right")):
        other = score_weights(model, split_batches(sizes, side), grain=grain)
        assert other.safety.fingerprint == one.safety.fingerprint
        for name, value in one.safety.values.items():
            torch.testing.assert_close(other.safety.values[name], value, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_left_as_found(dtype: torch.dtype) -> None:
    model = tiny().to(dtype).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad and p.dim() > 1 else None
    before = state_of(model.float()) if dtype is torch.float32 else None
    scores = score_weights(model, SAFETY, UTILITY)
    assert "model.norm.weight" not in scores.shapes
    assert all(value.dtype == torch.float32 for value in scores.safety.values.values())
    if before is not None:
        assert state_of(model) == before


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_scoring_inside_other_gradient_modes(around: Any) -> None:
    model = ToyLM()
    with around():
        inside = scored(model)
    outside = scored(model)
    for name, value in outside.safety.values.items():
        assert torch.equal(inside.safety.values[name], value)
        assert not inside.safety.values[name].is_inference()


def test_gradients_are_dropped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is taken, no other is there."""
    model, alive = tiny(), []
    from safefreeze_kernels.attribution import gradients

    taken = gradients._taken

    def watching(take: Any, name: str, parameter: Tensor) -> None:
        alive.append(weakref.ref(parameter.grad))
        assert sum(ref() is not None for ref in alive) <= 2, "the one that is taken, and one that autograd lets go"
        taken(take, name, parameter)

    monkeypatch.setattr(gradients, "_taken", watching)
    score_weights(model, SAFETY)
    assert len(alive) == 2 * len(list(model.parameters()))


@pytest.mark.parametrize("grain", ["element", "row"])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, grain: Any) -> None:
    safety, utility = toy_batches([4, 4, 4], 1), toy_batches([4, 4], 2)

    def breaking():  # type: ignore[no-untyped-def]
        yield utility[0]
        raise KeyboardInterrupt

    whole, where = score_weights(ToyLM(), safety, utility, grain=grain), tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        score_weights(ToyLM(), safety, breaking(), resume=where, every=1, grain=grain)
    other: Any = "row" if grain == "element" else "element"
    refused("score_weights: resume is .*another grain", lambda: scored(resume=where, grain=other))
    resumed = score_weights(ToyLM(), safety, utility, resume=where, grain=grain)
    assert not where.exists()
    for word, one in whole.sets.items():
        again = getattr(resumed, word)
        assert (again.mean, again.n_positions, again.fingerprint) == (one.mean, one.n_positions, one.fingerprint)
        assert all(torch.equal(again.values[name], value) for name, value in one.values.items())


# ------------------------------------------------------------------------------------------------------ selecting


@pytest.mark.parametrize("form", ["S", "S/U", "S/T"])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_the_top_elements_are_the_highest(form: Any, share: float) -> None:
    scores = scored()
    plan = scores.top(share, form=form).build()
    flat = torch.cat([scores.form(form)[name].reshape(-1) for name in scores.shapes]).numpy()
    wanted = np.zeros(len(flat), bool)
    wanted[np.argsort(-flat, kind="stable")[: round(share * len(flat))]] = True
    assert (frozen(plan, scores) == wanted).all()
    assert plan.metadata["selection"] == {"top": share, "grain": "element", "by": form, "within": "model"}


def test_equal_ones_are_taken_in_their_order() -> None:
    scores = made_up({"b": torch.ones(3, 4), "a": torch.full((4,), 1.0)})
    assert frozen(scores.top(0.25).build(), scores).nonzero()[0].tolist() == [0, 1, 2, 3]
    assert frozen(scores.top(0.25, within="tensor").build(), scores).nonzero()[0].tolist() == [0, 1, 2, 12]
    assert list(scores.top(0.5, grain="row").build()["b"].rows) == [0, 1]


def test_the_share_of_each_tensor() -> None:
    scores = scored(tiny())
    plan = scores.top(0.3, within="tensor").build()
    for name, shape in scores.shapes.items():
        assert plan[name].frozen_count == round(0.3 * np.prod(shape))
        least = scores.safety.values[name][plan[name].dense()].min()
        assert least >= scores.safety.values[name][~plan[name].dense()].max()
    rows = scores.top(0.5, grain="row", within="tensor").build()
    counted = {name: mask.frozen_count / mask.numel for name, mask in rows.items() if "norm" not in name}
    assert {"model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"} <= set(counted)
    assert max(counted.values()) <= 0.5, "what would exceed a tensor's share is not taken"
    together = scores.top(0.5, grain="row").build()
    assert max(mask.frozen_fraction for mask in together.values()) > 0.5


@pytest.mark.parametrize("grain", ["row", "unit"])
@pytest.mark.parametrize("form", ["S", "S/T"])
def test_scores_by_rows_make_the_same_plans(grain: Any, form: Any) -> None:
    model = tiny("qwen2")
    by_element, by_row = (score_weights(model, SAFETY, None, UTILITY, grain=kept) for kept in ("element", grain))
    assert by_row.grain == "row"
    held = sum(value.numel() for value in by_row.safety.values.values())
    assert held < by_element.total / 5
    one, other = (scores.top(0.4, grain=grain, form=form).build(model) for scores in (by_element, by_row))
    assert one == other and one.metadata == other.metadata and one
    assert sum(mask.frozen_count for mask in one.values()) <= 0.4 * by_element.total
    refused("scores by rows", lambda: by_row.top(0.5, grain="element"))
    assert by_row.top(0.4).grain == "row", "the default is their own"


def test_rows_rank_by_the_ratio_of_their_means() -> None:
    safety, task = (
        torch.tensor([[1.0, 1.0], [8.0, 0.0], [2.0, 2.0]]),
        torch.tensor([[1.0, 1.0], [1.0, 7.0], [4.0, 0.0]]),
    )
    scores = made_up({"w": safety}, {"w": task})
    floor = 1e-3 * 14 / 6
    assert scores.means("S/T") == pytest.approx([1 / (1 + floor), 4 / (4 + floor), 2 / (2 + floor)])
    assert scores.top(0.34, grain="row", form="S/T").build()["w"].rows.tolist() == [1]


@pytest.mark.parametrize("grain", ["element", "row", "unit"])
def test_a_random_control_freezes_as_many_of_each_tensor(grain: Any) -> None:
    selection = scored().top(0.3, grain=grain)
    plan, one, same, other = selection.build(), *(selection.random_like(seed).build() for seed in (1, 1, 2))
    assert one == same and len({plan.fingerprint, one.fingerprint, other.fingerprint}) == 3
    if grain == "unit":  # of each kind and layer: a head's weights lie in several tensors
        assert plan.frozen_fraction == pytest.approx(one.frozen_fraction, abs=0.05)
    else:
        assert {n: m.frozen_count for n, m in one.items()} == {n: m.frozen_count for n, m in plan.items()}
    assert one.metadata["random_like"] == 1 and "random_like" not in plan.metadata


def test_a_plan_is_what_an_optimizer_takes() -> None:
    model = tiny(tie_word_embeddings=True)
    scores = score_weights(model, SAFETY)
    plan = scores.top(0.5).build(model)
    plan.check(model)
    assert "model.embed_tokens.weight" in plan and "lm_head.weight" not in plan, "tied weights are one list"
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-2, freeze=plan)
    proof = sf.snapshot(model, plan)
    model(**{key: SAFETY[0][key] for key in ("input_ids", "labels")}).loss.backward()
    optimizer.step()
    proof.verify(model)


def test_a_plan_may_freeze_whole_tensors() -> None:
    plan = scored().top(1.0).build()
    assert plan.frozen_fraction == 1.0
    assert f"{len(plan)} of {len(plan)} parameters are frozen whole" in plan.summary()


# --------------------------------------------------------------------------------------------- models and files


@pytest.mark.parametrize("grain", ["element", "row"])
def test_scores_survive_a_file(tmp_path: Path, grain: Any) -> None:
    model = tiny()
    scores = score_weights(model, SAFETY, None, UTILITY, refuse_token=[3, 5], grain=grain)
    scores.save(tmp_path / "scores")
    again = WeightScores.load(tmp_path / "scores")
    again.check(model)
    for word in ("shapes", "grain", "layout", "method", "model_fingerprint", "settings"):
        assert getattr(again, word) == getattr(scores, word), word
    assert list(again.shapes) == list(scores.shapes) and list(again.sets) == ["safety", "task"]
    for word, one in scores.sets.items():
        other = getattr(again, word)
        assert (other.mean, other.n_positions, other.fingerprint) == (one.mean, one.n_positions, one.fingerprint)
        assert all(torch.equal(other.values[name], value) for name, value in one.values.items())
    assert again.top(0.3, grain="unit", form="S/T").build() == scores.top(0.3, grain="unit", form="S/T").build()
    assert "41" not in repr(again) and repr(again) == repr(scores) and "decision_fisher" in repr(scores)


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    scores = made_up({"odd": torch.rand(3), "ü": torch.rand(5, 3)})
    scores.save(tmp_path / "scores")
    found = safetensors.torch.load_file(tmp_path / "scores")
    assert set(found) == {"safety:odd", "safety:ü"} and torch.equal(found["safety:ü"], scores.safety.values["ü"])


def test_tensors_of_a_file_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.rand(2, dtype=torch.float64), "c": torch.rand(3)}
    write_tensors(tmp_path / "mixed", tensors, {"format": "some"})
    raw = (tmp_path / "mixed").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0 and entries["__metadata__"] == {"format": "some"}
    assert all(entries[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())
    found = safetensors.torch.load_file(tmp_path / "mixed")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    scores = scored()
    scores.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("holds no weight scores", lambda: WeightScores.load(path))
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    refused("holds no weight scores.*values from nan", lambda: WeightScores.load(path))
    path.write_bytes(whole.replace(b"table", b"cable", 1))
    refused("holds no weight scores", lambda: WeightScores.load(path))
    sf.FreezePlan({"a": sf.FreezeMask((2,), rows=[0])}).save(path)
    refused("'safefreeze.plan'.*expected 'safefreeze.weight_scores'", lambda: WeightScores.load(path))
    refused("no file", lambda: WeightScores.load(tmp_path / "none"), FileNotFoundError)


def test_scores_know_the_model_they_were_made_with() -> None:
    model = ToyLM()
    scores = scored(model)
    scores.check(model)
    scores.top(0.5).build(nn.parallel.DataParallel(model))
    assert scores.top(0.5).build(ToyLM().to("meta")), "only shapes are compared"
    with torch.no_grad():
        model.table.add_(0.5)
    refused("expected .*those that were scored", lambda: scores.top(0.5).build(model))
    refused("names 'table', which is not among", lambda: scores.check(nn.Linear(2, 2)))


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "'w' holds values from nan"),
        (torch.tensor([1.0, float("inf")]), "'w' holds values from 1.0 to inf"),
        (torch.tensor([1.0, -1.0]), "'w' holds values from -1.0"),
        (torch.zeros(2), "all values of safety are 0"),
    ],
)
def test_bad_values(values: Tensor, message: str) -> None:
    refused(message, lambda: made_up({"w": values}))


def test_bad_shapes() -> None:
    good = SquaredGradients({"w": torch.ones(2, 3)})
    refused("of 'w' has shape", lambda: WeightScores({"w": (3, 2)}, good))
    refused("differ in 'v'", lambda: WeightScores({"w": (2, 3), "v": (1,)}, good))
    refused("has shape", lambda: WeightScores({"w": (2, 3)}, good, grain="row"))
    zero = SquaredGradients({"w": torch.zeros(2, 3)})
    refused("all values of task are 0", lambda: WeightScores({"w": (2, 3)}, good, task=zero))


def test_gradients_that_are_nan_or_zero_are_named() -> None:
    model, batches = by_hand()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    refused("score_weights: gradients of 'head.weight'.*are NaN", lambda: score_weights(model, batches))
    flat, _ = by_hand()
    flat.table.zero_()
    refused("score_weights: all gradients on the safety set are 0", lambda: score_weights(flat, batches))


def test_a_safety_set_in_which_nothing_is_refused() -> None:
    model, batches = by_hand()
    with pytest.warns(UserWarning, match=r"margin on the safety set is -0\.69, below 0"):
        score_weights(model, batches)
    with torch.no_grad():  # logits of token 0 that are high for both prompts
        model.table[1:] = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        model.head.weight[0, 0] = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_weights(model, batches)


def test_parameters_that_take_no_part_are_told() -> None:
    model, batches = by_hand()
    model.aside = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"2 parameters have no gradient of the margin, 'aside.weight' first"):
        scores = score_weights(model, batches)
    assert not scores.safety.values["aside.weight"].any()
    refused("all values of 'aside.weight' are 0", lambda: scores.top(0.5, within="tensor").build())


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (1.5, {}, "share is 1.5, expected a fraction of all"),
        (0.0, {}, "share is 0.0"),
        (200, {}, "share is 200"),
        (True, {}, "share is True"),
        (float("nan"), {}, "share is nan"),
        (0.5, {"grain": "column"}, "'column'"),
        (0.5, {"form": "S/V"}, "'S/V'"),
        (0.5, {"form": "S/U"}, "no utility set among safety, task; pass utility"),
        (0.5, {"within": "layer"}, "'layer'"),
        (0.5, {"grain": "unit"}, "where units lie in this model is not known"),
    ],
)
def test_bad_requests(share: Any, options: Any, message: str) -> None:
    scores = made_up({"w": torch.rand(4, 4)}, {"w": torch.rand(4, 4)})
    refused(message, lambda: scores.top(share, **options))


def test_a_share_that_nothing_fits_into() -> None:
    scores = made_up({"w": torch.rand(4, 4)})
    refused("a share of 0.1 of 16 weights selects no row", lambda: scores.top(0.1, grain="row").build())
    refused("selects no element", lambda: scores.top(0.01).build())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"safety": toy_batches([2], 1)[0]}, TypeError, "score_weights: safety is one batch"),
        ({"safety": []}, ValueError, "score_weights: safety holds no batches"),
        ({"task": iter(())}, ValueError, "score_weights: task holds no batches"),
        ({"safety": [batch_of([[1, 2, 3]], [0])]}, ValueError, "score_weights: .*no response token in row 0"),
        ({"safety": [batch_of([[1, 2, 3]], [3])]}, ValueError, "score_weights: .*no prompt before its response"),
        ({"method": "snip"}, ValueError, "score_weights: method is 'snip', expected one of 'decision_fisher'"),
        ({"grain": "column"}, ValueError, "'column'"),
        ({"rows_per_gradient": 0}, ValueError, "score_weights: rows_per_gradient is 0"),
        ({"refuse_token": 99}, ValueError, "score_weights: refuse_token is 99"),
        ({"model": ToyLM().requires_grad_(False)}, ValueError, "parameters that train"),
        ({"model": ToyLM().to("meta")}, ValueError, "score_weights: .*meta device"),
    ],
)
def test_bad_calls(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": ToyLM(), "safety": toy_batches([2], 1), "task": toy_batches([2], 2), **change}
    refused(message, lambda: score_weights(**given), error)


def test_a_builder_of_units_says_who_selects_weights() -> None:
    refused("scores.top", lambda: MaskBuilder(scored()), TypeError)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_that_the_tokenizer_truncates(side: str) -> None:
    """Of one cut at its end nothing is left to score; of one cut at its beginning the border is lost."""

    def tokenize(text: str, **_: Any) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": ids[:12] if side == "right" else ids[-12:]}

    class Cutting(SimpleNamespace):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return tokenize(text, **options)

    tokenizer = Cutting(eos_token=None, pad_token_id=0, eos_token_id=0)
    assert encode_pairs(tokenizer, [("short", "answer")])[0]["labels"].ne(-100).sum() == 6
    told = {"right": "pair 0 has 12 prompt and 0 response tokens", "left": "pair 0 .*does the tokenizer truncate"}
    refused(told[side], lambda: encode_pairs(tokenizer, [("a prompt that is long", "no")]))


def test_layouts_go_with_scores() -> None:
    model = tiny("qwen2")
    assert score_weights(model, SAFETY).layout == find_units(model)
    assert score_weights(by_hand()[0], by_hand()[1]).layout is None
