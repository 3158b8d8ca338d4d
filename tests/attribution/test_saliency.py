"""Attribution: scores from gradients, against autograd run naively."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import (
    ANSWERS,
    OTHER_ANSWERS,
    OTHER_ROWS,
    ROWS,
    SAFETY,
    UTILITY,
    ToyLM,
    batch_of,
    refused,
    split_batches,
    state_of,
    tiny,
    toy_batches,
)
from torch import Tensor, nn

from safefreeze_kernels.attribution import SetScores, UnitScores, find_units, gradients, saliency, score_units
from safefreeze_kernels.attribution.batches import read_passes
from safefreeze_kernels.attribution.saliency import Margin, MarginGradients
from safefreeze_kernels.attribution.units import unit_masks

GRADIENT_METHODS = ("snip", "decision_fisher", "gradient_x_activation", "activation_patching")
#: transposed and fused weights with biases, fused interleaved ones, grouped queries with biases, experts
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {},
    "qwen2_moe": {},
    "gpt_oss": {},
}


pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


@functools.cache
def exact(model_type: str) -> nn.Module:
    """The tiny model in float64, its experts by the loop that knows float64. Do not change it."""
    return tiny(model_type, **MODELS[model_type], experts_implementation="eager").double()


# Of a float64 model, transformers' norms still compute in float32, and how they round depends on the processor and on
# the shape of the batch: sixteen roundings of float32.
ROUNDINGS = 2.0**-19


# ------------------------------------------------------------------------------------------------- by hand


def logits_of(model: nn.Module, row: list[int]) -> Tensor:
    """Float64 ``[tokens, vocabulary]`` of a row on its own, without padding."""
    output = model(input_ids=torch.tensor([row]))
    return getattr(output, "logits", output)[0].double()


def log_odds(model: nn.Module, row: list[int], answer: int, refuse: list[int] | None = None) -> Tensor:
    """log p/(1-p) of refusing at the position that predicts the first answer token."""
    first = len(row) - answer
    p = logits_of(model, row)[first - 1].softmax(0)[refuse or [row[first]]].sum()
    return torch.log(p / (1 - p))


def cross_entropies(model: nn.Module, row: list[int], answer: int) -> Tensor:
    first = len(row) - answer
    return -logits_of(model, row)[first - 1 : -1].log_softmax(1)[range(answer), row[first:]]


def weight_gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def summed_over_units(model: nn.Module, entries: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of each unit's own entries, unit by unit, by what freezing it alone would freeze."""
    layout = find_units(model)
    found = tuple(np.zeros(shape) for shape in (layout.heads_shape, layout.channels_shape))

    def total(heads: np.ndarray, channels: np.ndarray, kv: Any) -> float:
        masks = unit_masks(layout, heads, channels, "full", kv)
        return float(sum(entries[name][mask.dense()].sum() for name, mask in masks.items()))

    for which, sums in enumerate(found):
        for unit in np.ndindex(sums.shape):
            chosen = [np.zeros(shape, bool) for shape in (layout.heads_shape, layout.channels_shape)]
            chosen[which][unit] = True
            alone = total(*chosen, kv="never")
            shared = total(*chosen, kv="any") - alone
            sums[unit] = alone + shared / layout.group_size
    return found


