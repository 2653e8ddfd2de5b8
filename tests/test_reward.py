"""The reward model: rankings become scores, a batch may be cut anywhere, and what it measures is right by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_core import reward
from rlhf_core.data import encode_prompt
from rlhf_core.errors import ConfigError, TrainingDiverged
from rlhf_core.models import REFERENCE, Roles, pack
from rlhf_core.records import Ranking
from rlhf_core.reward import (
    EncodedRanking,
    Judged,
    accuracy,
    accuracy_by_kind,
    axis_ranks,
    centering,
    encode_rankings,
    grades_of,
    judge_heads,
    judge_rankings,
    margins_of,
    measure,
    mistakes,
    normalise_on_samples,
    outputs_of_rankings,
    score_rankings,
    score_samples,
    temperature_of,
    train_reward,
    validation_loss,
)
from rlhf_core.rollouts import sample
from rlhf_core.statistics import calibration_error_by_chance
from rlhf_core.tracking import MemoryTracker, NullTracker
from tasks.reward import add_models

PAD, ROLE = 0, "reward"


def ranking(*rows: list[int], ranks: tuple[int, ...], prompt: int = 2) -> EncodedRanking:
    return EncodedRanking(list(rows), ranks, [len(row) - prompt for row in rows])


# K of 2 to 4, ties, uneven lengths, and one of nothing but a tie
MIXED = [
    ranking([7, 20, 35, 2], [7, 20, 36, 37, 2], ranks=(1, 2)),
    ranking([12, 5, 77, 2], [12, 5, 31, 8, 64, 2], [12, 5, 2], ranks=(3, 1, 2)),
    ranking([40, 41, 42, 2], [40, 41, 43, 44, 2], [40, 41, 45, 2], [40, 41, 46, 2], ranks=(1, 2, 2, 4)),
    ranking([9, 9, 10, 2], [9, 9, 11, 12, 2], ranks=(1, 1)),
]
# The same as graded by their annotators: one of them says of the worst that it is good, and one does not say
GRADED = [
    one._replace(grades=grades)
    for one, grades in zip(MIXED, [(2.5, 0.0), (1.0, 4.0, 2.0), (3.0, 2.0, 2.5, 4.0), ()], strict=True)
]
# A toy that can be separated: token 100 is in every better response, and nowhere else.
TOY = [
    ranking([n, n + 1, 100, n + 2, 2], [n, n + 1, n + 2, n + 3, 2], [n, n + 1, 2], ranks=(1, 2, 2))
    for n in range(10, 58, 4)
]


def reward_model(folder: Path, config: Any, *, method: str = "lora") -> Roles:
    roles = Roles(folder, config)
    torch.manual_seed(7)
    roles.add(ROLE, method=method, head=True, axes=config.axes)
    return roles


# The same as scored on two axes: "kind" ties two of the second's and says nothing of the first, "true" says little.
SCORED = [
    one._replace(axes=axes)
    for one, axes in zip(
        MIXED,
        [{"true": [1, 5]}, {"kind": [2.0, 2.0, 7.5]}, {"kind": [1, 2, 3, 4], "true": [3, 3, 3, 3]}, {"kind": [0, 1]}],
        strict=True,
    )
]


def weights(roles: Roles) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in roles.trainable(ROLE)]


def test_rankings_are_encoded_as_rollouts_are(tokenizer: PreTrainedTokenizerFast) -> None:
    record = Ranking((("user", "hi"),), ("A lemon.", "A yellow banana."), (2, 1))
    (found,) = encode_rankings([record], tokenizer, system="Be brief.", max_response_tokens=50)
    prompt = encode_prompt(tokenizer, record.prompt, "Be brief.")
    assert found.ranks == (2, 1)
    for ids, length, text in zip(found.ids, found.lengths, record.responses, strict=True):
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode(ids[len(prompt) : -1]) == text
        assert ids[-1] == tokenizer.eos_token_id
        assert length == len(ids) - len(prompt)
    (cut,) = encode_rankings([record], tokenizer, system="Be brief.", max_response_tokens=2)
    assert cut.lengths == [2, 2]
    assert cut.ids[0] == found.ids[0][: len(prompt) + 2]


def test_grades_are_a_pairs_margin_or_the_mean_of_the_scores() -> None:
    def graded(*ranks: int, **fields: Any) -> tuple[float, ...]:
        return grades_of(Ranking((("user", "hi"),), ("x",) * len(ranks), ranks, **fields))

    scores = {"helpfulness": [5, 1, 3], "truthfulness": [4.0, 2.0, 0.0]}
    assert graded(1, 2, margin=0.5) == (0.5, 0.0)
    assert graded(2, 1, margin=0.5, scores={"helpfulness": [1, 9]}) == (0.0, 0.5)
    assert graded(1, 2, 3, scores=scores) == (4.5, 1.5, 1.5)
    assert graded(1, 2, 3, scores=scores, margin=0.5) == (4.5, 1.5, 1.5)  # which of its pairs it is of is not told
    assert graded(1, 2) == graded(1, 2, scores={}) == graded(1, 2, 3, margin=0.5) == ()


def test_encoded_rankings_keep_their_grades(tokenizer: PreTrainedTokenizerFast) -> None:
    record = Ranking((("user", "hi"),), ("A lemon.", "A banana."), (2, 1), margin=1.5)
    found = encode_rankings([record, record._replace(margin=None)], tokenizer, system="", max_response_tokens=50)
    assert [one.grades for one in found] == [(0.0, 1.5), ()]


def test_margins_by_hand() -> None:
    found = margins_of([GRADED[0], GRADED[1], GRADED[3]])
    assert found.tolist() == [
        [[0, 2.5, 2.5], [0, 0, 0], [0, 0, 0]],  # the third place is no response
        [[0, 0, 0], [3, 0, 2], [1, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]


@torch.no_grad()
def test_rankings_of_any_size_are_scored_as_their_rows_alone(llama: Path, section: Callable[..., Any]) -> None:
    roles = reward_model(llama, section("reward"))
    scores_BK, ranks_BK, mask_BK = score_rankings(roles, ROLE, MIXED, PAD)
    assert mask_BK.tolist() == [[k < len(one.ids) for k in range(4)] for one in MIXED]
    for row, one in enumerate(MIXED):
        assert ranks_BK[row, : len(one.ids)].tolist() == list(one.ranks)
        for k, ids in enumerate(one.ids):
            alone = roles.scores(roles.trunk(pack([ids], None, PAD)), ROLE)[0]
            torch.testing.assert_close(scores_BK[row, k], alone, rtol=1e-4, atol=1e-5)  # float32


def test_centering_by_hand() -> None:
    # Row 1: pairs (1, 2) and (1, 4): (3² + 5²) / 2 = 17. Row 2: one pair (3, −1): 2², its third place is no response.
    # Row 3 is a tie and has no say. Rankings weigh the same, as in the loss: (17 + 4) / 2.
    scores_BK = torch.tensor([[1.0, 2.0, 4.0], [3.0, -1.0, 9.0], [5.0, 6.0, 9.0]], dtype=torch.float64)
    ranks_BK = torch.tensor([[1, 2, 2], [1, 2, 0], [1, 1, 0]])
    mask_BK = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    assert centering(scores_BK, ranks_BK, mask_BK).item() == pytest.approx((17 + 4) / 2, rel=1e-12)
    assert centering(scores_BK, torch.ones_like(ranks_BK), mask_BK).item() == 0  # nothing but ties


def train(roles: Roles, rankings: list[EncodedRanking], config: Any, **options: Any) -> dict[str, Any]:
    settings = {"pad_id": PAD, "tracker": NullTracker(), **options}
    return train_reward(roles, ROLE, rankings, rankings, config, **settings)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_cutting_a_batch_changes_no_weight(llama: Path, section: Callable[..., Any], method: str) -> None:
    found = {}
    for size in (1, 2, 4):
        config = section("reward", method=method, learning_rate=1e-3, epochs=3, micro_batch_size=size)
        roles = reward_model(llama, config, method=method)
        train(roles, MIXED, config)
        found[size] = weights(roles)
    for size in (1, 2):
        for ours, theirs in zip(found[size], found[4], strict=True):
            # float32: the bias moves all scores alike and has no gradient but rounding, which AdamW divides by ε = 1e-5
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


def test_cutting_a_batch_changes_no_weight_when_scores_are_centred(llama: Path, section: Callable[..., Any]) -> None:
    found = {}
    for size in (1, 4):
        config = section("reward", learning_rate=1e-3, center_coef=0.5, micro_batch_size=size)
        roles = reward_model(llama, config)
        train(roles, MIXED, config)
        found[size] = weights(roles)
    for ours, theirs in zip(found[1], found[4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)  # as above


def test_the_first_loss_weighs_every_ranking_the_same(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("reward", micro_batch_size=2)
    roles = reward_model(llama, config)
    with torch.no_grad():
        scores_BK, _, _ = score_rankings(roles, ROLE, MIXED, PAD)
    each = []
    for one, scores in zip(MIXED, scores_BK.tolist(), strict=True):
        margins = [scores[i] - scores[j] for i, a in enumerate(one.ranks) for j, b in enumerate(one.ranks) if a < b]
        if margins:  # the tie has no say
            each.append(sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins))
    train(roles, MIXED, config, tracker=tracker)
    losses = [values["reward/loss"] for _, values in tracker.history if "reward/loss" in values]
    assert losses == pytest.approx([sum(each) / 3], rel=1e-5)  # float32


def slow_losses(one: EncodedRanking, scores: list[float], margin_coef: float, smoothing: float) -> tuple[float, float]:
    """The loss of a ranking by pairs, and by its whole order."""
    pairs, order = [], 0.0
    grades = one.grades or (0.0,) * len(one.ranks)
    for i, rank in enumerate(one.ranks):
        for j, other in enumerate(one.ranks):
            if rank < other:
                lead = scores[i] - scores[j] - margin_coef * max(grades[i] - grades[j], 0)
                right, wrong = math.log1p(math.exp(-lead)), math.log1p(math.exp(lead))
                pairs.append((1 - smoothing) * right + smoothing * wrong)
        order -= scores[i] - math.log(sum(math.exp(scores[j]) for j, other in enumerate(one.ranks) if other >= rank))
    return sum(pairs) / len(pairs), order


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "pairs"},
        {"loss": "plackett_luce"},
        {"label_smoothing": 0.2},
        {"margin_coef": 0.5},
        {"label_smoothing": 0.1, "margin_coef": 2.0},
    ],
)
def test_the_first_loss_is_the_one_that_is_asked_for(
    llama: Path, section: Callable[..., Any], changes: dict[str, Any]
) -> None:
    tracker, config = MemoryTracker(), section("reward", micro_batch_size=2, **changes)
    roles = reward_model(llama, config)
    with torch.no_grad():
        scores_BK, _, _ = score_rankings(roles, ROLE, GRADED, PAD)
    each = [  # the last is a tie
        slow_losses(one, scores, config.margin_coef, config.label_smoothing)[config.loss == "plackett_luce"]
        for one, scores in zip(GRADED[:3], scores_BK.tolist(), strict=False)
    ]
    train(roles, GRADED, config, tracker=tracker)
    losses = [values["reward/loss"] for _, values in tracker.history if "reward/loss" in values]
    assert losses == pytest.approx([sum(each) / 3], rel=1e-5)  # float32


@pytest.mark.parametrize(
    "changes", [{"loss": "plackett_luce"}, {"label_smoothing": 0.2, "margin_coef": 0.5}], ids=["order", "pairs"]
)
def test_cutting_a_batch_changes_no_weight_whatever_the_loss(
    llama: Path, section: Callable[..., Any], changes: dict[str, Any]
) -> None:
    found = {}
    for size in (1, 2, 4):
        config = section("reward", learning_rate=1e-3, epochs=3, micro_batch_size=size, **changes)
        roles = reward_model(llama, config)
        train(roles, GRADED, config)
        found[size] = weights(roles)
    for size in (1, 2):
        for ours, theirs in zip(found[size], found[4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)  # Adam steps by rounding, too


def test_grades_change_no_weight_while_their_coefficient_is_0(llama: Path, section: Callable[..., Any]) -> None:
    config = section("reward")
    plain, graded = reward_model(llama, config), reward_model(llama, config)
    train(plain, MIXED, config)
    train(graded, GRADED, config)
    assert all(torch.equal(one, other) for one, other in zip(weights(plain), weights(graded), strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_a_ranking_that_can_be_separated(llama: Path, section: Callable[..., Any], method: str) -> None:
    config = section(
        "reward", method=method, lora_layers=0, learning_rate=2e-2 if method == "lora" else 5e-3, epochs=12
    )
    roles = reward_model(llama, config, method=method)
    final = train_reward(roles, ROLE, TOY[:9], TOY[9:], config, pad_id=PAD, tracker=NullTracker())
    assert final["validation_accuracy"] == 1.0
    assert final["validation_loss"] < 0.3 < math.log(2)
    assert final["steps"] == 12 * 3
    assert final["tokens"] == 12 * sum(len(ids) for one in TOY[:9] for ids in one.ids)


def test_centering_pulls_the_mean_score_to_zero(llama: Path, section: Callable[..., Any]) -> None:
    means = {}
    for coef in (0.0, 1.0):
        config = section("reward", epochs=6, center_coef=coef)
        roles = reward_model(llama, config)
        with torch.no_grad():
            roles.heads[ROLE].bias.fill_(1.0)
        train(roles, TOY[:4], config)
        with torch.no_grad():
            scores_BK, _, mask_BK = score_rankings(roles, ROLE, TOY[:4], PAD)
        means[coef] = abs(scores_BK[mask_BK].mean().item())
    assert means[1.0] < 0.5 < means[0.0]


def test_the_best_epoch_is_kept(llama: Path, section: Callable[..., Any]) -> None:
    # Every other validation ranking is turned around, so that the better training goes the worse its loss gets.
    turned = [one._replace(ranks=(2, 1, 1)) for one in TOY[6:]]
    tracker, config = MemoryTracker(), section("reward", epochs=4, lora_layers=0)
    roles = reward_model(llama, config)
    final = train_reward(roles, ROLE, TOY[:6], turned, config, pad_id=PAD, tracker=tracker)
    history = [v["reward/validation_loss"] for _, v in tracker.history if "reward/validation_loss" in v]
    assert final["validation_loss"] == min(history)
    assert final["best_epoch"] == 1 + history.index(min(history)) < 4, history
    judged = judge_rankings(roles, ROLE, turned, PAD)
    assert validation_loss(judged) == pytest.approx(final["validation_loss"], rel=1e-9)
    assert accuracy(judged) == final["validation_accuracy"]


def test_metrics_bear_the_name_they_are_given(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("reward")
    train(reward_model(llama, config), MIXED, config, tracker=tracker, prefix="gold")
    assert {name for _, values in tracker.history for name in values} == {
        f"gold/{name}"
        for name in ("loss", "batch_accuracy", "grad_norm", "learning_rate", "validation_loss", "validation_accuracy")
    }


@pytest.mark.filterwarnings("ignore:invalid value encountered in logaddexp:RuntimeWarning")
def test_a_loss_that_is_no_number_stops_the_run(llama: Path, section: Callable[..., Any]) -> None:
    config = section("reward")
    roles = reward_model(llama, config)
    with torch.no_grad():
        roles.heads[ROLE].bias.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="A score of reward is nan"):
        train(roles, MIXED, config)


@torch.no_grad()
def test_judging_gives_the_margin_of_every_pair_that_is_no_tie(llama: Path, section: Callable[..., Any]) -> None:
    roles = reward_model(llama, section("reward"))
    judged = judge_rankings(roles, ROLE, MIXED, PAD, size=3)
    s = score_rankings(roles, ROLE, MIXED, PAD)[0]
    pairs = [
        *[(0, 0, 1)],
        *[(1, 1, 0), (1, 1, 2), (1, 2, 0)],
        *[(2, 0, 1), (2, 0, 2), (2, 0, 3), (2, 1, 3), (2, 2, 3)],
    ]
    # float32 sums in batches of another size
    assert sorted(judged.margins) == pytest.approx(sorted((s[b, i] - s[b, j]).item() for b, i, j in pairs), abs=1e-5)
    lengths = [one.lengths for one in MIXED]
    assert sorted(judged.length_differences) == sorted(lengths[b][i] - lengths[b][j] for b, i, j in pairs)
    assert judged.rankings == 4
    assert sorted(judged.which) == sorted(pairs)
    for margin, (b, i, j) in zip(judged.margins, judged.which, strict=True):
        assert margin == pytest.approx((s[b, i] - s[b, j]).item(), abs=1e-5)


def test_accuracy_and_loss_by_hand() -> None:
    judged = Judged(np.array([2.0, -1.0, 0.0, 3.0]), np.array([1, -1, 2, 0]), 3)
    assert accuracy(judged) == (1 + 0 + 0.5 + 1) / 4
    expected = sum(math.log1p(math.exp(-margin)) for margin in (2, -1, 0, 3)) / 4
    assert validation_loss(judged) == pytest.approx(expected, rel=1e-12)


def test_measure_by_hand() -> None:
    # Confidence σ(|m|) is .8808, .7311, .5, .9526 and correctness 1, 0, ½, 1, each in a bin of its own.
    # At temperature 2 the confidence is .7311, .6225, .5, .8176.
    which = ((0, 0, 1), (1, 1, 0), (2, 0, 1), (2, 0, 2))
    judged = Judged(np.array([2.0, -1.0, 0.0, 3.0]), np.array([1, -1, 2, 0]), 3, which)
    found = measure(judged, 2.0)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    raw = (1 - sigmoid(2)) + sigmoid(1) + 0 + (1 - sigmoid(3))
    scaled = (1 - sigmoid(1)) + sigmoid(0.5) + 0 + (1 - sigmoid(1.5))
    assert found.metrics == pytest.approx(
        {
            "accuracy": 0.625,
            "pairs": 4,
            "rankings": 3,
            "ece": raw / 4,
            "ece_scaled": scaled / 4,
            "ece_by_chance": calibration_error_by_chance([1.0, -0.5, 0.0, 1.5], which, seed=0),
            "temperature": 2.0,
            "longest_wins": (1 + 0 + 1 + 0.5) / 4,
        },
        rel=1e-9,
    )
    assert [(part.low, part.accuracy) for part in found.calibration] == [(0.5, 0.5), (0.7, 0.0), (0.8, 1.0), (0.9, 1.0)]
    assert [part.accuracy for part in found.calibration_scaled] == [0.5, 0.0, 1.0, 1.0]
    assert sum(part.pairs for part in found.by_length) == 4


def test_where_it_is_wrong_by_hand() -> None:
    def record(question: str, kind: str, *answers: str) -> Ranking:
        return Ranking((("system", "Be kind."), ("user", question)), answers, (1, 2, 3)[: len(answers)], category=kind)

    records = [
        record("a?", "how-to", "a1", "a2"),
        record("b?", "", "b1", "b2", "b3"),
        record("c?", "how-to", "c1", "c2"),
    ]
    which = ((0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 2), (2, 0, 1))
    judged = Judged(np.array([0.5, -2.0, 0.0, 1.0, -3.0]), np.zeros(5), 3, which)
    assert accuracy_by_kind(judged, records) == {
        "how-to": {"accuracy": 0.5, "pairs": 2},
        "none": {"accuracy": 0.5, "pairs": 3},  # one wrong, one equal, one right
    }
    assert mistakes(judged, records) == [
        {"prompt": "Be kind.\n\nc?", "kind": "how-to", "preferred": "c1", "scored_higher": "c2", "by": 3.0},
        {"prompt": "Be kind.\n\nb?", "kind": "", "preferred": "b1", "scored_higher": "b2", "by": 2.0},
    ]


def test_the_temperature_scales_with_the_margins() -> None:
    margins = np.array([1.0, 2.0, -1.0, 0.5, 3.0, -0.2])
    lengths = np.zeros(6)
    once, thrice = (temperature_of(Judged(margins * factor, lengths, 6)) for factor in (1, 3))
    assert thrice == pytest.approx(3 * once, rel=1e-6)  # the search stops there


def normalised(
    roles: Roles, tokenizer: PreTrainedTokenizerFast, *, count: int = 12
) -> tuple[dict[str, tuple[float, float]], Tensor]:
    """What is found on `count` of twelve prompts, and the scores of the very responses."""
    prompts = [[7, 20, 35], [12, 5, 77, 31, 8], [40, 41], [9, 10, 11, 12]] * 3
    found = normalise_on_samples(roles, [ROLE], prompts, count=count, max_tokens=6, tokenizer=tokenizer, seed=5)
    generator = torch.Generator().manual_seed(5)
    chosen = [prompts[row] for row in torch.randperm(12, generator=generator)[:count].tolist()]
    sampled = sample(
        roles.language_model(REFERENCE),
        chosen,
        max_tokens=6,
        temperature=1.0,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        generator=generator,
    )
    return found, score_samples(roles, ROLE, sampled).double()


def test_scores_are_normalised_on_prompts_from_all_over_the_data(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def watched(model: Any, prompts: list[list[int]], **options: Any) -> Any:
        seen.extend(prompts)
        return sample(model, prompts, **options)

    monkeypatch.setattr(reward, "sample", watched)
    by_kind = [[kind, number] for kind in range(10, 18) for number in range(20, 40)]  # sorted, as data often comes
    options = {"count": 40, "max_tokens": 2, "tokenizer": tokenizer, "seed": 0}
    normalise_on_samples(reward_model(llama, section("reward")), [ROLE], by_kind, **options)
    assert len(seen) == 40
    assert len({tuple(prompt) for prompt in seen}) == 40
    assert {prompt[0] for prompt in seen} == set(range(10, 18))


def test_scores_have_mean_0_and_deviation_1_on_the_samples(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = reward_model(llama, section("reward"))
    found, scores_B = normalised(roles, tokenizer)
    mean, std = found[ROLE]
    z_B = (scores_B - mean) / std
    assert z_B.mean().item() == pytest.approx(0, abs=1e-5)  # float32 sums in batches of another size
    assert z_B.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert std > 0.01


def test_a_reward_that_is_constant_can_be_divided_by(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = reward_model(llama, section("reward"))
    with torch.no_grad():
        roles.heads[ROLE].weight.zero_()
        roles.heads[ROLE].bias.fill_(3.0)
    assert normalised(roles, tokenizer)[0] == {ROLE: (3.0, 1e-6)}


# ---- axes ------------------------------------------------------------------------------------------------------------


def test_an_axis_ranks_by_its_scores_and_leaves_out_what_it_does_not_score() -> None:
    ranks_BK, mask_BK = axis_ranks(SCORED, "kind")
    assert mask_BK.tolist() == [[False] * 4, [True, True, True, False], [True] * 4, [True, True, False, False]]
    assert ranks_BK[1, :3].tolist() == [-2.0, -2.0, -7.5]
    assert ranks_BK[2].tolist() == [-1.0, -2.0, -3.0, -4.0]


def test_the_first_loss_of_an_axis_by_hand(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("reward", micro_batch_size=2, axes=["kind", "true"], label_smoothing=0.1)
    roles = reward_model(llama, config)
    with torch.no_grad():
        outputs_BKH, _, _ = outputs_of_rankings(roles, ROLE, SCORED, PAD)
    assert outputs_BKH.shape == (4, 4, 3)
    expected = {}
    for place, axis in ((1, "kind"), (2, "true")):
        each = []
        for one, s in zip(SCORED, outputs_BKH[..., place].tolist(), strict=True):
            scores = one.axes.get(axis, ())
            leads = [s[i] - s[j] for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
            losses = [0.9 * math.log1p(math.exp(-lead)) + 0.1 * math.log1p(math.exp(lead)) for lead in leads]
            each += [sum(losses) / len(losses)] if losses else []
        assert len(each) == {"kind": 3, "true": 1}[axis]  # what is not scored, or scored alike, has no say
        expected[axis] = sum(each) / len(each)
    train(roles, SCORED, config, tracker=tracker)
    _, first = tracker.history[0]
    for axis, loss in expected.items():
        assert first[f"reward/axes/{axis}/loss"] == pytest.approx(loss, rel=1e-5)  # float32


def test_cutting_a_batch_changes_no_weight_of_an_axis(llama: Path, section: Callable[..., Any]) -> None:
    found = {}
    for size in (1, 2, 4):
        config = section(
            "reward", learning_rate=1e-3, epochs=3, micro_batch_size=size, axes=["kind", "true"], center_coef=0.5
        )
        roles = reward_model(llama, config)
        train(roles, SCORED, config)
        found[size] = weights(roles)
    for size in (1, 2):
        for ours, theirs in zip(found[size], found[4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)  # Adam steps by rounding, too


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_axis_learns_its_own_order(llama: Path, section: Callable[..., Any], method: str) -> None:
    # The axis prefers what the ranks call worst: the shortest.
    toy = [one._replace(axes={"short": [-length for length in one.lengths]}) for one in TOY]
    rate = 2e-2 if method == "lora" else 5e-3
    config = section("reward", method=method, lora_layers=0, learning_rate=rate, epochs=16, axes=["short"])
    roles = reward_model(llama, config, method=method)
    train_reward(roles, ROLE, toy[:9], toy[9:], config, pad_id=PAD, tracker=NullTracker())
    judged = judge_heads(roles, ROLE, toy[:9], PAD)
    assert accuracy(judged[None]) == 1.0
    assert accuracy(judged["short"]) == 1.0
    assert (judged["short"].length_differences < 0).all()
    assert not set(judged[None].which) & set(judged["short"].which)


def test_a_role_without_axes_learns_as_if_there_were_no_scores(llama: Path, section: Callable[..., Any]) -> None:
    config = section("reward")
    plain, scored = reward_model(llama, config), reward_model(llama, config)
    train(plain, MIXED, config)
    train(scored, SCORED, config)
    assert all(torch.equal(one, other) for one, other in zip(weights(plain), weights(scored), strict=True))


def test_an_axis_moves_what_it_is_trained_with(llama: Path, section: Callable[..., Any]) -> None:
    config = section("reward", axes=["kind"])
    roles = reward_model(llama, config)
    before = roles.axis_heads[ROLE].weight.detach().clone()
    plain = reward_model(llama, section("reward"))
    train(roles, SCORED, config)
    train(plain, SCORED, section("reward"))
    assert not torch.equal(roles.axis_heads[ROLE].weight, before)
    assert len(weights(roles)) == len(weights(plain)) + 2
    assert any(not torch.equal(*pair) for pair in zip(weights(roles)[:-4], weights(plain)[:-2], strict=True))


def test_judging_an_axis_goes_by_its_scores(llama: Path, section: Callable[..., Any]) -> None:
    roles = reward_model(llama, section("reward", axes=["kind", "true"]))
    with torch.no_grad():
        outputs_BKH, _, _ = outputs_of_rankings(roles, ROLE, SCORED, PAD)
    judged = judge_heads(roles, ROLE, SCORED, PAD)
    assert list(judged) == [None, "kind", "true"]
    assert judged["kind"].which == (
        *((1, 2, 0), (1, 2, 1)),
        *((2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 3, 0), (2, 3, 1), (2, 3, 2)),
        (3, 1, 0),
    )
    assert judged["true"].which == ((0, 1, 0),)
    assert [judged[axis].rankings for axis in judged] == [4, 3, 2]
    for place, axis in enumerate(judged):
        for margin, (b, i, j) in zip(judged[axis].margins, judged[axis].which, strict=True):
            expected = outputs_BKH[b, i, place] - outputs_BKH[b, j, place]
            assert margin == pytest.approx(expected.item(), abs=1e-5)  # float32 sums in batches of another size


def test_each_axis_is_normalised_by_its_own_scores_on_the_samples(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = reward_model(llama, section("reward", axes=["kind", "true"]))
    found, scores_B = normalised(roles, tokenizer)
    assert roles.normalisers[ROLE][:2] == found[ROLE]
    assert scores_B.mean().item() == pytest.approx(found[ROLE][0], rel=1e-5)  # float32
    (kind, true) = (roles.axes[ROLE][axis] for axis in ("kind", "true"))
    assert len({kind.mean, true.mean, found[ROLE][0]}) == 3
    assert min(kind.std, true.std) > 0.01


def test_going_on_from_a_model_of_other_axes_is_refused(
    llama: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    saved = Roles(llama, section("reward"))
    add_models(saved, section("reward", axes=["kind"]))
    for role, name in (("reward", "model"), ("gold", "gold")):
        saved.save(role, tmp_path / name)
    again = Roles(llama, section("reward"))
    add_models(again, section("reward", axes=["kind"], start=str(tmp_path)))
    assert list(again.axes["reward"]) == list(again.axes["gold"]) == ["kind"]
    for axes, asked in (([], "none"), (["kind", "true"], "kind, true")):
        with pytest.raises(ConfigError, match=rf"asks for {asked}, but .* has the axes kind\. Set reward\.axes=\[kind"):
            add_models(Roles(llama, section("reward")), section("reward", axes=axes, start=str(tmp_path)))


def test_encoded_rankings_keep_their_scores(tokenizer: PreTrainedTokenizerFast) -> None:
    record = Ranking((("user", "hi"),), ("A lemon.", "A banana."), (2, 1), scores={"kind": [1, 2]})
    found = encode_rankings([record, record._replace(scores=None)], tokenizer, system="", max_response_tokens=50)
    assert [dict(one.axes) for one in found] == [{"kind": [1, 2]}, {}]
