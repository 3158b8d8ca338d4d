"""Attribution: scores of units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_models import (
    ANSWERS,
    OTHER_ANSWERS,
    OTHER_ROWS,
    ROWS,
    SAFETY,
    UTILITY,
    Toy,
    ToyLM,
    batch_of,
    hook_count,
    random_scores,
    refused,
    score_part,
    split_batches,
    tiny,
    toy_batches,
    toy_layout,
)
from torch import nn

from safefreeze_kernels.attribution import (
    METHODS,
    MaskBuilder,
    SetScores,
    UnitLabels,
    UnitScores,
    encode_pairs,
    find_units,
    score_units,
)

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


# ---------------------------------------------------------------------------------------------------- scores


def expected_scores(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula over all activations at once: variance by torch.var, squared norms by hand."""
    scores = []
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        per_layer = []
        for layer in range(2):
            module = model.get_submodule(f"model.layers.{layer}.{name}")
            rows: list[torch.Tensor] = []
            handle = module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0]))
            with torch.no_grad():
                for batch in batches:
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            handle.remove()
            kept = [
                x[i, t]
                for x, batch in zip(rows, batches, strict=True)
                for i in range(x.shape[0])
                for t in range(x.shape[1] - 1)
                if batch["labels"][i, t + 1] != -100
            ]
            weight = module.weight.detach().double()
            per_layer.append(torch.var(torch.stack(kept).double(), dim=0) * weight.pow(2).sum(0))
        scores.append(torch.stack(per_layer))
    return scores[0], scores[1]


def test_scores_are_the_papers_formula() -> None:
    model = tiny()
    batches = [batch_of(ROWS[:2], ANSWERS[:2]), batch_of(ROWS[2:], ANSWERS[2:])]
    scores = score_units(model, batches, UTILITY)
    features, channels = expected_scores(model, batches)
    torch.testing.assert_close(scores.safety.head_features.reshape(2, 48).double(), features, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scores.safety.channels.double(), channels, rtol=1e-5, atol=1e-9)
    heads = features.reshape(2, 4, 12).mean(2)
    torch.testing.assert_close(scores.safety.heads.double(), heads, rtol=1e-5, atol=1e-9)
    assert scores.safety.n_positions == sum(ANSWERS) and scores.utility.n_positions == sum(OTHER_ANSWERS)
    assert scores.safety.heads.shape == (2, 4) and scores.safety.channels.shape == (2, 24)
    features, channels = expected_scores(model, UTILITY)
    torch.testing.assert_close(scores.utility.channels.double(), channels, rtol=1e-5, atol=1e-9)


def activations(model: nn.Module, rows: list[list[int]], answers: list[int]) -> list[tuple[Any, torch.Tensor]]:
    """Each reader and its inputs at predicting positions, float64 ``[n, features]``: row by row, no padding; what an
    expert reads is computed here from the tokens routed to it."""
    layout = find_units(model)
    kept: dict[Any, list[torch.Tensor]] = {}
    handles = []

    def keep(reader: Any, number: int | None) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if number is None:
                kept.setdefault(reader, []).append(inputs[0].reshape(-1, inputs[0].shape[-1])[first - 1 : -1])
                return
            hidden, chosen, _ = inputs
            for token in range(first - 1, len(hidden) - 1):
                if number in chosen[token].tolist():
                    halves = hidden[token] @ module.gate_up_proj[number].T
                    gate, up = halves.chunk(2)
                    kept.setdefault(reader, []).append((nn.functional.silu(gate) * up)[None])

        return hook

    for layer in range(layout.n_layers):
        for reader in layout.readers(layer):
            module = model.get_submodule(reader.module)
            handles.append(module.register_forward_pre_hook(keep((layer, reader), reader.expert)))
    with torch.no_grad():
        for row, answer in zip(rows, answers, strict=True):
            first = len(row) - answer
            model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return [(key, torch.cat(parts).double()) for key, parts in kept.items()]