def naive(
    model: nn.Module, rows: list[list[int]], answers: list[int], value: Callable[..., Tensor], entry: Any, size: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Σ over groups of rows of Σ over a unit's weights of ``entry(w, ∂ mean value / ∂w)``."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for start in range(0, len(rows), size):
        group = zip(rows[start : start + size], answers[start : start + size], strict=True)
        mean = torch.cat([value(model, row, answer).reshape(-1) for row, answer in group]).mean()
        for name, gradient in weight_gradients(model, mean).items():
            sums[name] += entry(parameters[name].detach(), gradient)
    return summed_over_units(model, sums)


def squares(_: Tensor, gradient: Tensor) -> Tensor:
    return gradient**2


def assert_scores(scores: SetScores, heads: Any, channels: Any, what: str) -> None:
    for word, got, expected in (("heads", scores.heads, heads), ("channels", scores.channels, channels)):
        wanted = torch.as_tensor(expected, dtype=torch.float32)
        torch.testing.assert_close(
            got, wanted, rtol=ROUNDINGS, atol=0, msg=lambda text, at=word: f"{what}: {at}: {text}"
        )


# -------------------------------------------------------------------------------------- gradients of weights


@pytest.mark.parametrize("model_type", MODELS)
def test_decision_fisher_is_the_studys_formula(model_type: str) -> None:
    model = exact(model_type)
    scores = score_units(model, SAFETY, UTILITY, "decision_fisher")
    decision = naive(model, ROWS, ANSWERS, log_odds, squares)
    needed = naive(model, OTHER_ROWS, OTHER_ANSWERS, cross_entropies, squares)
    assert_scores(scores.safety, *decision, "safety")
    assert_scores(scores.utility, *needed, "utility")
    floor = 0.001 * np.concatenate([part.ravel() for part in needed]).mean()
    assert scores.ranking is not None
    for got, s, u in zip(scores.ranking, decision, needed, strict=True):
        np.testing.assert_allclose(got, s / (u + floor), rtol=1e-5)
    assert (scores.safety.n_positions, scores.utility.n_positions) == (len(ROWS), sum(OTHER_ANSWERS))
    assert scores.settings == {"refuse_token": None, "rows_per_gradient": 4}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_snip_is_weight_times_gradient(model_type: str) -> None:
    model = exact(model_type)
    scores = score_units(model, SAFETY, UTILITY, "snip", rows_per_gradient=1)
    for found, rows, answers in ((scores.safety, ROWS, ANSWERS), (scores.utility, OTHER_ROWS, OTHER_ANSWERS)):
        expected = naive(model, rows, answers, cross_entropies, lambda w, g: (w * g).abs(), 1)
        assert_scores(found, *expected, "snip")
    assert scores.ranking is None


def test_refuse_tokens_of_ones_own() -> None:
    model = exact("qwen2")
    scores = score_units(model, SAFETY, UTILITY, "decision_fisher", refuse_token=[7, 9, 7], rows_per_gradient=6)
    expected = naive(model, ROWS, ANSWERS, functools.partial(log_odds, refuse=[7, 9]), squares, 6)
    assert_scores(scores.safety, *expected, "safety")
    assert scores.settings["refuse_token"] == [7, 9]


def test_a_shared_kv_head_is_split_evenly() -> None:
    """Only the key and value weights have gradients here: the two heads of a group get the same."""
    model = ToyLM()
    with torch.no_grad():
        for layer in model.layers:
            layer["self_attn"].o_proj.weight.fill_(0.5)
            layer["self_attn"].q_proj.weight.fill_(0.25)
    heads = score_units(model, toy_batches([4], 1), toy_batches([4], 2), "snip").safety.heads
    torch.testing.assert_close(heads[:, 0::2], heads[:, 1::2], rtol=1e-5, atol=0)
    assert (heads > 0).all()


# ---------------------------------------------------------------------------------- gradients of activations


def readers(model: nn.Module) -> Iterator[tuple[int, Any]]:
    layout = find_units(model)
    return ((layer, reader) for layer in range(layout.n_layers) for reader in layout.readers(layer))


def product_by_weights(
    model: nn.Module, rows: list[list[int]], answers: list[int], refuse: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over rows of Σ_pos a·∂m/∂a, by another way: a feature acts through its column of the matrix that reads it,
    so the sum equals Σ_i W_ij · ∂m/∂W_ij."""
    layout = find_units(model)
    heads, channels = np.zeros(layout.heads_shape), np.zeros(layout.channels_shape)
    for row, answer in zip(rows, answers, strict=True):
        gradients = weight_gradients(model, log_odds(model, row, answer, refuse))
        for layer, reader in readers(model):
            weight, gradient = model.get_parameter(reader.parameter).detach(), gradients[reader.parameter]
            product = weight * gradient if reader.expert is None else (weight * gradient)[reader.expert]
            features = product.sum(1 if reader.transposed else 0).reshape(reader.n_units, reader.width).sum(1)
            target = heads if reader.units == "head" else channels
            target[layer, reader.first : reader.first + reader.n_units] += features.numpy() / len(rows)
    return heads, channels


@pytest.mark.parametrize("model_type", MODELS)
def test_gradient_times_activation(model_type: str) -> None:
    model = exact(model_type)
    scores = score_units(model, SAFETY, UTILITY, "gradient_x_activation", refuse_token=[5, 6])
    safety = product_by_weights(model, ROWS, ANSWERS, [5, 6])
    utility = product_by_weights(model, OTHER_ROWS, OTHER_ANSWERS, [5, 6])
    assert scores.ranking is not None
    for word, got, expected in (
        ("safety", (scores.safety.heads, scores.safety.channels), safety),
        ("utility", (scores.utility.heads, scores.utility.channels), utility),
        ("ranking", scores.ranking, [s - u for s, u in zip(safety, utility, strict=True)]),
    ):
        for g, e in zip(got, expected, strict=True):
            # terms of either sign cancel: what is lost is a share of the terms, not of their sum
            np.testing.assert_allclose(g, np.abs(e), rtol=ROUNDINGS, atol=ROUNDINGS * np.abs(e).max(), err_msg=word)


def patching_slope(model: nn.Module, mean: Tensor, name: str, features: slice) -> float:
    """How the mean margin of the safety rows changes, at first, when a unit's input moves towards the mean at all
    prompt positions but the first."""
    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    margins = []
    for row, answer in zip(ROWS, ANSWERS, strict=True):
        last = len(row) - answer - 1
        place = slice(min(1, last), last + 1)

        def patch(_: nn.Module, inputs: tuple[Tensor, ...], place: slice = place) -> tuple[Tensor]:
            towards = torch.zeros_like(inputs[0])
            towards[0, place, features] = (mean - inputs[0].detach())[0, place, features]
            return (inputs[0] + amount * towards,)

        handle = model.get_submodule(name).register_forward_pre_hook(patch)
        margins.append(log_odds(model, row, answer, [5, 6]))
        handle.remove()
    return torch.autograd.grad(torch.stack(margins).mean(), amount)[0].item()


def prompt_means(model: nn.Module, rows: list[list[int]], answers: list[int]) -> dict[str, Tensor]:
    """Mean input of each reader over all prompt positions but the first."""
    kept: dict[str, list[Tensor]] = {}
    for row, answer in zip(rows, answers, strict=True):
        last = len(row) - answer - 1
        handles = [
            model.get_submodule(reader.module).register_forward_pre_hook(
                lambda _, inputs, name=reader.module, last=last: kept.setdefault(name, []).append(
                    inputs[0][0, min(1, last) : last + 1]
                )
            )
            for _, reader in readers(model)
        ]
        with torch.no_grad():
            logits_of(model, row)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).mean(0) for name, parts in kept.items()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_patching_is_the_slope_of_patching_exactly(model_type: str) -> None:
    model = exact(model_type)
    scores = score_units(model, SAFETY, UTILITY, "activation_patching", refuse_token=[5, 6])
    means = prompt_means(model, OTHER_ROWS, OTHER_ANSWERS)
    for layer, reader in readers(model):
        found = scores.safety.heads if reader.units == "head" else scores.safety.channels
        for unit in (0, reader.n_units - 1):
            features = slice(unit * reader.width, (unit + 1) * reader.width)
            slope = patching_slope(model, means[reader.module], reader.module, features)
            assert found[layer, reader.first + unit].item() == pytest.approx(abs(slope), rel=1e-5), (layer, unit)
    assert scores.ranking is not None and torch.equal(scores.ranking.channels, scores.safety.channels)
    # each set is patched with the other's mean
    swapped = score_units(model, UTILITY, SAFETY, "activation_patching", refuse_token=[5, 6])
    torch.testing.assert_close(swapped.safety.channels, scores.utility.channels, rtol=1e-5, atol=1e-9)


def test_experts_add_up_to_the_dense_layer_they_split() -> None:
    """Two equal experts, one per token: what both see together is what a dense MLP sees."""
    model = tiny("mixtral", num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager").double()
    dense = tiny("llama", intermediate_size=8, rms_norm_eps=1e-5, rope_theta=1e6).double()
    with torch.no_grad():
        for layer, alike in zip(model.model.layers, dense.model.layers, strict=True):
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.experts.gate_up_proj[1] = layer.mlp.experts.gate_up_proj[0]
            layer.mlp.experts.down_proj[1] = layer.mlp.experts.down_proj[0]
            alike.mlp.gate_proj.weight[:], alike.mlp.up_proj.weight[:] = layer.mlp.experts.gate_up_proj[0].chunk(2)
            alike.mlp.down_proj.weight.copy_(layer.mlp.experts.down_proj[0])
        same_names = dict(model.named_parameters())
        for name, parameter in dense.named_parameters():
            if ".mlp." not in name:
                parameter.copy_(same_names[name])
    seen = []
    for one in (model, dense):
        collector = MarginGradients(one, find_units(one), Margin([5], None), first=False)
        for part in read_passes(SAFETY, "safety"):
            collector.take(part)
        counts = collector.totals["count"].tolist()
        features = [collector.totals[name].split(collector.inputs.widths) for name in ("product", "gradient")]
        features.append(collector.totals["activation"].split(collector.inputs.widths))
        seen.append((counts, features))
    # readers of a layer: attention, then one expert after the other, or the dense MLP
    (split, parts), (whole, wholes) = seen
    assert [n for n in split if n == 0] == [] and whole == [split[0], split[1] + split[2]] * 2
    for part, expected in zip(parts, wholes, strict=True):
        for layer in range(2):
            attention, *experts = part[3 * layer : 3 * layer + 3]
            for got, of in ((attention, expected[2 * layer]), (experts[0] + experts[1], expected[2 * layer + 1])):
                torch.testing.assert_close(got, of, rtol=ROUNDINGS, atol=ROUNDINGS * float(of.abs().max()))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_score_alike_however_they_are_computed(model_type: str) -> None:
    """In float32 the default is grouped products; `watched` must run the loop whatever is set."""
    default, loop = tiny(model_type), tiny(model_type, experts_implementation="eager")
    assert default.config._experts_implementation != "eager"
    for method in ("decision_fisher", "gradient_x_activation"):
        same(*(score_units(model, SAFETY, UTILITY, method) for model in (default, loop)), exactly=False)


# --------------------------------------------------------------------------------------------------- margins


def margins_of(batch: dict[str, Tensor], logits: Tensor, **tokens: Any) -> list[float]:
    (one,) = read_passes([batch], "safety")
    margin = Margin(tokens.get("refuse"), tokens.get("comply"))
    return margin(one, lambda wanted: logits[wanted]).tolist()


def test_margins_by_hand() -> None:
    """Responses begin at tokens 2 and 1: rows 1 and 0 of the logits decide."""
    batch = {"input_ids": torch.tensor([[1, 1, 2, 3], [1, 0, 2, 2]])}
    batch["labels"] = torch.tensor([[-100, -100, 2, 3], [-100, 0, 2, 2]])
    logits = torch.full((2, 4, 4), 99.0)
    logits[0, 1] = torch.tensor([1.0, 2.0, 4.0, 0.0])
    logits[1, 0] = torch.tensor([0.5, -1.0, 0.0, 3.0])
    e = np.exp
    assert margins_of(batch, logits) == pytest.approx(
        [4 - np.log(e(1) + e(2) + 1), 0.5 - np.log(e(-1) + 1 + e(3))], rel=1e-6
    )
    assert margins_of(batch, logits, refuse=[0, 1], comply=[3]) == pytest.approx(
        [np.log(e(1) + e(2)), np.log(e(0.5) + e(-1)) - 3], rel=1e-6
    )
    assert margins_of(batch, logits, refuse=[3], comply=[1]) == pytest.approx([-2, 4], rel=1e-6)
    with pytest.raises(ValueError, match=r"comply_token is 4, expected a token of the model's 4"):
        margins_of(batch, logits, refuse=[0], comply=[4])


def test_the_default_refusal_of_margins_on_both_sets() -> None:
    """All first tokens of the safety set's responses together."""
    firsts = sorted({row[len(row) - n] for row, n in zip(ROWS, ANSWERS, strict=True)})
    by_default = score_units(tiny(), SAFETY, UTILITY, "gradient_x_activation")
    named = score_units(tiny(), iter(SAFETY), UTILITY, "gradient_x_activation", refuse_token=firsts)
    assert by_default.ranking is not None and named.ranking is not None
    assert torch.equal(by_default.ranking.channels, named.ranking.channels)
    assert by_default.settings == named.settings == {"refuse_token": firsts, "comply_token": None}
    with pytest.raises(ValueError, match="refuse_token is not given, expected it where safety is not a list"):
        score_units(tiny(), iter(SAFETY), UTILITY, "gradient_x_activation")
    with pytest.raises(ValueError, match="5 is a refuse_token and a comply_token"):
        score_units(tiny(), SAFETY, UTILITY, "activation_patching", refuse_token=5, comply_token=[4, 5])


# --------------------------------------------------------------------------------------- batching and restoring


def same(one: UnitScores, other: UnitScores, exactly: bool) -> None:
    assert one.ranking is None or other.ranking is not None
    pairs = [(a, b) for word in ("safety", "utility") for a, b in zip(*(
        (getattr(s, word).heads, getattr(s, word).channels) for s in (one, other)), strict=True)]  # fmt: skip
    pairs += list(zip(one.ranking or (), other.ranking or (), strict=True))
    for a, b in pairs:
        if exactly:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 * float(b.max()))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_scores_do_not_depend_on_batching_or_padding(model_type: str, method: str) -> None:
    """Rows are regrouped where gradients are means over rows: then not even rounding differs. GPT-2 learns positions
    from the left edge of a batch."""
    model = tiny(model_type)
    together = score_units(model, SAFETY, UTILITY, method)
    for sizes, side in (([1, 5], "left"), ([2, 2, 2], "right"), ([6], "left")):
        other = score_units(model, split_batches(sizes, side), UTILITY, method)
        assert other.safety.fingerprint == together.safety.fingerprint
        same(together, other, exactly=method in ("snip", "decision_fisher"))


@pytest.mark.parametrize("method", ["decision_fisher", "activation_patching", "fluctuation"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_everything_is_left_as_found(model_type: str, method: str) -> None:
    model = tiny(model_type).train()
    model.model.layers[0].self_attn.eval()
    stepped: list[int] = []
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        if number % 2 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, number)
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: stepped.append(number))
    before = state_of(model)
    scores = score_units(model, SAFETY, UTILITY, method)
    assert state_of(model) == before

    def failing() -> Iterator[dict[str, Tensor]]:
        yield batch_of(ROWS, ANSWERS)
        raise RuntimeError("the disk is gone")

    token = {"refuse_token": 3} if method == "activation_patching" else {}
    refused("the disk is gone", lambda: score_units(model, failing(), UTILITY, method, **token), RuntimeError)
    assert state_of(model) == before and stepped == []
    # none of that mattered
    same(scores, score_units(tiny(model_type), SAFETY, UTILITY, method), exactly=True)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["decision_fisher", "gradient_x_activation", "fluctuation"])
