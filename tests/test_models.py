"""One body in several roles: cut or whole, padded or not, saved or fresh, every role means the same function."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf_core import head
from rlhf_core.errors import MissingArtifact
from rlhf_core.models import (
    REFERENCE,
    Normaliser,
    Roles,
    Trunk,
    TrunkCache,
    load_policy,
    load_tokenizer,
    pack,
    pad_right,
)

# PEFT sees by itself that GPT-2's Conv1D is transposed, and says so each time.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, and another order of the same sums
ROWS = [[7, 20, 35, 4, 90], [12, 5, 77, 31, 8, 64, 19, 250, 3], [40, 41, 42]]


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def perturb(roles: Roles, role: str, *, seed: int = 0) -> None:
    """What training does to a role's parameters, in one go."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.trainable(role):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def plain(folder: Path, row: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of one row without padding, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def trunk_of(roles: Roles, rows: Sequence[Sequence[int]] = ROWS, pad_id: int = 0) -> Trunk:
    return roles.trunk(pack(rows, None, pad_id))


def same_bytes(left: Path, right: Path) -> None:
    assert sorted(path.name for path in left.iterdir()) == sorted(path.name for path in right.iterdir())
    for path in left.iterdir():
        assert path.read_bytes() == (right / path.name).read_bytes(), path.name


# ---- the cut ---------------------------------------------------------------------------------------------------------


def test_a_llama_is_cut_below_its_lowest_adapter(llama: Path, section: Callable[..., Any]) -> None:
    assert Roles(llama).depth == 2  # with no adapter at all, the last layer is left for the roles
    for layers, depth in ((1, 2), (2, 1), (3, 0), (0, 0), (9, 0)):
        roles = Roles(llama, section("sft", lora_layers=layers))
        roles.add("policy")
        assert roles.depth == depth, layers
        assert trunk_of(roles).states.dim() == (3 if depth else 2)


def test_the_lowest_adapter_of_all_roles_decides(llama: Path, section: Callable[..., Any], tmp_path: Path) -> None:
    deep = Roles(llama, section("sft", lora_layers=2))
    deep.add("policy")
    deep.save("policy", tmp_path / "deep")
    roles = Roles(llama, section("sft", lora_layers=1))
    roles.add("policy")
    assert roles.depth == 2
    roles.add("other", start=tmp_path / "deep")
    assert roles.depth == 1
    roles.add("whole", method="full")
    assert roles.depth == 0  # a body of its own shares nothing


