"""The lean way to sample computes what the plain model does: same logits, same states, weights as they are now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import perturb
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_core import decoding
from rlhf_core.decoding import Lean, Plain, decoder, is_lean
from rlhf_core.models import REFERENCE, Roles, load_policy, pack
from rlhf_core.rollouts import sample
from rlhf_core.tiny import make_llama

PROMPTS = [[7, 20, 35, 4, 90], [12, 5, 77, 31, 8, 64, 19, 250, 3], [40, 41, 42], [7, 20, 35, 4, 90], [9]]
EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32: sums of the same numbers in another order
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def build(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaForCausalLM:
    return make_llama(tokenizer, seed=1, num_hidden_layers=3, initializer_range=0.2, **changes).eval()


@torch.no_grad()
def steps_agree(model: Any, prompts: list[list[int]] = PROMPTS, *, steps: int = 6, keep_depth: int = 0) -> None:
    """Feed both ways the same tokens, let rows leave at random steps, and compare all logits and kept states."""
    generator = torch.Generator().manual_seed(0)
    lean = decoder(model, prompts, max_tokens=steps + 1, pad_id=0, keep_depth=keep_depth, keep_tops=True)
    assert isinstance(lean, Lean)
    rows, running = [list(prompt) for prompt in prompts], torch.ones(len(prompts), dtype=torch.bool)
    found_LV = lean.start()
    for _ in range(steps):
        for logits_V, row in zip(found_LV, lean.rows_L.tolist(), strict=True):
            expected_V = model(input_ids=torch.tensor([rows[row]])).logits[0, -1]
            torch.testing.assert_close(logits_V, expected_V, **EXACT)
        tokens_L = torch.randint(3, 290, (len(lean.rows_L),), generator=generator)
        for row, token in zip(lean.rows_L.tolist(), tokens_L.tolist(), strict=True):
            rows[row].append(token)
        running = torch.rand(len(lean.rows_L), generator=generator) > 0.2
        if not running.any():
            break
        found_LV = lean.step(tokens_L, running)
    else:
        tokens_L = torch.randint(3, 290, (len(lean.rows_L),), generator=generator)
        for row, token in zip(lean.rows_L.tolist(), tokens_L.tolist(), strict=True):
            rows[row].append(token)
    lean.end(tokens_L)
    kept = lean.states()
    assert (kept is None) == (keep_depth == 0)
    for states_SD, ids in zip(kept or [], rows, strict=bool(kept)):
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(states_SD, hidden[keep_depth][0], **EXACT)
    tops_BTD = lean.tops()
    assert tops_BTD is not None
    for tops_TD, prompt, ids in zip(tops_BTD, prompts, rows, strict=True):
        hidden_SD = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        came = len(ids) - len(prompt)
        torch.testing.assert_close(tops_TD[:came], hidden_SD[len(prompt) - 1 : len(ids) - 1], **EXACT)


@pytest.mark.parametrize("keep_depth", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-3},
        {"rope_parameters": LLAMA3},
    ],
)
def test_lean_steps_equal_the_plain_model(
    tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], keep_depth: int
) -> None:
    steps_agree(build(tokenizer, **changes), keep_depth=keep_depth)


@pytest.mark.parametrize("packed", [True, False])
def test_many_rows_equal_the_plain_model(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 12)  # prompts are computed in several pieces
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: packed)
    steps_agree(build(tokenizer), PROMPTS * 4, keep_depth=1)


def test_an_adapter_that_is_on_has_its_say(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("ppo"))
    for role in ("policy", "other"):
        roles.add(role)
    perturb(roles, "policy", seed=3)
    for role in ("policy", "other", REFERENCE, "policy"):
        steps_agree(roles.language_model(role), keep_depth=roles.depth)
    before = decoder(roles.language_model("policy"), PROMPTS, max_tokens=1, pad_id=0, keep_depth=0).start()
    perturb(roles, "policy", seed=3)  # learning in place
    steps_agree(roles.language_model("policy"), keep_depth=roles.depth)
    after = decoder(roles.language_model("policy"), PROMPTS, max_tokens=1, pad_id=0, keep_depth=0).start()
    assert not torch.allclose(before, after, atol=1e-2)


def test_only_what_has_changed_is_laid_out_again(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = Roles(llama, section("ppo"))
    roles.add("policy")
    roles.add("whole", method="full")
    made: list[Any] = []
    layer = decoding._Layer
    monkeypatch.setattr(decoding, "_Layer", lambda module: made.append(module) or layer(module))

    def layers_made(role: str) -> int:
        made.clear()
        decoder(roles.language_model(role), PROMPTS, max_tokens=1, pad_id=0, keep_depth=0)
        return len(made)

    assert layers_made("policy") == 3
    assert layers_made("policy") == 0
    perturb(roles, "policy", seed=3)
    assert layers_made("policy") == 1
    assert layers_made(REFERENCE) == 1
    assert layers_made("whole") == 3
    optimiser = torch.optim.AdamW(roles.full["whole"].model.layers[1].parameters())  # type: ignore[union-attr,index]
    roles.full["whole"].model.layers[1].mlp.up_proj.weight.sum().backward()  # type: ignore[union-attr,index]
    optimiser.step()
    assert layers_made("whole") == 1


def test_a_prompt_is_computed_once_for_all_its_samples(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, ...]] = []
    prefill = Lean._prefill

    def counted(self: Lean, prompts: Any, rows: Any) -> Tensor:
        computed.extend(prompts)
        return prefill(self, prompts, rows)

    monkeypatch.setattr(Lean, "_prefill", counted)
    decoder(build(tokenizer), PROMPTS * 3, max_tokens=1, pad_id=0, keep_depth=0).start()
    assert sorted(computed) == sorted(set(map(tuple, PROMPTS)))


@torch.no_grad()
def test_both_ways_sample_the_same_tokens(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_policy(llama)
    options = {"max_tokens": 12, "temperature": 0.9, "stop_id": 2, "pad_id": 0}

    def roll() -> Any:
        return sample(model, PROMPTS * 4, generator=torch.Generator().manual_seed(5), **options)

    lean = roll()
    monkeypatch.setattr(decoding, "is_lean", lambda model: False)
    plain = roll()
    assert plain.ids_BT.equal(lean.ids_BT)
    assert plain.stopped_B.equal(lean.stopped_B)


def test_what_is_no_plain_llama_falls_back(gpt2: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert is_lean(build(tokenizer))
    for changes in (
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ):
        assert not is_lean(build(tokenizer, **changes)), changes
    model = load_policy(gpt2)
    assert isinstance(decoder(model, PROMPTS, max_tokens=1, pad_id=0, keep_depth=0), Plain)


@torch.no_grad()
def test_states_kept_while_sampling_are_the_trunk(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("ppo"))
    roles.add("policy")
    perturb(roles, "policy", seed=3)
    found = sample(
        roles.language_model("policy"), PROMPTS * 4, max_tokens=9, temperature=1.0, stop_id=2, pad_id=0,
        generator=torch.Generator().manual_seed(1), keep_depth=roles.depth,
    )  # fmt: skip
    assert len(set(found.mask_BT.sum(1).tolist())) >= 3
    packed = pack(found.prompts, found.responses(), 0)
    ours, theirs = roles.trunk(packed, states=found.states), roles.trunk(packed)
    torch.testing.assert_close(ours.states[ours.mask_BS], theirs.states[theirs.mask_BS], **EXACT)
    assert [part.tolist() for part in ours[1:4]] == [part.tolist() for part in theirs[1:4]]
