"""params.yaml is checked when it is loaded: each mistake is named with its key as typed."""

import copy
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from rlhf_core.config import (
    DPO,
    PPO,
    SFT,
    Constitution,
    Evaluate,
    Gate,
    Judge,
    Params,
    People,
    Preferences,
    Prepare,
    Reward,
    check_params,
    load_params,
)
from rlhf_core.errors import ConfigError, MissingArtifact

PROJECT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "prepare": Prepare,
    "sft": SFT,
    "reward": Reward,
    "ppo": PPO,
    "dpo": DPO,
    "evaluate": Evaluate,
    "people": People,
    "judge": Judge,
    "preferences": Preferences,
    "gate": Gate,
    "constitution": Constitution,
}
KEYS = [(name, key) for name, kind in SECTIONS.items() for key in kind.model_fields]


@pytest.fixture
def raw() -> dict[str, Any]:
    """The project's own values, to be spoilt."""
    return yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))


def changed(raw: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
    return {**raw, name: {**raw[name], **values}}


def test_the_projects_own_values_are_valid_and_complete(raw: dict[str, Any]) -> None:
    params = load_params(PROJECT / "params.yaml")
    assert params == check_params(raw)
    assert {name: set(raw[name]) for name in SECTIONS} == {
        name: set(kind.model_fields) for name, kind in SECTIONS.items()
    }
    assert set(Params.model_fields) == {"launcher", *SECTIONS}


@pytest.mark.parametrize(
    ("section", "typed", "nearest"),
    [
        ("ppo", "kl_coeff", "ppo.kl_coef"),
        ("ppo", "lamb", "ppo.lam"),
        ("sft", "learning_rat", "sft.learning_rate"),
        ("reward", "centre_coef", "reward.center_coef"),
        ("prepare", "on_bad_rows", "prepare.on_bad_row"),
        ("evaluate", "bootstrap", "evaluate.bootstrap_samples"),
    ],
)
def test_an_unknown_key_names_the_nearest(raw: dict[str, Any], section: str, typed: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_params(changed(raw, section, **{typed: 1}))
    assert str(error.value) == f"params.yaml: unknown key {section}.{typed}; did you mean {nearest}?"


def test_an_unknown_section_names_the_nearest(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key rewards; did you mean reward\?"):
        check_params({**raw, "rewards": {}})


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_missing_key_is_named(raw: dict[str, Any], section: str, key: str) -> None:
    spoilt = copy.deepcopy(raw)
    del spoilt[section][key]
    with pytest.raises(ConfigError, match=rf"^params.yaml: {section}\.{key} is missing; every key has its value"):
        check_params(spoilt)


@pytest.mark.parametrize("section", [*SECTIONS, "launcher"])
def test_a_missing_section_is_named(raw: dict[str, Any], section: str) -> None:
    del raw[section]
    with pytest.raises(ConfigError, match=f"^params.yaml: {section} is missing"):
        check_params(raw)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("prepare", "base", "smollm2"),
        ("prepare", "base", "hub:"),
        ("prepare", "max_prompts", -1),
        ("prepare", "on_bad_row", "skip"),
        ("prepare", "max_prompt_tokens", 7),
        ("prepare", "max_response_tokens", 3),
        ("prepare", "validation_fraction", -0.1),
        ("prepare", "validation_fraction", 1.0),
        ("prepare", "test_fraction", 0),
        ("prepare", "test_fraction", 1),
        ("prepare", "gold_fraction", 0),
        ("prepare", "gold_fraction", 1),
        ("sft", "seed", -1),
        ("sft", "method", "qlora"),
        ("sft", "lora_rank", 0),
        ("sft", "lora_alpha", 0),
        ("sft", "lora_layers", -1),
        ("sft", "micro_batch_size", 0),
        ("sft", "batch_size", 0),
        ("sft", "epochs", 0),
        ("sft", "epochs", 1.5),
        ("sft", "learning_rate", 0),
        ("sft", "learning_rate", float("nan")),
        ("sft", "learning_rate", float("inf")),
        ("sft", "schedule", "step"),
        ("sft", "weight_decay", -0.1),
        ("sft", "max_grad_norm", 0),
        ("sft", "warmup_fraction", 1),
        ("sft", "warmup_fraction", -0.1),
        ("reward", "loss", "listwise"),
        ("reward", "label_smoothing", -0.1),
        ("reward", "label_smoothing", 0.5),
        ("reward", "margin_coef", -1),
        ("reward", "center_coef", -1),
        ("reward", "norm_samples", 1),
        ("evaluate", "best_of_n", [1]),
        ("evaluate", "best_of_n", [4, 2]),
        ("evaluate", "best_of_n", [2, 2]),
        ("dpo", "epochs", -1),
        ("dpo", "beta", 0),
        ("dpo", "label_smoothing", 0.5),
        ("reward", "members", 0),
        ("ppo", "updates", 0),
        ("ppo", "rollouts", 1),
        ("ppo", "samples_per_prompt", 0),
        ("ppo", "response_tokens", 1),
        ("ppo", "temperature", 0),
        ("ppo", "epochs", 0),
        ("ppo", "minibatch_size", 0),
        ("ppo", "value_learning_rate", 0),
        ("ppo", "value_network", "none"),
        ("ppo", "value_coef", 0),
        ("ppo", "warmup_updates", -1),
        ("ppo", "value_warmup_updates", -1),
        ("ppo", "kl_controller", "none"),
        ("ppo", "kl_coef", -0.1),
        ("ppo", "kl_target", 0),
        ("ppo", "kl_horizon", 0),
        ("ppo", "clip_range", 0),
        ("ppo", "value_clip_range", 0),
        ("ppo", "gamma", 1.01),
        ("ppo", "lam", -0.01),
        ("ppo", "score_clip", 0),
        ("ppo", "spread_coef", -0.1),
        ("ppo", "missing_eos_penalty", -1),
        ("ppo", "objective", "pareto"),
        ("ppo", "lambda_init", 0),
        ("ppo", "lambda_min", 0),
        ("ppo", "lambda_max", 0),
        ("ppo", "lambda_learning_rate", 0),
        ("ppo", "cost_memory", 0),
        ("ppo", "early_stop_kl", 0),
        ("evaluate", "temperature", 0),
        ("evaluate", "response_tokens", 1),
        ("evaluate", "bootstrap_samples", 99),
        ("evaluate", "report_prompts", 0),
        ("people", "policies", ["ppo", "ppo"]),
        ("people", "bootstrap_samples", 99),
        ("evaluate", "samples_per_prompt", 0),
        ("judge", "kind", "person"),
        ("judge", "model", ""),
        ("judge", "bar", 1.1),
        ("judge", "bar", -0.1),
        ("judge", "check_pairs", 0),
        ("judge", "temperature", -1),
        ("judge", "answer_tokens", 15),
        ("judge", "concurrency", 0),
        ("judge", "requests_per_minute", -1),
        ("judge", "timeout", 0),
        ("judge", "retries", -1),
        ("judge", "prompt_price", -1),
        ("judge", "answer_price", -1),
        ("judge", "max_cost", 0),
        ("preferences", "choose", "best"),
        ("preferences", "responses", 1),
        ("preferences", "responses", 10),
        ("gate", "judge", "anybody"),
        ("constitution", "critic", "endpoint"),
        ("constitution", "annotator", ""),
        ("constitution", "rounds", 0),
        ("ppo", "reward", "model"),
        ("preferences", "annotator", "robot"),
        ("gate", "max_kl", 0),
        ("gate", "min_safety_win_rate", 1.1),
        ("gate", "min_predicted", 1),
    ],
)
def test_an_impossible_value_is_named_with_its_key(raw: dict[str, Any], section: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        check_params(changed(raw, section, **{key: value}))
    assert str(error.value).startswith(f"params.yaml: {section}.{key} = {value!r}: ")


def test_every_mistake_is_told_at_once(raw: dict[str, Any]) -> None:
    spoilt = changed(changed(raw, "sft", epochs=0), "ppo", kl_coeff=1)
    with pytest.raises(ConfigError, match=r"(?s)sft\.epochs = 0: .*\nunknown key ppo\.kl_coeff"):
        check_params(spoilt)


def test_a_number_written_without_a_point_is_a_number(raw: dict[str, Any]) -> None:
    # YAML 1.1 reads 5e-4, without a point, as a text
    assert yaml.safe_load("5e-4") == "5e-4"
    assert check_params(changed(raw, "sft", learning_rate="5e-4")).sft.learning_rate == 5e-4


@pytest.mark.parametrize("source", ["hub:org/name", "hub:org/name@", "hub:@v1", "hub:name:test@v1"])
@pytest.mark.parametrize("key", ["base", "demonstrations", "rankings", "prompts"])
def test_a_source_of_the_hub_has_to_name_its_revision(raw: dict[str, Any], key: str, source: str) -> None:
    def named(source: str) -> Any:
        return source if key == "base" else [*raw["prepare"][key], source]

    with pytest.raises(ConfigError, match=rf"prepare\.{key} = .*{source} names no revision, .* hub:NAME@REVISION"):
        check_params(changed(raw, "prepare", **{key: named(source)}))
    assert check_params(changed(raw, "prepare", **{key: named("hub:org/name@v1")}))


def test_fractions_have_to_leave_a_training_split(raw: dict[str, Any]) -> None:
    fractions = {"validation_fraction": 0.3, "test_fraction": 0.3, "gold_fraction": 0.4}
    with pytest.raises(ConfigError, match="fractions add up to 1, so train would be empty"):
        check_params(changed(raw, "prepare", **fractions))
    check_params(changed(raw, "prepare", **{**fractions, "gold_fraction": 0.39}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollouts": 32, "samples_per_prompt": 3}, "rollouts 32 is no multiple of samples_per_prompt 3"),
        (
            {"rollouts": 32, "minibatch_size": 12, "micro_batch_size": 12},
            "rollouts 32 is no multiple of minibatch_size 12",
        ),
        ({"minibatch_size": 16, "micro_batch_size": 5}, "minibatch_size 16 is no multiple of micro_batch_size 5"),
        ({"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_coef 0 stays 0 with kl_controller adaptive"),
        ({"kl_controller": "adaptive", "kl_horizon": 31}, "kl_horizon 31 is below rollouts 32"),
        ({"kl_estimator": "k3"}, "kl_estimator k3 is for kl_penalty loss; in the reward the KL is k1"),
        ({"dual_clip": 1.0}, "dual_clip 1 would cut off where the ratio is 1; use 0, or above 1"),
        ({"updates": 4, "value_warmup_updates": 4}, "value_warmup_updates 4 leaves none of 4 updates"),
    ],
)
def test_ppo_values_have_to_fit_each_other(raw: dict[str, Any], values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_params(changed(raw, "ppo", **values))


@pytest.mark.parametrize(("key", "value"), [("label_smoothing", 0.1), ("margin_coef", 0.5)])
def test_what_works_on_pairs_is_refused_with_another_loss(raw: dict[str, Any], key: str, value: float) -> None:
    with pytest.raises(
        ConfigError, match=f"^params.yaml: reward: .*{key} {value} needs loss pairs: loss plackett_luce"
    ):
        check_params(changed(raw, "reward", loss="plackett_luce", **{key: value}))
    check_params(changed(raw, "reward", **{key: value}))
    check_params(changed(raw, "reward", loss="plackett_luce"))


@pytest.mark.parametrize("weight", [-0.5, 11])
def test_a_sources_weight_has_to_make_sense(raw: dict[str, Any], weight: float) -> None:
    with pytest.raises(ConfigError, match=rf"weights\.human {weight:g} is not between 0 and 10"):
        check_params(changed(raw, "reward", weights={"human": weight}))
    check_params(changed(raw, "reward", weights={"human": 2, "ai": 0.5, "starter": 0}))


def test_sections_are_frozen(raw: dict[str, Any]) -> None:
    params = check_params(raw)
    for name in SECTIONS:
        key = next(iter(SECTIONS[name].model_fields))
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(getattr(params, name), key, 1)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        params.launcher = "other"


@pytest.mark.parametrize(("section", "key"), [*KEYS, ("params", "launcher")])
def test_every_field_says_what_it_means(section: str, key: str) -> None:
    field = {**SECTIONS, "params": Params}[section].model_fields[key]
    assert field.description
    assert len(field.description.split()) >= 4


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_no_field_has_a_value_of_its_own(section: str, key: str) -> None:
    assert SECTIONS[section].model_fields[key].is_required()


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"Found no .*params\.yaml in .*\. Run this in the project's folder\."):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft: [1, 2", "is not valid YAML"),
        ("", "holds a NoneType; expected sections launcher, prepare, sft, reward, ppo, dpo, evaluate"),
        ("- 1", "holds a list; expected sections"),
    ],
)
def test_what_is_no_mapping_of_sections_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_params(path)


def test_the_error_is_also_the_builtin_that_a_caller_would_catch(raw: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown key"):
        check_params({**raw, "x": 1})


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "url '' is no address"),
        ("127.0.0.1:8080", "is no address"),
        ("ftp://127.0.0.1/v1", "is no address"),
        ("http://127.0.0.1:80a/v1", "url 'http://127.0.0.1:80a/v1' is no address"),
        ("http://127.0.0.1:99999/v1", "is no address"),
        ("http://[::1/v1", "is no address"),
        ("https://me:sk-secret@judge.example:80a/v1", "keys belong into the variable RLHF_JUDGE_KEY alone"),
        ("https://me:sk-secret@judge.example/v1", "keys belong into the variable RLHF_JUDGE_KEY alone"),
        ("https://judge.example/v1?key=sk-secret", "keys belong into the variable RLHF_JUDGE_KEY alone"),
    ],
)
def test_an_endpoint_has_an_address_and_no_key(raw: dict[str, Any], url: str, why: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_params(changed(raw, "judge", kind="endpoint", url=url))
    assert why in str(error.value)
    assert "sk-secret" not in str(error.value)
    for url in ("http://127.0.0.1:8080/v1", "https://judge.example/@group/v1"):
        assert check_params(changed(raw, "judge", kind="endpoint", url=url)).judge.axes == ()


def test_an_address_without_an_endpoint_is_a_mistake(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="url http://a is for kind endpoint; kind rule asks no server"):
        check_params(changed(raw, "judge", kind="rule", url="http://a"))


def test_an_axis_is_named_once(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"reward: .*axes kind, true, kind name one twice"):
        check_params(changed(raw, "reward", axes=["kind", "true", "kind"]))
    assert check_params(changed(raw, "reward", axes=["kind", "true"])).reward.axes == ("kind", "true")


def test_policies_that_are_compared_have_to_be_trained(raw: dict[str, Any]) -> None:
    spoilt = changed(changed(raw, "people", policies=["dpo", "sft"]), "dpo", epochs=0)
    with pytest.raises(ConfigError, match=r"people\.policies names dpo, and dpo\.epochs 0 trains none"):
        check_params(spoilt)
    assert check_params(changed(spoilt, "dpo", epochs=1)).people.policies == ("dpo", "sft")


def test_a_spread_needs_several_members(raw: dict[str, Any]) -> None:
    spoilt = changed(raw, "ppo", spread_coef=0.5)
    with pytest.raises(ConfigError, match=r"ppo\.spread_coef 0\.5 needs reward\.members above 1"):
        check_params(spoilt)
    assert check_params(changed(spoilt, "reward", members=2)).ppo.spread_coef == 0.5


IN_ORDER = {"objective": "lexicographic", "axis_order": ["true", "kind"], "thresholds": {"true": 0.5}}
LIMITED = {"objective": "constrained", "cost_axis": "kind"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"axis_weights": {"kind": 1}}, "axis_weights {kind: 1} has no effect with objective score"),
        ({"cost_axis": "kind"}, "cost_axis kind has no effect with objective score"),
        ({"objective": "weighted"}, "axis_weights is empty, and objective weighted needs it"),
        ({**IN_ORDER, "axis_weights": {"kind": 1}}, "axis_weights {kind: 1} has no effect"),
        ({"objective": "lexicographic"}, "axis_order is empty, and objective lexicographic needs it"),
        ({**IN_ORDER, "axis_order": ["kind"]}, "axis_order [kind]: expected two axes or more, each once"),
        ({**IN_ORDER, "axis_order": ["kind", "kind"]}, "axis_order [kind, kind]: expected two axes or more"),
        ({**IN_ORDER, "thresholds": {"kind": 1}}, "thresholds {kind: 1}: expected one each of true"),
        ({**IN_ORDER, "thresholds": {"true": -5}}, "thresholds.true -5 is not above -score_clip -5"),
        ({**IN_ORDER, "thresholds": {"true": 5.5}}, "thresholds.true 5.5 is above score_clip 5, so that no axis"),
        ({**IN_ORDER, "spread_coef": 0.1}, "spread_coef 0.1 has no meaning with objective lexicographic"),
        ({**LIMITED, "reward": "judge"}, "reward judge gives one number, and objective constrained needs axes"),
        ({"objective": "constrained"}, "cost_axis is empty, and objective constrained needs it"),
        ({**LIMITED, "lambda_init": 30}, "lambda_init 30 is not between lambda_min 0.05 and lambda_max 20"),
        ({**LIMITED, "lambda_min": 2}, "lambda_init 1 is not between lambda_min 2 and lambda_max 20"),
        ({**LIMITED, "whiten_rewards": True}, "whiten_rewards true with objective constrained would scale the KL"),
    ],
)
def test_an_objective_gets_what_it_needs_and_nothing_else(
    raw: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    raw = changed(changed(raw, "reward", axes=["kind", "true"], members=2), "ppo", score_clip=5.0)
    with pytest.raises(ConfigError) as error:
        check_params(changed(raw, "ppo", **changes))
    assert why in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        IN_ORDER,
        LIMITED,
        {**LIMITED, "axis_weights": {"true": 1}},
        {"objective": "weighted", "axis_weights": {"true": 2}},
    ],
)
def test_an_objectives_axes_are_among_the_reward_models(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    found = check_params(changed(changed(raw, "reward", axes=["kind", "true"]), "ppo", **changes)).ppo
    assert set(found.axes) <= {"kind", "true"}
    key = next(key for key in ("axis_weights", "axis_order", "cost_axis") if key in changes)
    with pytest.raises(ConfigError, match=rf"ppo\.({key}|cost_axis) names '\w+'; expected one of reward\.axes: other"):
        check_params(changed(changed(raw, "reward", axes=["other"]), "ppo", **changes))