@torch.no_grad()
def test_trunk_and_upper_layers_equal_the_whole_model(
    family: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    roles = Roles(family, section("sft", lora_layers=1))
    roles.add("policy")
    perturb(roles, "policy")
    roles.save("policy", tmp_path / "policy")
    load_policy(tmp_path / "policy").save_pretrained(tmp_path / "merged")
    trunk = trunk_of(roles)
    for role, folder in ((REFERENCE, family), ("policy", tmp_path / "merged")):
        hidden_BSD = roles.hidden(trunk, role)
        for index, row in enumerate(ROWS):
            torch.testing.assert_close(hidden_BSD[index, : len(row)], plain(folder, row)[0], **CLOSE)


def test_a_gpt2_falls_back_to_the_whole_model(gpt2: Path, section: Callable[..., Any]) -> None:
    roles = Roles(gpt2, section("sft", lora_layers=1))
    roles.add("policy")
    assert roles.depth == 0
    assert trunk_of(roles).states.dtype == torch.long


@torch.no_grad()
def test_a_model_that_scales_its_embeddings_is_found_out(
    tmp_path: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # Granite has all that a cut needs, and multiplies whatever comes into its layers: cut, it would do so twice.
    config = GraniteConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        embedding_multiplier=3.0,
    )
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    roles = Roles(tmp_path / "granite", section("sft", lora_layers=1))
    roles.add("policy")
    assert roles.depth == 0
    hidden_BSD = roles.hidden(trunk_of(roles), "policy")
    for index, row in enumerate(ROWS):
        torch.testing.assert_close(hidden_BSD[index, : len(row)], plain(tmp_path / "granite", row)[0], **CLOSE)


@torch.no_grad()
def test_rows_of_a_trunk_are_trimmed_and_mean_the_same(llama: Path) -> None:
    roles = Roles(llama)
    whole = trunk_of(roles)
    part = whole.rows(torch.tensor([2, 0]))
    assert part.states.shape[1] == 5
    assert part.mask_BS.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    hidden = roles.hidden(part, REFERENCE)
    torch.testing.assert_close(hidden[0, :3], plain(llama, ROWS[2])[0], **CLOSE)
    torch.testing.assert_close(hidden[1], plain(llama, ROWS[0])[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("limit_bytes", [1 << 20, 900, 0])
def test_a_cached_trunk_means_the_same(llama: Path, section: Callable[..., Any], limit_bytes: int) -> None:
    roles, cache = Roles(llama, section("reward")), TrunkCache(limit_bytes)
    roles.add("reward", head=True)
    perturb(roles, "reward")
    for rows in (ROWS[:2], [ROWS[2], ROWS[0]], ROWS, [ROWS[1]]):
        packed = pack(rows, None, 0)
        kept, plainly = roles.trunk(packed, cache), roles.trunk(packed)
        assert kept.mask_BS.equal(plainly.mask_BS)
        assert kept.predicts_BS.equal(plainly.predicts_BS)
        torch.testing.assert_close(kept.states[kept.mask_BS], plainly.states[kept.mask_BS], **CLOSE)
        scores_B = roles.score_rows(rows, "reward", 0, size=2, cache=cache)
        torch.testing.assert_close(scores_B, roles.scores(plainly, "reward"), **CLOSE)


@torch.no_grad()
def test_a_cached_row_does_not_hang_on_its_neighbours(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    roles.add("reward", head=True)
    together, alone = TrunkCache(), TrunkCache()
    roles.trunk(pack(ROWS, None, 0), together)
    for row in ROWS:
        roles.trunk(pack([row], None, 0), alone)
    assert all(alone.states[ids].equal(together.states[ids]) for ids in together.states)


@torch.no_grad()
def test_a_cached_row_is_not_computed_again(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, cache = Roles(llama, section("reward")), TrunkCache()
    roles.add("reward", head=True)
    computed: list[list[int]] = []
    lower = Roles._lower

    def counted(self: Roles, ids_BS: Tensor, mask_BS: Tensor, fold: Any) -> Tensor:
        computed.extend(ids_S[mask_S].tolist() for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True))
        return lower(self, ids_BS, mask_BS, fold)

    monkeypatch.setattr(Roles, "_lower", counted)
    roles.trunk(pack(ROWS[:1], None, 0), cache)
    roles.trunk(pack(ROWS, None, 0), cache)
    roles.trunk(pack(ROWS, None, 0), cache)
    assert computed == ROWS


def test_a_trunk_cache_stays_within_its_limit(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    roles.add("reward", head=True)
    width = roles.model.config.hidden_size * 4  # bytes a token
    cache = TrunkCache(limit_bytes=width * (len(ROWS[0]) + len(ROWS[2])))
    roles.trunk(pack([ROWS[0], ROWS[1], ROWS[2]], None, 0), cache)
    assert set(cache.states) == {(tuple(ROWS[0]),), (tuple(ROWS[2]),)}
    held = sum(states_SD.untyped_storage().nbytes() for states_SD in cache.states.values())
    assert held == width * (len(ROWS[0]) + len(ROWS[2]))


# ---- padding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [0, 33])
def test_padding_changes_nothing(family: Path, section: Callable[..., Any], pad_id: int) -> None:
    roles = Roles(family, section("reward"))
    roles.add("reward", head=True)
    perturb(roles, "reward")
    together = trunk_of(roles, pad_id=pad_id)
    for index, row in enumerate(ROWS):
        alone = trunk_of(roles, [row])
        for role in (REFERENCE, "reward"):
            expected_SD = roles.hidden(alone, role)[0]
            torch.testing.assert_close(roles.hidden(together, role)[index, : len(row)], expected_SD, **CLOSE)
        torch.testing.assert_close(roles.scores(together, "reward")[index], roles.scores(alone, "reward")[0], **CLOSE)


@torch.no_grad()
def test_rows_are_scored_in_the_order_given_whatever_the_pieces(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    roles.add("reward", head=True)
    rows = [*ROWS, ROWS[1][:4], ROWS[0][:1]]
    expected = torch.cat([roles.scores(trunk_of(roles, [row]), "reward") for row in rows])
    for size in (1, 2, 8):
        torch.testing.assert_close(roles.score_rows(rows, "reward", 0, size=size), expected, **CLOSE)


@torch.no_grad()
def test_of_no_rows_there_are_no_outputs(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    for role in ("reward", "gold"):
        roles.add(role, head=True, axes=["kind", "true"])
    assert roles.output_rows([], ["reward", "gold"], 0).shape == (0, 2, 3)
    assert roles.score_rows([], "reward", 0).shape == (0,)


@torch.no_grad()
def test_a_score_is_read_at_the_last_kept_token(llama: Path) -> None:
    roles = Roles(llama)
    roles.add("reward", method="full", head=True)
    scores_B = roles.scores(trunk_of(roles), "reward")
    head = roles.heads["reward"]
    for index, row in enumerate(ROWS):
        hidden_SD, _ = plain(llama, row)
        torch.testing.assert_close(scores_B[index], hidden_SD[-1] @ head.weight[0] + head.bias[0], **CLOSE)


@torch.no_grad()
def test_a_pad_id_inside_a_response_is_an_ordinary_token(
    family: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    pad = tokenizer.pad_token_id
    row = [7, 20, pad, 35, pad]  # its last token is one too
    roles = Roles(family, section("reward"))
    roles.add("reward", head=True)
    packed = pack([row[:1], row[:1]], [row[1:], [*row[1:], 9, 9]], pad)
    trunk = roles.trunk(packed)
    hidden_SD, logits_SV = plain(family, row)
    head = roles.heads["reward"]
    torch.testing.assert_close(roles.scores(trunk, "reward")[0], hidden_SD[-1] @ head.weight[0] + head.bias[0], **CLOSE)
    logprobs_BT, _ = roles.logprobs(trunk, REFERENCE, packed.ids_BT, packed.mask_BT, temperature=1.0)
    expected = logits_SV.log_softmax(-1)[torch.arange(4), torch.tensor(row[1:])]
    torch.testing.assert_close(logprobs_BT[0], torch.cat([expected, torch.zeros(2)]), **CLOSE)


# ---- log-probs and values --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_and_entropy_are_those_of_the_plain_model(
    family: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGIT_TOKENS", 3)  # pieces that end in the middle of a row
    prompts, responses = (
        [row[: 1 + n] for n, row in enumerate(ROWS[:2])],
        [row[1 + n :] for n, row in enumerate(ROWS[:2])],
    )
    packed = pack(prompts, responses, 0)
    roles = Roles(family)
    trunk = roles.trunk(packed)
    logprobs_BT, entropy_BT = roles.logprobs(
        trunk, REFERENCE, packed.ids_BT, packed.mask_BT, temperature=temperature, entropy=True
    )
    assert entropy_BT is not None
    assert logprobs_BT.shape == entropy_BT.shape == (2, 7)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        log_TV = (plain(family, prompt + response)[1][len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        count, rest = len(response), torch.zeros(7 - len(response))
        chosen_T = log_TV[torch.arange(count), torch.tensor(response)]
        torch.testing.assert_close(logprobs_BT[index], torch.cat([chosen_T, rest]), **CLOSE)
        spread_T = -(log_TV.exp() * log_TV).sum(-1)
        torch.testing.assert_close(entropy_BT[index], torch.cat([spread_T, rest]), **CLOSE)
    again, none = roles.logprobs(trunk, REFERENCE, packed.ids_BT, packed.mask_BT, temperature=temperature)
    assert torch.equal(again, logprobs_BT)
    assert none is None


def _note_width(widths: list[int], value: Tensor) -> Tensor:
    widths.append(value.shape[-1] if value.dim() > 1 else 0)
    return value


@pytest.mark.parametrize("method", ["lora", "full"])
def test_logits_of_several_parts_are_not_kept_for_the_gradient(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    packed = pack([row[:2] for row in ROWS[:2]], [row[2:] for row in ROWS[:2]], 0)
    found: dict[int, list[Tensor]] = {}
    for tokens in (100, 3):
        monkeypatch.setattr(head, "LOGIT_TOKENS", tokens)
        kept: list[int] = []
        roles = Roles(llama, section("ppo"))
        torch.manual_seed(0)
        roles.add("policy", method=method)
        perturb(roles, "policy")
        trunk = roles.trunk(packed)
        keep = partial(_note_width, kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            logprobs_BT, entropy_BT = roles.logprobs(
                trunk, "policy", packed.ids_BT, packed.mask_BT, temperature=0.7, entropy=True
            )
        assert (roles.model.config.vocab_size in kept) == (tokens == 100)
        weights_BT = torch.arange(1.0, 1 + logprobs_BT.numel()).view_as(logprobs_BT)
        ((logprobs_BT - entropy_BT) * weights_BT).sum().backward()
        found[tokens] = [value.grad for value in roles.trainable("policy") if value.grad is not None]
    assert len(found[3]) == len(found[100]) > 4
    for ours, whole in zip(found[3], found[100], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))  # float32


def test_logprobs_pass_gradients_to_kept_tokens_alone(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("sft"))
    roles.add("policy")
    perturb(roles, "policy")
    packed = pack([[7, 20], [12]], [[35], [5, 77, 31]], 0)
    logprobs_BT, _ = roles.logprobs(roles.trunk(packed), "policy", packed.ids_BT, packed.mask_BT, temperature=1.0)
    logprobs_BT[~packed.mask_BT].sum().backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in roles.trainable("policy"))
    logprobs_BT.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in roles.trainable("policy"))


@torch.no_grad()
def test_a_value_is_read_before_its_token(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    roles.add("value", head=True)
    packed = pack([ROWS[1][:4], ROWS[2][:2]], [ROWS[1][4:], ROWS[2][2:]], 0)
    values_BT = roles.values(roles.trunk(packed), "value", packed.mask_BT)
    head = roles.heads["value"]
    first, second = plain(llama, ROWS[1])[0], plain(llama, ROWS[2])[0]
    torch.testing.assert_close(values_BT[0], first[3:8] @ head.weight[0] + head.bias[0], **CLOSE)
    expected = torch.cat([second[1:2] @ head.weight[0] + head.bias[0], torch.zeros(4)])
    torch.testing.assert_close(values_BT[1], expected, **CLOSE)


# ---- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_stays_the_base_through_training(family: Path, section: Callable[..., Any], method: str) -> None:
    roles = Roles(family, section("sft", lora_layers=1))
    roles.add("policy", method=method)
    with torch.no_grad():
        before = roles.hidden(trunk_of(roles), REFERENCE)
        fresh = roles.hidden(trunk_of(roles), "policy")
        bare = Roles(family)
        expected = bare.hidden(trunk_of(bare), REFERENCE)
    assert torch.equal(fresh, before)  # a new role changes nothing yet
    if bare.depth == roles.depth:
        assert torch.equal(before, expected)
    else:
        torch.testing.assert_close(before, expected, **CLOSE)
    optimiser = torch.optim.SGD(roles.trainable("policy"), lr=1e-2)
    weights_D = torch.linspace(-1, 1, 32)  # a plain sum is what the last norm keeps as it is
    for _ in range(3):
        (roles.hidden(trunk_of(roles), "policy") @ weights_D).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        trunk = trunk_of(roles)
        assert not torch.allclose(roles.hidden(trunk, "policy"), before, atol=1e-3)
        assert torch.equal(roles.hidden(trunk, REFERENCE), before)
        logits = roles.language_model(REFERENCE)(input_ids=torch.tensor([ROWS[0]])).logits[0]
        assert torch.equal(logits, load_policy(family)(input_ids=torch.tensor([ROWS[0]])).logits[0])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_role_learns_without_moving_another(llama: Path, section: Callable[..., Any], method: str) -> None:
    roles = Roles(llama, section("sft"))
    for role in ("one", "two"):
        roles.add(role, method=method, head=True)
    ours, theirs = roles.trainable("one"), roles.trainable("two")
    assert not {id(parameter) for parameter in ours} & {id(parameter) for parameter in theirs}
    trunk = trunk_of(roles)
    roles.scores(trunk, "one").sum().backward()
    assert all(parameter.grad is None for parameter in theirs)
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ours)
    before = roles.scores(trunk, "two").detach()
    perturb(roles, "one")
    assert torch.equal(roles.scores(trunk, "two").detach(), before)


def test_a_frozen_role_wants_no_gradient(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    roles.add("reward", head=True)
    roles.frozen("reward")
    assert not roles.scores(trunk_of(roles), "reward").requires_grad
    assert not any(parameter.requires_grad for parameter in roles.parameters())


def test_a_fresh_head_is_drawn_as_the_paper_says(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("reward"))
    weights = []
    for seed in range(40):
        torch.manual_seed(seed)
        roles.add(f"role{seed}", method="full", head=True)
        weights.append(roles.heads[f"role{seed}"].weight.detach().flatten())
        assert roles.heads[f"role{seed}"].bias.tolist() == [0.0]
        assert roles.normalisers[f"role{seed}"] == Normaliser(0.0, 1.0, 1.0)
    drawn = torch.cat(weights)
    # 1,280 draws of N(0, 1/33): four standard errors of their deviation are 8 %, of their mean 0.02
    assert drawn.std().item() == pytest.approx(33**-0.5, rel=0.08)
    assert abs(drawn.mean().item()) < 0.02


@pytest.mark.parametrize("name", ["llama_with_dropout", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dropout_is_off_whatever_is_configured(
    request: pytest.FixtureRequest, section: Callable[..., Any], name: str, method: str
) -> None:
    folder = request.getfixturevalue(name)
    configured = json.loads((folder / "config.json").read_text())
    assert any(configured.get(key) for key in ("attention_dropout", "resid_pdrop"))
    roles = Roles(folder, section("sft"))
    roles.add("policy", method=method, head=True)
    roles.trainable("policy")
    perturb(roles, "policy")
    roles.language_model("policy")
    assert not any(module.training for module in roles.modules())
    for key, value in roles.language_model("policy").config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            assert value == 0.0, key
    first, second = (roles.hidden(trunk_of(roles), "policy") for _ in range(2))
    assert torch.equal(first, second)


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_role_that_is_saved_and_loaded_is_saved_the_same(
    family: Path, section: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    roles = Roles(family, section("reward"))
    roles.add("reward", method=method, head=True)
    perturb(roles, "reward")
    roles.normalisers["reward"] = Normaliser(0.25, 1.5, 2.0)
    roles.save("reward", tmp_path / "one")
    again = Roles(family)  # no section: the saved role says what it is
    again.add("judge", head=True, start=tmp_path / "one")
    again.save("judge", tmp_path / "two")
    same_bytes(tmp_path / "one", tmp_path / "two")
    assert again.normalisers["judge"] == Normaliser(0.25, 1.5, 2.0)
    trunk, other = trunk_of(roles), trunk_of(again)
    assert torch.equal(roles.scores(trunk, "reward"), again.scores(other, "judge"))


def test_a_lora_folder_is_small_and_names_its_base(llama: Path, section: Callable[..., Any], tmp_path: Path) -> None:
    roles = Roles(llama, section("sft"))
    roles.add("policy")
    roles.save("policy", tmp_path / "sft")
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == llama.as_posix()
    assert config["r"] == 4
    assert config["layers_to_transform"] == [2]
    assert sorted(config["target_modules"]) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert all(".layers.2." in name for name in load_file(tmp_path / "sft" / "adapter_model.safetensors"))


@torch.no_grad()
def test_a_chain_of_adapters_merges_to_the_same_model(
    family: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    sft = Roles(family, section("sft"))
    sft.add("policy")
    perturb(sft, "policy", seed=1)
    sft.save("policy", tmp_path / "sft")
    tuned = Roles(tmp_path / "sft", section("ppo"))
    tuned.add("policy")
    perturb(tuned, "policy", seed=2)
    tuned.save("policy", tmp_path / "ppo")
    ids = torch.tensor([ROWS[1]])
    merged = load_policy(tmp_path / "sft")(input_ids=ids).logits
    torch.testing.assert_close(merged, sft.language_model("policy")(input_ids=ids).logits, **CLOSE)
    torch.testing.assert_close(merged, tuned.language_model(REFERENCE)(input_ids=ids).logits, **CLOSE)
    on_top = load_policy(tmp_path / "ppo")(input_ids=ids).logits
    torch.testing.assert_close(on_top, tuned.language_model("policy")(input_ids=ids).logits, **CLOSE)
    assert not torch.allclose(on_top, merged, atol=1e-2)
    assert load_tokenizer(tmp_path / "ppo").get_vocab() == load_tokenizer(family).get_vocab()


@torch.no_grad()
def test_roles_of_both_methods_live_on_one_model(llama: Path, section: Callable[..., Any]) -> None:
    roles = Roles(llama, section("sft"))
    roles.add("small")
    perturb(roles, "small")
    roles.add("large", method="full")  # begins from the base, and not from the adapter that is on it
    trunk = trunk_of(roles)
    assert torch.equal(roles.hidden(trunk, "large"), roles.hidden(trunk, REFERENCE))
    assert not torch.allclose(roles.hidden(trunk, "small"), roles.hidden(trunk, REFERENCE), atol=1e-3)


@pytest.mark.parametrize(
    ("folder", "command"),
    [("artifacts/base", "prepare"), ("artifacts/sft", "sft"), ("artifacts/reward", "reward"), ("artifacts/ppo", "ppo")],
)
def test_a_missing_model_names_the_stage_that_makes_it(folder: str, command: str) -> None:
    expected = rf"{folder} holds no model\. Run `dvc repro {command}`\."
    with pytest.raises(MissingArtifact, match=expected):
        load_policy(f"nowhere/{folder}")
    with pytest.raises(MissingArtifact, match=expected):
        load_tokenizer(f"nowhere/{folder}")


def test_a_missing_role_names_the_stage_that_makes_it(llama: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"artifacts/reward holds no model\. Run `dvc repro reward`\."):
        Roles(llama).add("reward", head=True, start="nowhere/artifacts/reward")


# ---- small things ----------------------------------------------------------------------------------------------------


def test_padding_by_hand() -> None:
    ids_BS, mask_BS = pad_right([[5], [6, 7, 8]], 9)
    assert ids_BS.tolist() == [[5, 9, 9], [6, 7, 8]]
    assert mask_BS.tolist() == [[True, False, False], [True, True, True]]


def test_packing_by_hand() -> None:
    packed = pack([[5], [6, 7, 8]], [[1, 2, 3], [4]], 9)
    assert packed.ids_BS.tolist() == [[5, 1, 2, 3], [6, 7, 8, 4]]
    assert packed.mask_BS.tolist() == [[True] * 4] * 2
    # a position predicts the token after it: from the prompt's last to the response's last but one
    assert packed.predicts_BS.tolist() == [[True, True, True, False], [False, False, True, False]]
    assert packed.ids_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert packed.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    alone = pack([[5], [6, 7]], None, 9)
    assert alone.ids_BS.tolist() == [[5, 9], [6, 7]]
    assert not alone.predicts_BS.any()
    assert alone.ids_BT.shape == alone.mask_BT.shape == (2, 0)


def test_rows_of_a_trunk_by_hand() -> None:
    packed = pack([[5], [6, 7, 8]], [[1], [4]], 9)
    part = Trunk(packed.ids_BS, *packed[:3]).rows(torch.tensor([0]))
    assert [tensor.tolist() for tensor in part[:4]] == [[[5, 1]], [[5, 1]], [[True, True]], [[True, False]]]


def backward(roles: Roles, role: str) -> tuple[list[Tensor], int]:
    """A role's gradients, and how many bytes the forward pass kept for the backward pass beside parameters."""
    packed = pack([[5, 9, 11], [6, 7, 8, 20]], [[1, 2, 3], [4]], 0)
    parameters, kept = roles.trainable(role), 0
    weights = {parameter.data_ptr() for parameter in roles.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs_BT, _ = roles.logprobs(roles.trunk(packed), role, packed.ids_BT, packed.mask_BT, temperature=1.0)
    roles.hidden(roles.trunk(packed), REFERENCE)  # another role comes between
    logprobs_BT.sum().backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None], kept


@pytest.fixture(scope="session")
def opt(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model whose layers look at whether they are in training by themselves, to drop out."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("opt")
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, dropout=0.3, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("lora_layers", [0, 1])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(
    llama: Path, gpt2: Path, opt: Path, section: Callable[..., Any], method: str, lora_layers: int
) -> None:
    for folder in (llama, gpt2, opt):
        found = {}
        for on in (False, True):
            roles = Roles(folder, section("ppo", gradient_checkpointing=on, lora_layers=lora_layers))
            torch.manual_seed(0)
            roles.add("policy", method=method)
            if method == "lora":
                with torch.no_grad():
                    for parameter in roles.trainable("policy"):
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            found[on] = backward(roles, "policy")
            assert not any(module.training for module in roles.modules())  # nothing is left in training
        assert len(found[True][0]) == len(found[False][0]) > 0
        for ours, theirs in zip(found[True][0], found[False][0], strict=True):
            assert torch.equal(ours, theirs)
        assert found[True][1] < 0.8 * found[False][1]


def test_asking_for_the_shared_depth_leaves_the_adapter_that_samples_on(
    llama: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    ids = torch.tensor([ROWS[0]])
    trained = Roles(llama, section("ppo"))
    trained.add("policy")
    perturb(trained, "policy")
    trained.save("policy", tmp_path / "policy")
    roles = Roles(llama)
    roles.add("policy", start=tmp_path / "policy")  # nothing has been asked of it yet, as after a stop
    model = roles.language_model("policy")
    assert roles.depth > 0
    with torch.no_grad():
        expected = trained.language_model("policy")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
