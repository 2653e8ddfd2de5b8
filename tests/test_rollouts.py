"""Samples follow the model's own distribution, end where they should, and depend on nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core import decoding
from rlhf_core.decoding import pad_left
from rlhf_core.errors import ConfigError
from rlhf_core.models import REFERENCE, Roles, load_policy, pack
from rlhf_core.records import Sampled
from rlhf_core.rollouts import draw, sample

PROMPTS = [[7, 20, 35, 4, 90], [12, 5, 77, 31, 8, 64, 19, 250, 3], [40, 41, 42]]
PAD, NEVER = 0, -1


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return load_policy(request.getfixturevalue(request.param))


def roll(model: Any, prompts: list[list[int]] = PROMPTS, *, seed: int = 0, **changes: Any) -> Sampled:
    options = {"max_tokens": 8, "temperature": 1.0, "stop_id": NEVER, "pad_id": PAD, **changes}
    return sample(model, prompts, generator=torch.Generator().manual_seed(seed), **options)


@torch.no_grad()
def next_logits(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


def greedy_by_hand(model: Any, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(next_logits(model, ids).argmax()))
    return ids[len(prompt) :]


def test_greedy_takes_the_likeliest_token_each_time(model: Any) -> None:
    found = roll(model, greedy=True)
    assert found.ids_BT.tolist() == [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert found.mask_BT.all()
    assert not found.stopped_B.any()


def test_a_response_ends_with_its_stop_token_and_then_pads(model: Any) -> None:
    by_hand = [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]
    stop = by_hand[1][2]
    found = roll(model, greedy=True, stop_id=stop, pad_id=299)
    for row, tokens in enumerate(by_hand):
        length = tokens.index(stop) + 1 if stop in tokens else 8
        width = found.ids_BT.shape[1]
        assert found.ids_BT[row].tolist() == (tokens[:length] + [299] * 8)[:width]
        assert found.mask_BT[row].tolist() == [True] * length + [False] * (width - length)
        assert bool(found.stopped_B[row]) == (stop in tokens)


def test_a_stop_on_the_very_last_position_did_stop(model: Any) -> None:
    tokens = greedy_by_hand(model, PROMPTS[0], 8)
    length = next(n for n in range(2, 9) if tokens[n - 1] not in tokens[: n - 1])
    found = roll(model, PROMPTS[:1], greedy=True, max_tokens=length, stop_id=tokens[length - 1])
    assert found.stopped_B.tolist() == [True]
    assert found.mask_BT.tolist() == [[True] * length]
    shorter = roll(model, PROMPTS[:1], greedy=True, max_tokens=length - 1, stop_id=tokens[length - 1])
    assert shorter.stopped_B.tolist() == [False]


def test_a_pad_id_that_is_sampled_is_an_ordinary_token(model: Any) -> None:
    tokens = greedy_by_hand(model, PROMPTS[0], 8)
    found = roll(model, PROMPTS[:1], greedy=True, pad_id=tokens[3])
    assert found.ids_BT.tolist() == [tokens]
    assert found.mask_BT.all()


@pytest.mark.parametrize("share", [0.01, 0.25, 0.6])
def test_dropping_finished_rows_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    prompts, options = PROMPTS * 5, {"stop_id": 2, "max_tokens": 14, "seed": 3}
    monkeypatch.setattr(decoding, "DROP_SHARE", 2.0)  # never
    kept = roll(model, prompts, **options)
    lengths = kept.mask_BT.sum(1).tolist()
    assert len(set(lengths)) >= 4, lengths  # rows finish at many different steps, or nothing is tested
    monkeypatch.setattr(decoding, "DROP_SHARE", share)
    dropped = roll(model, prompts, **options)
    for left, right in zip(kept[1:4], dropped[1:4], strict=True):
        assert torch.equal(left, right)


def test_what_a_row_becomes_depends_on_its_seed_alone(model: Any) -> None:
    first, again, other = (roll(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids_BT, again.ids_BT)
    assert not torch.equal(first.ids_BT, other.ids_BT)


def test_what_the_generator_gives_next_does_not_hang_on_how_long_responses_were(model: Any) -> None:
    following = []
    for stop_id in (2, 10**6):  # some stop early, or none ever
        generator = torch.Generator().manual_seed(1)
        sample(model, PROMPTS, max_tokens=9, temperature=1.0, stop_id=stop_id, pad_id=0, generator=generator)
        following.append(torch.rand(1, generator=generator).item())
    assert following[0] == following[1]


def test_what_would_pass_the_models_context_is_refused(model: Any) -> None:
    context = model.config.max_position_embeddings
    longest = max(map(len, PROMPTS))
    with pytest.raises(ConfigError, match=f"make {context + 1}; the model's context is {context}"):
        roll(model, PROMPTS, max_tokens=context - longest + 1)


def test_draw_inverts_the_distribution_function_by_hand() -> None:
    # probabilities ½, ¼, ¼ at temperature 1: tokens begin at 0, ½ and ¾
    logits_BV = torch.tensor([[2.0, 1.0, 1.0]]).log().repeat(6, 1)
    uniform_B = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, 1 - 1e-12], dtype=torch.float64)
    assert draw(logits_BV, uniform_B, 1.0).tolist() == [0, 0, 1, 1, 2, 2]
    # at temperature ½ they are squared: 4/6, 1/6, 1/6
    uniform_B = torch.tensor([0.0, 0.66, 0.67, 0.83, 0.84, 0.99], dtype=torch.float64)
    assert draw(logits_BV, uniform_B, 0.5).tolist() == [0, 0, 1, 1, 2, 2]


def test_draw_never_takes_what_has_no_probability() -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).repeat(4, 1)
    uniform_B = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert draw(logits_BV, uniform_B, 1.0).tolist() == [1, 1, 3, 3]


def test_draw_follows_the_softmax() -> None:
    logits_V, temperature, count = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 0.7, 20_000
    uniform_B = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(logits_V.repeat(count, 1), uniform_B, temperature)
    expected_V = (logits_V.double() / temperature).softmax(0) * count
    statistic = ((drawn.bincount(minlength=5) - expected_V).square() / expected_V).sum().item()
    assert statistic < 18.47  # χ² with 4 degrees of freedom passes it once in a thousand


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_follow_the_models_softmax(model: Any, temperature: float) -> None:
    count = 3000
    found = roll(model, PROMPTS[2:] * count, max_tokens=1, temperature=temperature)
    expected_V = (next_logits(model, PROMPTS[2]).double() / temperature).softmax(0) * count
    top = expected_V.topk(10).indices
    observed_V = found.ids_BT[:, 0].bincount(minlength=len(expected_V)).double()
    ours = torch.cat([observed_V[top], count - observed_V[top].sum()[None]])
    theirs = torch.cat([expected_V[top], count - expected_V[top].sum()[None]])
    assert ((ours - theirs).square() / theirs).sum().item() < 29.6  # χ² with 10 degrees of freedom, one in a thousand


def test_a_models_generation_config_has_no_say(model: Any) -> None:
    before = roll(model, stop_id=2)
    saved = model.generation_config.to_dict()
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0, min_new_tokens=8, num_beams=1
    )
    try:
        after = roll(model, stop_id=2)
    finally:
        model.generation_config.update(**saved)
    assert torch.equal(before.ids_BT, after.ids_BT)
    assert torch.equal(before.mask_BT, after.mask_BT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logprobs_of_what_was_sampled_are_those_of_the_plain_model(request: pytest.FixtureRequest, name: str) -> None:
    folder: Path = request.getfixturevalue(name)
    roles, model = Roles(folder), load_policy(folder)
    found = roll(roles.language_model(REFERENCE), stop_id=2, temperature=0.8, seed=5)
    packed = pack(found.prompts, found.responses(), PAD)
    logprobs_BT, _ = roles.logprobs(roles.trunk(packed), REFERENCE, packed.ids_BT, packed.mask_BT, temperature=0.8)
    for row, prompt in enumerate(PROMPTS):
        tokens = found.ids_BT[row][found.mask_BT[row]].tolist()
        logits_TV = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected_T = (logits_TV / 0.8).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(logprobs_BT[row, : len(tokens)], expected_T, rtol=1e-4, atol=1e-5)  # float32


@torch.no_grad()
@pytest.mark.parametrize("greedy", [False, True])
def test_logprobs_told_while_sampling_are_those_of_the_plain_model(model: Any, greedy: bool) -> None:
    stop = int(roll(model, greedy=greedy, seed=5).ids_BT[1, 2])  # so that one row at least ends early
    found = roll(model, greedy=greedy, seed=5, temperature=0.8, stop_id=stop, logprobs=True)
    assert found.logprobs_BT is not None
    assert not found.logprobs_BT[~found.mask_BT].any()
    for row, prompt in enumerate(PROMPTS):
        tokens = found.ids_BT[row][found.mask_BT[row]].tolist()
        logits_TV = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected_T = (logits_TV / 0.8).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(found.logprobs_BT[row, : len(tokens)], expected_T, rtol=1e-4, atol=1e-5)  # float32
    assert roll(model, seed=5).logprobs_BT is None


def test_steps_are_reported_with_the_rows_still_running(model: Any) -> None:
    steps: list[tuple[int, int]] = []
    found = roll(model, PROMPTS * 4, stop_id=2, max_tokens=10, on_step=lambda step, rows: steps.append((step, rows)))
    lengths_B = found.mask_BT.sum(1)
    assert steps == [
        (step, int(((lengths_B > step + 1) | ((lengths_B == step + 1) & ~found.stopped_B)).sum()))
        for step in range(len(steps))
    ]
    assert len(steps) == found.ids_BT.shape[1]


def test_left_padding_by_hand() -> None:
    ids_BP, mask_BP = pad_left([[5], [6, 7, 8]], 9)
    assert ids_BP.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask_BP.tolist() == [[False, False, True], [True, True, True]]


def test_prompts_and_responses_come_back_as_rows(model: Any) -> None:
    found = roll(model, PROMPTS * 3, stop_id=2)
    assert found.prompts == PROMPTS * 3
    for response, ids_T, mask_T in zip(found.responses(), found.ids_BT, found.mask_BT, strict=True):
        assert response == ids_T.tolist()[: len(response)]
        assert len(response) == int(mask_T.sum())


def test_the_fixtures_stop_now_and_then(model: Any, section: Callable[..., Any]) -> None:
    # What other tests take for granted: some responses of the small models end early and some never.
    found = roll(model, PROMPTS * 20, stop_id=2, max_tokens=section("ppo").response_tokens)
    assert 0.15 < found.stopped_B.float().mean().item() < 0.85
