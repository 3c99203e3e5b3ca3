"""An adapter in the layout of mlx-lm (``mlx_lm/tuner``): ``adapters.safetensors`` and its ``adapter_config.json``.

<name>.lora_a [in, r], <name>.lora_b [r, out], of DoRA <name>.m [out];    one r and one scale for all
"""

from pathlib import Path

from torch import Tensor

from rankwise.adapter import Adapter
from rankwise.disk import json_bytes
from rankwise.exporting.portable import padded
from rankwise.files import read_json
from rankwise.inspection.engines.architectures import mlx_name
from rankwise.inspection.engines.rules import BaseFacts
from rankwise.tensor_files import tensor_bytes
from rankwise.variants.dora import MAGNITUDE

_TENSORS, _CONFIG = "adapters.safetensors", "adapter_config.json"


def write_mlx(adapter: Adapter, base: BaseFacts, folder: Path) -> None:
    """Write the two files."""
    rank = max(site.delta.rank for site in adapter.sites.values())
    tensors: dict[str, Tensor] = {}
    keys = {path: mlx_name(base.model_type, path) for path in adapter.sites}
    for path, site in adapter.sites.items():
        delta = padded(site.delta, rank)
        tensors |= {f"{keys[path]}.lora_a": delta.A.T, f"{keys[path]}.lora_b": delta.B.T}
        if MAGNITUDE in site.extra:
            tensors[f"{keys[path]}.m"] = site.extra[MAGNITUDE].flatten()
    dora = any(MAGNITUDE in site.extra for site in adapter.sites.values())
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": adapter.base_model,
        "num_layers": base.layers,
        # Whole names, so that only the layers with tensors of their own get pairs.
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys.values())},
    }
    (folder / _TENSORS).write_bytes(tensor_bytes(folder / _TENSORS, tensors))
    (folder / _CONFIG).write_bytes(json_bytes(config))


def state_rope_theta(folder: Path) -> None:
    """Say in a checkpoint's ``config.json`` what mlx-lm reads of its rotary embeddings.

    transformers 5 writes ``rope_parameters``, which most of mlx-lm's models do not read: they fall back to a base of
    their own, 10,000 for a llama, without a word.
    """
    path = folder / "config.json"
    config = read_json(path)
    rope = config.get("rope_parameters") or {}
    stated = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        stated["rope_scaling"] = rope
    path.write_bytes(json_bytes({**stated, **config}))