def test_scoring_inside_other_gradient_modes(around: Any, method: str) -> None:
    model = tiny()
    expected = score_units(model, SAFETY, UTILITY, method)
    with around():
        same(score_units(model, SAFETY, UTILITY, method), expected, exactly=True)


def test_gradients_are_dropped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever one parameter's gradient is reduced, no parameter holds one."""
    lent: dict[str, Tensor] = {}
    held: list[int] = []
    make, square = gradients.aliases, saliency._squares

    def remembered(model: nn.Module) -> dict[str, Tensor]:
        lent.update(make(model))
        return lent

    def counted(weight: Tensor, gradient: Tensor) -> Tensor:
        held.append(sum(alias.grad is not None for alias in lent.values()))
        return square(weight, gradient)

    monkeypatch.setattr(gradients, "aliases", remembered)
    monkeypatch.setattr(saliency, "_squares", counted)
    score_units(ToyLM(), toy_batches([4], 1), toy_batches([4], 2), "decision_fisher")
    assert held == [0] * 2 * 14, "two sets, 14 matrices, each seen once"


def test_gradients_of_low_precision_are_summed_in_high_precision() -> None:
    """Many gradients of bfloat16 weights: the sum keeps what each adds."""
    model = ToyLM().bfloat16()
    batches = toy_batches([4], 1)
    once = score_units(model, batches, batches, "decision_fisher")
    often = score_units(model, batches * 300, batches, "decision_fisher")
    torch.testing.assert_close(often.safety.channels, 300 * once.safety.channels, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------- bad input


def test_rows_need_a_prompt_and_a_response() -> None:
    silent = [batch_of(ROWS, [*ANSWERS[:3], 0, *ANSWERS[4:]])]
    with pytest.raises(ValueError, match=r"safety, rows from 0 has no response token in row 3"):
        score_units(tiny(), silent, UTILITY, "decision_fisher")
    unasked = [batch_of(ROWS, [*ANSWERS[:4], len(ROWS[4]), ANSWERS[5]])]
    with pytest.raises(ValueError, match=r"safety, rows from 4 has no prompt before its response in row 0"):
        score_units(tiny(), unasked, UTILITY, "decision_fisher")
    with pytest.raises(ValueError, match=r"utility, rows from 0 has no response tokens after a prompt"):
        score_units(tiny(), SAFETY, [batch_of(ROWS, [0] * 6)], "snip")


def test_options_belong_to_methods() -> None:
    for method, option, message in (
        ("fluctuation", {"refuse_token": 3}, "refuse_token is 3, but 'fluctuation' has no such option"),
        ("snip", {"positions": "all"}, "positions is 'all', but 'snip' has no such option, expected it with 'fluct"),
        ("decision_fisher", {"comply_token": 3}, "comply_token is 3, but 'decision_fisher' has no such option"),
        ("wanda", {"rows_per_gradient": 1}, "rows_per_gradient is 1, but 'wanda' has no such option"),
        ("snip", {"rows_per_gradient": 0}, "rows_per_gradient is 0, expected a whole number of at least 1"),
        ("decision_fisher", {"refuse_token": []}, r"refuse_token is \[\], expected a token id, or several"),
        ("decision_fisher", {"refuse_token": -1}, "refuse_token is -1, expected a token id"),
        ("decision_fisher", {"refuse_token": "I"}, "refuse_token is 'I', expected a token id"),
        ("decision_fisher", {"refuse_token": 99}, "refuse_token is 99, expected a token of the model's 64"),
    ):
        with pytest.raises(ValueError, match=message):
            score_units(tiny(), SAFETY, UTILITY, method, **option)  # type: ignore[arg-type]


def test_only_rows_can_be_regrouped() -> None:
    extra = [{**SAFETY[0], "output_attentions": False}]
    with pytest.raises(ValueError, match="batch 0 of safety has 'output_attentions' besides tensors with an entry per"):
        score_units(tiny(), extra, UTILITY, "snip")  # type: ignore[list-item]
    score_units(tiny(), extra, UTILITY, "wanda")  # type: ignore[list-item]
    mixed = toy_batches([2, 2], 1)
    mixed[1]["position_ids"] = torch.arange(mixed[1]["input_ids"].shape[1]).expand(2, -1)
    with pytest.raises(ValueError, match=r"some rows have .*, others .*'position_ids'.*, expected the same entries"):
        score_units(ToyLM(), mixed, UTILITY, "snip")


def test_nan_gradients_are_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[4, 0] = np.nan
    with pytest.raises(ValueError, match="gradients of the heads of layer 0 are NaN or infinite on the safety set"):
        score_units(model, SAFETY, UTILITY, "decision_fisher")
    with pytest.raises(ValueError, match=r"input of 'model.layers.0.self_attn.o_proj' or its gradient is NaN"):
        score_units(model, SAFETY, UTILITY, "gradient_x_activation")


def test_layers_without_gradients_are_named() -> None:
    model = ToyLM()
    forward = model.forward
    model.layers[1]["mlp"].forward = lambda *_: None
    model.forward = lambda input_ids, attention_mask=None: cut(model, input_ids)  # type: ignore[method-assign]
    batches = toy_batches([4], 1)
    with pytest.raises(ValueError, match=r"'layers.1.mlp.down_proj.weight' had no gradient on the safety set"):
        score_units(model, batches, batches, "decision_fisher")
    with pytest.raises(ValueError, match=r"input of 'layers.1.self_attn.o_proj' had no gradient on the safety set"):
        score_units(model, batches, batches, "activation_patching")
    model.forward = lambda **inputs: forward(**inputs)[:, :2]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"the model's output has logits \(4, 2, 16\), expected \[rows, tokens, voc"):
        score_units(model, toy_batches([4, 4], 3)[:1], batches, "snip")


def cut(model: ToyLM, input_ids: Tensor) -> Tensor:
    """A forward pass that leaves the second layer out."""
    layers, model.layers = model.layers, model.layers[:1]
    try:
        return ToyLM.forward(model, input_ids)
    finally:
        model.layers = layers