def of_features(method: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """FLAP's and Wanda's formulas, all activations at once."""
    absolute = weight.abs()
    return {
        "fluctuation": lambda: torch.var(x, dim=0) * weight.pow(2).sum(0),
        "ifv": lambda: torch.var(x, dim=0),
        "wifn": lambda: (absolute * x.pow(2).mean(0).sqrt()).mean(0),
        "wanda": lambda: (absolute * x.norm(dim=0)).sum(0),
    }[method]()


@pytest.mark.parametrize("method", ["fluctuation", "ifv", "wifn", "wanda"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "mixtral", "qwen2_moe"])
def test_scores_of_activations_are_their_formulas(model_type: str, method: str) -> None:
    model = tiny(model_type)
    found = score_units(model, [batch_of(ROWS[:4], ANSWERS[:4]), batch_of(ROWS[4:], ANSWERS[4:])], UTILITY, method)
    for scores, rows, answers in ((found.safety, ROWS, ANSWERS), (found.utility, OTHER_ROWS, OTHER_ANSWERS)):
        tried = 0
        for (layer, reader), x in activations(model, rows, answers):
            weight = model.get_parameter(reader.parameter).detach().double()
            weight = weight if reader.expert is None else weight[reader.expert]
            expected = of_features(method, x, weight.T if reader.transposed else weight)
            units = slice(reader.first, reader.first + reader.n_units)
            got = scores.head_features if reader.units == "head" else scores.channels
            torch.testing.assert_close(
                got[layer, units].flatten().double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max())
            )
            tried += reader.n_units
        assert tried == scores.heads.numel() + scores.channels.numel()
    assert found.ranking is None and found.settings == {"positions": "predicting"}


def test_contrast_is_the_difference_of_means_in_standard_deviations() -> None:
    model = tiny()
    scores = score_units(model, SAFETY, UTILITY, "activation_contrast")
    assert scores.ranking is not None
    pairs = zip(activations(model, ROWS, ANSWERS), activations(model, OTHER_ROWS, OTHER_ANSWERS), strict=True)
    for ((layer, reader), x), (_, y) in pairs:
        spread = ((x.var(0) + y.var(0)) / 2).sqrt()
        for got, expected in (
            (scores.ranking, (x.mean(0) - y.mean(0)).abs() / spread),
            (scores.safety, x.mean(0).abs() / spread),
            (scores.utility, y.mean(0).abs() / spread),
        ):
            found = (got.heads if reader.units == "head" else got.channels)[layer]
            torch.testing.assert_close(
                found.double(), expected.reshape(reader.n_units, reader.width).mean(1), rtol=1e-4, atol=1e-5
            )


