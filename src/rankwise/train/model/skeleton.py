"""A model's files, and its layers without their weights, for checkpoints that are read tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedModel

from rankwise.errors import PretrainedError
from rankwise.train.model.pretrained import BUILT_IN, locate


def locate_files(name_or_path: str | Path) -> Path:
    """The directory with a model's safetensors and configuration.

    Raises:
        PretrainedError: there is none under that name.
    """
    source = locate(name_or_path)
    if isinstance(source, Path):
        return source
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"{name_or_path}: expected a built-in model ({', '.join(BUILT_IN)}), a transformers directory, or a hub "
            f"name that is reachable or cached; the hub's client found: {error}"
        ) from error


def skeleton(directory: Path) -> PreTrainedModel:
    """The model that a directory's configuration describes, on the meta device.

    Raises:
        PretrainedError: the configuration names no class of transformers.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{directory}: expected a transformers directory; transformers found: {error}") from error
    architecture = (config.architectures or ["none"])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise PretrainedError(f"{directory}: its architecture is {architecture}; expected a class of transformers")
    with torch.device("meta"):
        model: PreTrainedModel = cls(config)
    model.tie_weights()
    return model
