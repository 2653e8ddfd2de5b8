"""Length regressed out of the reward model: β by hand, what scores are left with, and where it is told."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core.length import LengthTerm, deviation, fit, length_correlation
from rlhf_core.models import Roles
from rlhf_core.reward import (
    EncodedRanking,
    accuracy,
    axis_loss,
    judge_heads,
    judge_rankings,
    length_term,
    measure,
    ranks_loss,
    train_reward,
)
from rlhf_core.tracking import MemoryTracker, NullTracker
from tasks.reward import _numbers, _with_length

PAD, ROLE, GOOD, FILLERS = 0, "reward", 100, (20, 40, 60)
LOSSES = ["pairs", "plackett_luce"]


def drawn(count: int, *, seed: int, of: int = 2) -> list[EncodedRanking]:
    """Rankings by chance: each token more is worth 0.5, the token GOOD 1.5, of log-odds; the two are independent.

    So length decides more than content does: lengths differ by 4 tokens, whose 2 of log-odds beat the 1.5.
    """
    draw, found = random.Random(seed), []
    for _ in range(count):
        prompt = [draw.choice(FILLERS)]
        responses, worth = [], []
        for _ in range(of):
            good, length = draw.random() < 0.5, draw.choice([3, 7])
            words = [draw.choice(FILLERS) for _ in range(length - 2)]
            responses.append([*words, GOOD if good else draw.choice(FILLERS), 2])
            worth.append(0.5 * length + 1.5 * good - math.log(-math.log(draw.random())))  # Gumbel: Plackett and Luce's
        order = sorted(range(of), key=lambda row: -worth[row])
        ranks = tuple(order.index(row) + 1 for row in range(of))
        rows = [prompt + response for response in responses]
        axes = {"short": [-len(response) for response in responses], "good": [GOOD in one for one in responses]}
        found.append(EncodedRanking(rows, ranks, [len(response) for response in responses], axes=axes))
    return found


TRAIN, TEST = drawn(240, seed=1), drawn(200, seed=2)


def trained(folder: Path, config: Any, rankings: list[EncodedRanking], **options: Any) -> tuple[Roles, dict[str, Any]]:
    roles = Roles(folder, config)
    torch.manual_seed(7)
    roles.add(ROLE, method=config.method, head=True, axes=config.axes)
    settings = {"pad_id": PAD, "tracker": NullTracker(), **options}
    final = train_reward(roles, ROLE, rankings, TEST[:40], config, **settings)
    return roles, final


# ---- by hand


def test_the_deviation_is_of_pairs_that_are_no_ties() -> None:
    # Differences 3 and −4, the tie of 10 and 90 left out: √((9 + 16) / 2).
    rankings = [
        EncodedRanking([[0]] * 2, (1, 2), [5, 2]),
        EncodedRanking([[0]] * 2, (2, 1), [6, 2]),
        EncodedRanking([[0]] * 2, (1, 1), [10, 90]),
    ]
    assert deviation(rankings) == pytest.approx(math.sqrt(12.5), rel=1e-12)
    assert deviation([EncodedRanking([[0]] * 2, (1, 2), [5, 5])]) == 1.0  # no difference, and nothing to divide by


def test_the_correlation_by_hand() -> None:
    margins, differences = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, -2.0])
    # 3 − 2 − 1 = 0; with the last turned: (3 − 2 + 1) / √((1 + 4 + ¼)(9 + 1 + 4))
    assert length_correlation(margins, differences) == pytest.approx(0, abs=1e-12)
    differences[2] = 2.0
    assert length_correlation(margins, differences) == pytest.approx(2 / math.sqrt(5.25 * 14), rel=1e-12)
    turned = np.array([-1.0, 1.0, 1.0])  # which response is named first does not matter
    both = length_correlation(margins * turned, differences * turned)
    assert both == pytest.approx(length_correlation(margins, differences), rel=1e-12)
    assert length_correlation(2 * differences, differences) == pytest.approx(1, rel=1e-12)
    assert length_correlation(np.zeros(3), differences) == 0


def test_the_correlation_is_pearsons_over_both_orders() -> None:
    draw = np.random.default_rng(3)
    margins, differences = draw.normal(1.0, 2.0, 50), draw.normal(-3.0, 5.0, 50)
    both = [np.concatenate([values, -values]) for values in (margins, differences)]
    assert length_correlation(margins, differences) == pytest.approx(np.corrcoef(*both)[0, 1], rel=1e-12)


def test_the_first_beta_by_hand(section: Callable[..., Any], llama: Path) -> None:
    # Three of four times the longer one, by 4 tokens, wins: σ(4 β) = ¾, so β = log 3 / 4 a token.
    rankings = [EncodedRanking([[9] * 8, [9] * 4], (1, 2), [8, 4])] * 3 + [
        EncodedRanking([[9] * 8, [9] * 4], (2, 1), [8, 4])
    ]
    config = section("reward", length="regress")
    roles = Roles(llama, config)
    roles.add(ROLE, head=True)
    (worth,) = length_term(roles, ROLE, rankings, config).worth()
    assert worth == pytest.approx(math.log(3) / 4, rel=0.01)  # the ridge pulls it in by 0.5 %
    # Where each response has the same length nothing is said of it.
    (worth,) = length_term(roles, ROLE, [EncodedRanking([[9] * 8] * 2, (1, 2), [8, 8])], config).worth()
    assert worth == pytest.approx(0, abs=1e-4)
    # Where the longer one always wins it is finite.
    (worth,) = length_term(roles, ROLE, rankings[:1], config).worth()
    assert 0.5 < worth < 2.5


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_beta_is_where_the_loss_of_length_alone_is_least(
    section: Callable[..., Any], llama: Path, loss: str
) -> None:
    config = section("reward", loss=loss, length="regress", axes=["good"])
    rankings = drawn(300, seed=5, of=3)
    roles = Roles(llama, config)
    roles.add(ROLE, head=True, axes=config.axes)
    of_score, of_axis = length_term(roles, ROLE, rankings, config).worth()
    lengths_BK = torch.tensor([one.lengths for one in rankings], dtype=torch.float64)
    ranks_BK = torch.tensor([one.ranks for one in rankings])

    def by_ranks(worth: float) -> float:
        return ranks_loss(worth * lengths_BK, ranks_BK, ranks_BK > 0, rankings, config).item()

    def by_axis(worth: float) -> float:
        return axis_loss(worth * lengths_BK, rankings, "good", config).item()

    for found, cost in ((of_score, by_ranks), (of_axis, by_axis)):
        assert cost(found) < min(cost(found - 0.02), cost(found + 0.02))
    assert 0.3 < of_score < 0.5  # drawn with 0.5; less, since content is noise to who sees length alone
    assert abs(of_axis) < 0.1


def test_fit_finds_the_least_of_a_convex_curve() -> None:
    assert fit(lambda beta: 5 * (beta - 0.7) ** 2) == pytest.approx(0.7, rel=1e-3)
    assert fit(lambda beta: 0.25) == pytest.approx(0, abs=1e-4)


def test_length_adds_to_each_response_and_to_nothing_past_the_last() -> None:
    rankings = [EncodedRanking([[0]] * 2, (1, 2), [6, 2]), EncodedRanking([[0]] * 3, (1, 1, 1), [1, 2, 3])]
    term = LengthTerm(rankings, [lambda s: s.sum()] * 2, [0.5, -2.0], torch.device("cpu"))
    assert term.worth() == pytest.approx([0.5, -2.0], rel=1e-6)  # as they were saved
    expected = [[[3.0, -12.0], [1.0, -4.0], [0, 0]], [[0.5, -2.0], [1.0, -4.0], [1.5, -6.0]]]
    torch.testing.assert_close(term.added(rankings), torch.tensor(expected), rtol=1e-6, atol=1e-6)  # float32


# ---- trained


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_count_length_less_and_still_find_the_content(
    llama: Path, section: Callable[..., Any], loss: str
) -> None:
    found = {}
    for length in ("ignore", "regress"):
        config = section(
            "reward", loss=loss, length=length, method="full", epochs=4, batch_size=16, micro_batch_size=16,
            learning_rate=2e-3,
        )  # fmt: skip
        roles, _ = trained(llama, config, TRAIN)
        judged = judge_rankings(roles, ROLE, TEST, PAD)
        good = np.array([float(GOOD in TEST[row].ids[i]) - (GOOD in TEST[row].ids[j]) for row, i, j in judged.which])
        content = judged._replace(margins=(judged.margins * good)[good != 0])
        found[length] = length_correlation(judged.margins, judged.length_differences), accuracy(content)
    assert found["ignore"][0] > 0.5
    assert abs(found["regress"][0]) < 0.5 * found["ignore"][0], found
    assert found["regress"][1] > max(0.9, found["ignore"][1] - 0.03), found
    assert roles.normalisers[ROLE].length_coef == pytest.approx(0.5, abs=0.2)  # as they were drawn


def test_the_first_loss_is_of_the_score_and_what_length_adds(llama: Path, section: Callable[..., Any]) -> None:
    config = section("reward", length="regress", micro_batch_size=2, axes=["short"], center_coef=0.0)
    roles = Roles(llama, config)
    torch.manual_seed(7)
    roles.add(ROLE, head=True, axes=config.axes)
    batch, tracker = TRAIN[:4], MemoryTracker()
    of_score, of_axis = length_term(roles, ROLE, batch, config).worth()
    expected = {}
    for name, axis, worth in (("reward/loss", None, of_score), ("reward/axes/short/loss", "short", of_axis)):
        judged = judge_heads(roles, ROLE, batch, PAD)[axis]
        leads = judged.margins + worth * judged.length_differences
        expected[name] = np.logaddexp(0, -leads).mean()  # a ranking of two is one pair
    train_reward(roles, ROLE, batch, batch, config, pad_id=PAD, tracker=tracker)
    first = tracker.history[0][1]
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)  # float32
    assert of_score > 0.05
    assert of_axis < -1


def test_the_validation_loss_is_of_what_learns_and_accuracy_of_the_score(
    llama: Path, section: Callable[..., Any]
) -> None:
    roles, final = trained(llama, section("reward", length="regress"), TRAIN[:12])
    judged = judge_rankings(roles, ROLE, TEST[:40], PAD)
    worth = roles.normalisers[ROLE].length_coef
    assert worth is not None
    expected = np.logaddexp(0, -(judged.margins + worth * judged.length_differences)).mean()
    assert final["validation_loss"] == pytest.approx(expected, rel=1e-5)  # float32
    assert final["validation_accuracy"] == accuracy(judged)


def test_beta_learns_beside_the_score(llama: Path, section: Callable[..., Any]) -> None:
    tracker = MemoryTracker()
    config = section("reward", length="regress", epochs=2, axes=["short"])
    roles, _ = trained(llama, config, TRAIN[:12], tracker=tracker)
    for name, of in (("length_coef", roles.normalisers[ROLE]), ("axes/short/length_coef", roles.axes[ROLE]["short"])):
        curve = [values[f"reward/{name}"] for _, values in tracker.history if f"reward/{name}" in values]
        assert len(set(curve)) == len(curve) == 6
        assert of.length_coef in (curve[2], curve[5])  # the kept epoch's


def test_what_length_was_worth_is_saved_and_gone_on_from(
    llama: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    config = section("reward", length="regress", axes=["short"])
    roles, _ = trained(llama, config, TRAIN[:12])
    roles.save(ROLE, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "score.json").read_text())
    assert saved["length_coef"] == roles.normalisers[ROLE].length_coef
    assert saved["axes"][0]["length_coef"] == roles.axes[ROLE]["short"].length_coef
    again = Roles(llama, config)
    again.add(ROLE, head=True, start=tmp_path / "model")
    assert length_term(again, ROLE, TRAIN[12:30], config).worth() == pytest.approx(
        [saved["length_coef"], saved["axes"][0]["length_coef"]], rel=1e-6
    )
    # It is no part of a score.
    rows = TEST[0].ids
    torch.testing.assert_close(again.score_rows(rows, ROLE, PAD), roles.score_rows(rows, ROLE, PAD), rtol=0, atol=0)


def test_where_it_is_ignored_nothing_tells_of_it(llama: Path, section: Callable[..., Any], tmp_path: Path) -> None:
    tracker = MemoryTracker()
    roles, _ = trained(llama, section("reward", axes=["short"]), TRAIN[:8], tracker=tracker)
    roles.save(ROLE, tmp_path / "model")
    assert "length" not in (tmp_path / "model" / "score.json").read_text()
    assert not [name for _, values in tracker.history for name in values if "length" in name]


def test_the_stages_numbers_have_it(llama: Path, section: Callable[..., Any]) -> None:
    roles, _ = trained(llama, section("reward", length="regress", axes=["short"]), TRAIN[:8])
    quality = measure(judge_rankings(roles, ROLE, TEST[:8], PAD), 1.0)
    numbers = _with_length(_numbers(quality, {"short": quality}), roles, ROLE)
    assert numbers["length_correlation"] == numbers["axes"]["short"]["length_correlation"] == quality.length_correlation
    assert numbers["length_coef"] == roles.normalisers[ROLE].length_coef
    assert numbers["axes"]["short"]["length_coef"] == roles.axes[ROLE]["short"].length_coef
    plain, _ = trained(llama, section("reward"), TRAIN[:8])
    assert "length_coef" not in _with_length(_numbers(quality, {}), plain, ROLE)