def test_contrast_of_features_that_do_not_vary() -> None:
    """Features: 0 everywhere; 1 everywhere; 1 on safety and 2 on utility."""
    table = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    for rows, expected in ((([0, 1, 0], [1, 0, 1]), [0, 0]), (([2, 2, 2], [3, 3, 3]), [0.5e6, 0])):
        sets = ([{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}] for ids in rows)
        ranking = score_units(Toy(table, torch.eye(2)), *sets, "activation_contrast").ranking
        assert ranking is not None and ranking.channels[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize(
    ("model_type", "method"),
    [("llama", "fluctuation"), ("gpt2", "fluctuation"), ("llama", "wanda"), ("mixtral", "activation_contrast")],
)
def test_scores_do_not_depend_on_batching_or_padding(model_type: str, method: str, sizes: list[int], side: str) -> None:
    """GPT-2 learns positions from the left edge of a batch."""
    model = tiny(model_type)
    alone = [batch_of([row], [n]) for row, n in zip(ROWS, ANSWERS, strict=True)]
    whole = score_units(model, alone, UTILITY, method)
    scores = score_units(model, iter(split_batches(sizes, side)), iter(UTILITY), method)
    assert scores.safety.n_positions == whole.safety.n_positions
    assert scores.safety.fingerprint == whole.safety.fingerprint
    torch.testing.assert_close(scores.safety.head_features, whole.safety.head_features, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(scores.safety.channels, whole.safety.channels, rtol=2e-4, atol=1e-6)


def test_a_set_is_known_by_its_rows() -> None:
    def fingerprint(rows: list[list[int]], answers: list[int], **more: Any) -> str:
        batch = {**batch_of(rows, answers), **more}
        return score_units(ToyLM(), [batch], toy_batches([2], 1)).safety.fingerprint

    rows = [[t % 16 for t in row] for row in ROWS]
    known = fingerprint(rows, ANSWERS)
    assert len(known) == 64 and known == fingerprint(rows, ANSWERS)
    batch = batch_of(rows, ANSWERS)
    assert known == fingerprint(
        rows, ANSWERS, input_ids=batch["input_ids"].int(), attention_mask=batch["attention_mask"] != 0
    )
    assert known != fingerprint(rows[::-1], ANSWERS[::-1])
    assert known != fingerprint([[*rows[0][:-1], (rows[0][-1] + 1) % 16], *rows[1:]], ANSWERS)
    assert known != fingerprint(rows, [ANSWERS[0] + 1, *ANSWERS[1:]])


#: Tokens 0 to 3 feed these rows to both readers; column norms² are 1 and 4 (o_proj), 4 and 16 (down_proj).
TOY_TABLE = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 2.0], [100.0, 100.0]])
TOY_READERS = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def toy_scores(labels: list[int], positions: str = "predicting", **more: Any) -> SetScores:
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3]]), "labels": torch.tensor([labels]), **more}
    return score_units(Toy(TOY_TABLE, TOY_READERS), [batch], [batch], positions=positions).safety  # type: ignore[arg-type]


def test_positions_by_hand() -> None:
    """Response = tokens 2 and 3. Predicting them: positions 1, 2, rows (3, 0) and (5, 2): variances 2, 2."""
    scores = toy_scores([-100, -100, 2, 3])
    assert scores.n_positions == 2
    assert scores.head_features.flatten().tolist() == [2.0 * 1, 2.0 * 4]
    assert scores.channels.tolist() == [[2.0 * 4, 2.0 * 16]]
    # the response tokens themselves: rows (5, 2) and (100, 100), variances 95²/2 and 98²/2
    scores = toy_scores([-100, -100, 2, 3], "response")
    assert scores.head_features.flatten().tolist() == [95**2 / 2, 4 * 98**2 / 2]
    # all, the last one padded away: rows (1, 0), (3, 0), (5, 2): variances 4 and 4/3; labels do not matter
    scores = toy_scores([-100] * 4, "all", attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert scores.n_positions == 3
    torch.testing.assert_close(scores.head_features.flatten(), torch.tensor([4.0, 4 * 4 / 3]))


def test_a_response_from_the_first_token_on_has_no_position_before_it() -> None:
    assert toy_scores([0, 1, 2, 3]).n_positions == 3


def test_masked_positions_do_not_count_even_with_labels() -> None:
    """Neither as positions nor as the tokens that positions predict."""
    labels = [-100, 1, 2, 3]
    assert toy_scores(labels, attention_mask=torch.tensor([[1, 1, 1, 0]])).n_positions == 2
    assert toy_scores(labels, "response", attention_mask=torch.tensor([[1, 1, 0, 1]])).n_positions == 2


def test_variance_survives_a_large_mean() -> None:
    """Mean 1000, deviations of 0.001: in float32 squares lose them and the mean's own rounding shows."""
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    table = (1000 + 0.001 * noise).float()
    batches = [{"input_ids": ids[None], "labels": ids[None]} for ids in torch.arange(300).split(7)]
    counted = torch.cat([batch["input_ids"][0, :-1] for batch in batches])
    scores = score_units(Toy(table, torch.eye(2)), batches, batches)
    expected = torch.var(table[counted].double(), dim=0)
    torch.testing.assert_close(scores.safety.head_features.flatten().double(), expected, rtol=1e-5, atol=0)


def test_low_precision_activations_are_accumulated_in_high_precision() -> None:
    table = torch.randn(64, 2, generator=torch.Generator().manual_seed(2)).bfloat16()
    batch = {"input_ids": torch.arange(64)[None], "labels": torch.arange(64)[None]}
    scores = score_units(Toy(table, torch.eye(2)).bfloat16(), [batch] * 2, [batch])
    rows = table[:-1].double().repeat(2, 1)
    torch.testing.assert_close(scores.safety.channels[0].double(), 4 * torch.var(rows, dim=0), rtol=1e-5, atol=0)


def test_modes_and_hooks_are_left_as_found() -> None:
    model = tiny().train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    before = hook_count(model)
    weights = {name: param.clone() for name, param in model.named_parameters()}
    score_units(model, SAFETY, UTILITY)
    assert seen == [False, False]
    assert [module.training for module in model.modules()] == modes and hook_count(model) == before
    assert all(param.grad is None and torch.equal(param, weights[name]) for name, param in model.named_parameters())

    def failing() -> Any:
        yield batch_of(ROWS, ANSWERS)
        raise RuntimeError("the disk is gone")

    refused("the disk is gone", lambda: score_units(model, failing(), UTILITY), RuntimeError)
    assert [module.training for module in model.modules()] == modes and hook_count(model) == before


def test_sets_may_be_generators_and_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    batch = batch_of(ROWS, ANSWERS)
    quiet = score_units(tiny(), [batch, batch], UTILITY)
    assert capsys.readouterr().err == ""
    loud = score_units(tiny(), (batch for _ in range(2)), iter(UTILITY), progress=True)
    assert torch.equal(quiet.safety.channels, loud.safety.channels)
    bars = capsys.readouterr().err
    assert "scoring safety" in bars and "scoring utility" in bars


def bad_batch(**changes: Any) -> dict[str, Any]:
    batch = {**batch_of(ROWS, ANSWERS), **changes}
    return {key: value for key, value in batch.items() if value is not None}


@pytest.mark.parametrize(
    ("safety", "kind", "message"),
    [
        ([], ValueError, "safety holds no batches"),
        ([batch_of(ROWS, [0] * 6)], ValueError, "safety has 0 counted positions in 1 batches, expected at least 2"),
        ([batch_of(ROWS[:1], [1])], ValueError, "safety has 1 counted positions"),
        (batch_of(ROWS, ANSWERS), TypeError, r"safety is one batch, .* pass \[batch\]"),
        ([torch.ones(2, 3)], TypeError, "batch 0 of safety is a Tensor, expected a mapping"),
        ([bad_batch(), bad_batch(labels=None)], ValueError, "batch 1 of safety has no 'labels'"),
        ([bad_batch(input_ids=None)], ValueError, "batch 0 of safety has no 'input_ids'"),
        ([bad_batch(labels=torch.ones(6, 2))], ValueError, r"labels has shape \(6, 2\) and input_ids \(6, "),
        ([bad_batch(attention_mask=torch.ones(6))], ValueError, r"attention_mask has shape \(6,\)"),
    ],
)
def test_score_units_refuses_bad_sets(safety: Any, kind: type[Exception], message: str) -> None:
    model = tiny()
    refused(message, lambda: score_units(model, safety, UTILITY), kind)
    assert hook_count(model) == 0


def test_score_units_refuses_bad_words_and_models() -> None:
    good = SAFETY
    with pytest.raises(ValueError, match=r"method is 'magnitude', expected one of 'fluctuation', 'ifv', .*'snip'"):
        score_units(tiny(), good, good, method="magnitude")
    with pytest.raises(ValueError, match="positions is 'prompt', expected one of 'predicting', 'response', 'all'"):
        score_units(tiny(), good, good, positions="prompt")  # type: ignore[arg-type]
    refused("model_type is 'mamba'", lambda: score_units(tiny("mamba"), good, good))
    sharded = tiny()
    weight = sharded.model.layers[0].self_attn.q_proj.weight
    weight.placements = ("Shard(dim=0)",)  # as a DTensor has them
    refused("q_proj.weight' is sharded", lambda: score_units(sharded, good, good))
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj.weight' is on the meta device"):
        score_units(tiny().to("meta"), good, good)
    used_up = iter(good)
    refused("utility holds no batches", lambda: score_units(tiny(), used_up, used_up))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_activations_are_named(value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[4, 0] = value
    with pytest.raises(ValueError, match=r"input of 'model.layers.1.mlp.down_proj' is NaN or infinite on the safety"):
        score_units(model, SAFETY, UTILITY)
    assert hook_count(model) == 0


def test_a_layer_that_does_not_run_is_an_error() -> None:
    model = Toy(TOY_TABLE, TOY_READERS)
    model.forward = lambda input_ids: model.layers[0]["mlp"].down_proj(model.table[input_ids])  # type: ignore[method-assign]
    ids = torch.tensor([[0, 1, 2]])
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"'layers.0.self_attn.o_proj' saw 0 positions of the safety set, expected 2"):
        score_units(model, [batch], [batch])
    model.forward = lambda input_ids: model.layers[0]["mlp"].down_proj(model.table[input_ids][:, 1:])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'layers.0.mlp.down_proj' received \(1, 2, 2\), expected \(1, 3\) positions"):
        score_units(model, [batch], [batch])
    model.forward = lambda input_ids: [model.layers[0]["mlp"].down_proj(model.table[input_ids]) for _ in range(2)]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'layers.0.mlp.down_proj' ran twice in one forward pass, expected once"):
        score_units(model, [batch], [batch])


def test_scores_survive_a_file(tmp_path: Path) -> None:
    scores = score_units(tiny("qwen2"), SAFETY, UTILITY)
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    loaded = UnitScores.load(path)
    assert loaded.layout == scores.layout and loaded.method == "fluctuation" and loaded.ranking is None
    assert (loaded.model_fingerprint, loaded.settings) == (scores.model_fingerprint, {"positions": "predicting"})
    assert loaded.utility.fingerprint == scores.utility.fingerprint != scores.safety.fingerprint
    for mine, theirs in ((scores.safety, loaded.safety), (scores.utility, loaded.utility)):
        assert torch.equal(mine.head_features, theirs.head_features) and torch.equal(mine.channels, theirs.channels)
        assert mine.n_positions == theirs.n_positions
    before, after = (MaskBuilder(s).freeze(cu=0.06).build() for s in (scores, loaded))
    assert before == after
    assert "qwen2" in repr(loaded) and f"{sum(ANSWERS)} safety" in repr(loaded)


def test_a_ranking_survives_a_file(tmp_path: Path) -> None:
    scores = score_units(ToyLM(), toy_batches([4], 1), toy_batches([3], 2), "decision_fisher", refuse_token=[3, 4])
    scores.save(tmp_path / "scores.safetensors")
    loaded = UnitScores.load(tmp_path / "scores.safetensors")
    assert scores.ranking is not None and loaded.ranking is not None
    assert all(torch.equal(a, b) for a, b in zip(scores.ranking, loaded.ranking, strict=True))
    assert loaded.ranking.heads.shape == (2, 4) and loaded.ranking.channels.shape == (2, 5)
    assert loaded.settings == {"refuse_token": [3, 4], "rows_per_gradient": 4}


# --------------------------------------------------------------------------------------------- whose scores


def test_scores_know_the_model_they_were_made_with(tmp_path: Path) -> None:
    model = tiny("qwen2")
    scores = score_units(model, SAFETY, UTILITY)
    model.save_pretrained(tmp_path)
    scores.check(type(model).from_pretrained(tmp_path))
    scores.check(tiny("qwen2").bfloat16())
    scores.check(model.model)  # under other names
    scores.check(tiny("qwen2").to("meta"))  # its numbers of units at least
    trained = tiny("qwen2")
    with torch.no_grad():
        trained.model.layers[1].mlp.down_proj.weight *= 1.02
    with pytest.raises(ValueError, match=r"weights have fingerprint \w{12}…, expected \w{12}…, those that were scored"):
        scores.check(trained)
    with pytest.raises(ValueError, match=r"the model is qwen2: 2 layers of .* 20 channels, expected .* 24 channels"):
        scores.check(tiny("qwen2", intermediate_size=20))
    random_scores(find_units(model)).check(trained)  # made elsewhere: nothing to hold them to


def test_weights_that_cannot_be_scored() -> None:
    batches = toy_batches([4], 1)
    model = ToyLM()
    model.layers[1]["mlp"].up_proj.weight = model.layers[0]["mlp"].up_proj.weight
    with pytest.raises(
        ValueError, match=r"'layers.0.mlp.up_proj.weight' and 'layers.1.mlp.up_proj.weight' are one param"
    ):
        score_units(model, batches, batches)
    model = ToyLM()
    weight = model.layers[0]["mlp"].up_proj.weight
    model.layers[0]["mlp"].up_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"'layers.0.mlp.up_proj.weight' has dtype torch.int8, expected float32, .*quant"
    ):
        score_units(model, batches, batches, "snip")
    with torch.inference_mode():
        model = ToyLM()
    with pytest.raises(ValueError, match=r"'layers.0.self_attn.q_proj.weight' was made in inference mode"):
        score_units(model, batches, batches, "snip")


def test_frozen_and_tied_parameters_can_be_scored() -> None:
    batches = toy_batches([4], 1)
    expected = score_units(ToyLM(), batches, batches, "snip").safety.channels
    assert torch.equal(score_units(ToyLM().requires_grad_(False), batches, batches, "snip").safety.channels, expected)
    tied, free = tiny(tie_word_embeddings=True), tiny()
    free.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    free.model.embed_tokens.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    for name, parameter in free.named_parameters():
        if "layers" in name:
            parameter.data = tied.get_parameter(name).data
    one, other = (score_units(model, SAFETY, UTILITY, "snip") for model in (tied, free))
    assert torch.equal(one.safety.channels, other.safety.channels)


# ------------------------------------------------------------------------------------------- parts of the work


def equal_scores(one: UnitScores, other: UnitScores) -> bool:
    tensors = [
        [s.safety.head_features, s.safety.channels, s.utility.head_features, s.utility.channels, *(s.ranking or ())]
        for s in (one, other)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True)) and repr(one) == repr(other)


def runs(model: nn.Module) -> list[int]:
    """One entry per forward pass from now on."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


class KilledError(Exception):
    """What ends a run in its middle."""


def until(batches: list[dict[str, torch.Tensor]], n: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from batches[:n]
    raise KilledError


@pytest.mark.parametrize("where", ["safety", "utility"])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, method: str, where: str) -> None:
    safety, utility = toy_batches([4] * 6, 1), toy_batches([4] * 6, 2)
    more: dict[str, Any] = {"refuse_token": 3} if method in ("gradient_x_activation", "activation_patching") else {}
    model = ToyLM()
    whole = score_units(model, safety, utility, method, **more)
    more |= {"resume": tmp_path / "partial", "every": 2}
    cut = {"safety": safety, "utility": utility, where: until({"safety": safety, "utility": utility}[where], 5)}
    with pytest.raises(KilledError):
        score_units(model, cut["safety"], cut["utility"], method, **more)
    passes = runs(model)
    assert equal_scores(score_units(model, safety, utility, method, **more), whole)
    # 5 passes were made and 4 written, after all of the safety set where that was over
    assert len(passes) == (8 if where == "safety" else 2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_once_done_costs_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safety, utility = toy_batches([3, 3], 1), toy_batches([3, 3], 2)
    model = ToyLM()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KilledError))
    with pytest.raises(KilledError):
        score_units(model, safety, utility, resume=tmp_path / "partial", every=100)
    monkeypatch.undo()
    passes = runs(model)
    assert equal_scores(
        score_units(model, safety, utility, resume=tmp_path / "partial"), score_units(ToyLM(), safety, utility)
    )
    assert passes == []


def test_partial_files_are_held_to_their_run(tmp_path: Path) -> None:
    safety, utility = toy_batches([4] * 4, 1), toy_batches([4] * 2, 2)
    path = tmp_path / "partial"

    def resumed(*sets: Any, method: str = "wanda", model: nn.Module | None = None, **more: Any) -> None:
        score_units(model or ToyLM(), *sets, method, resume=path, every=1, **more)

    with pytest.raises(KilledError):
        resumed(until(safety, 3), utility)
    kept = path.read_bytes()
    other = ToyLM()
    with torch.no_grad():
        other.layers[0]["mlp"].up_proj.weight *= 2
    rows = "12 other rows of safety in 3 passes, expected"
    for message, given, more in (
        (r"another method: 'wanda', expected 'ifv'; delete it", safety, {"method": "ifv"}),
        (r"another settings: .*predicting.*, expected .*all", safety, {"positions": "all"}),
        (r"another model: '\w+', expected '\w+'", safety, {"model": other}),
        (rows, safety[::-1], {}),
        (rows, toy_batches([2] * 8, 1), {}),
        (rows, safety[:2], {}),
    ):
        with pytest.raises(ValueError, match=f"partial', which was written for {message}"):
            resumed(given, utility, **more)
        assert path.read_bytes() == kept
    path.write_bytes(kept[:100])
    with pytest.raises(ValueError, match=r"not a partial score file this package reads .*; delete it, or pass another"):
        resumed(safety, utility)
    random_scores(toy_layout()).save(path)
    refused("not a partial score file", lambda: resumed(safety, utility))
    with pytest.raises(ValueError, match="expected a file in an existing folder"):
        score_units(ToyLM(), safety, utility, resume=tmp_path / "no" / "partial")
    refused("every is 0, expected a whole number of at least 1", lambda: score_units(ToyLM(), safety, utility, every=0))


def test_ranks_add_up(tmp_path: Path) -> None:
    """Two real processes, each with its own part of both sets, against one with all of them."""
    methods = ["fluctuation", "activation_contrast", "decision_fisher", "activation_patching"]
    torch.multiprocessing.spawn(score_part, (2, methods, str(tmp_path)), nprocs=2)
    safety, utility = (toy_batches([4, 4, 3, 1], seed) for seed in (1, 2))
    for method in methods:
        token: Any = {"refuse_token": 3} if method == "activation_patching" else {}
        whole = score_units(ToyLM(), safety, utility, method, **token)
        first, second = (UnitScores.load(tmp_path / f"{method}-{rank}") for rank in (0, 1))
        assert equal_scores(first, second), f"{method}: ranks disagree"
        assert first.safety.fingerprint == second.safety.fingerprint
        assert repr(first) == repr(whole)
        for a, b in ((first.safety, whole.safety), (first.utility, whole.utility)):
            torch.testing.assert_close(a.head_features, b.head_features, rtol=1e-5, atol=0)
            torch.testing.assert_close(a.channels, b.channels, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------ files


def test_score_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    refused("no file", lambda: UnitScores.load(path), FileNotFoundError)
    random_scores(toy_layout()).save(path)
    whole = path.read_bytes()
    other = whole.replace(b"safefreeze.unit_scores", b"safefreeze.unit_thores")
    for damaged in (b"", whole[:40], whole[:-1], other):
        path.write_bytes(damaged)
        refused("is not a score file this package reads", lambda: UnitScores.load(path))
    UnitLabels(torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.uint8)).save(path)
    refused("format None", lambda: UnitScores.load(path))


def test_set_scores_are_checked() -> None:
    layout = toy_layout()
    ones = torch.ones
    assert SetScores(ones(2, 4), ones(2, 6)).heads.tolist() == ones(2, 4).tolist()
    refused(r"head_features has shape \(4,\)", lambda: SetScores(ones(4), ones(2, 6)))
    refused(r"channels \(3, 6\)", lambda: SetScores(ones(2, 4), ones(3, 6)))
    for bad in (math.nan, math.inf, 1e39):
        channels = ones(2, 6, dtype=torch.float64)
        channels[1, 2] = bad
        with pytest.raises(ValueError, match="channels of layer 1 holds NaN or inf"):
            SetScores(ones(2, 4), channels)
    good = SetScores(ones(2, 4), ones(2, 6))
    with pytest.raises(ValueError, match=r"utility scores heads \(2, 4\) and channels \(2, 7\), expected .*\(2, 6\)"):
        UnitScores(layout, good, SetScores(ones(2, 4), ones(2, 7)))


# ----------------------------------------------------------------------------------------------- calibration

VOCABULARY = "<pad> <bos> <end> <user> <bot> how do i bake rob bread sorry no flour and water \n"
WORDS = VOCABULARY.split(" ")
CHAT = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}"
    "{{ ' <end> \n ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def word_tokenizer(**settings: Any) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", **settings)


def words_of(ids: torch.Tensor) -> str:
    return " ".join(WORDS[i] for i in ids.tolist())


def test_pairs_go_through_the_chat_template() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT, pad_token="<pad>")
    pairs = [("how do i rob bread", "sorry no"), ("bake", "flour and water"), ("bread", "no")]
    batches = encode_pairs(tokenizer, pairs, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 12), (1, 7)]
    first = batches[0]
    assert words_of(first["input_ids"][0]) == "<user> how do i rob bread <end> \n <bot> sorry no <end>"
    for batch in batches:
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        response = batch["labels"] != -100
        assert torch.equal(batch["labels"][response], batch["input_ids"][response])
    said = [words_of(b["input_ids"][i][b["labels"][i] != -100]) for b in batches for i in range(len(b["labels"]))]
    assert said == ["sorry no <end>", "flour and water <end>", "no <end>"]
    assert first["attention_mask"][1].tolist() == [1] * 9 + [0] * 3
    assert set(first["input_ids"][1, 9:].tolist()) == {0} and set(first["labels"][1, 9:].tolist()) == {-100}


def test_pairs_without_a_template_are_joined() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token_id is None
    (batch,) = encode_pairs(tokenizer, [("bake bread ", "flour "), ("rob ", "no ")])
    assert words_of(batch["input_ids"][0]) == "<bos> bake bread flour <end>"
    assert words_of(batch["input_ids"][0][batch["labels"][0] != -100]) == "flour <end>"
    assert words_of(batch["input_ids"][1][batch["labels"][1] != -100]) == "no <end>"
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_pairs_are_cut_to_length_and_checked() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT)
    (batch,) = encode_pairs(tokenizer, [("bake", "flour and water")], max_length=6)
    assert words_of(batch["input_ids"][0]) == "<user> bake <end> \n <bot> flour"
    with pytest.raises(ValueError, match=r"pair 0 has 5 prompt and 2 response tokens, .* within max_length=5"):
        encode_pairs(tokenizer, iter([("bake", "no")]), max_length=5)
    refused("no pairs given", lambda: encode_pairs(tokenizer, []))
    for bad in ("ab", ("a",), ("a", 3), ("a", "b", "c")):
        with pytest.raises(TypeError, match=r"pair 0 is .*expected"):
            encode_pairs(tokenizer, [bad])  # type: ignore[list-item]
    for sizes in ({"max_length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="is 0, expected at least 1"):
            encode_pairs(tokenizer, [("a", "b")], **sizes)


def test_pairs_can_be_scored() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT)
    batches = encode_pairs(tokenizer, [("rob", "sorry no"), ("bake bread", "flour and water")], batch_size=1)
    scores = score_units(tiny(), batches, batches)
    assert scores.safety.n_positions == 3 + 4  # each response and its end of turn
    assert torch.equal(scores.safety.channels, scores.utility.channels)
