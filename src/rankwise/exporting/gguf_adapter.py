"""An adapter as a GGUF file, as llama.cpp reads it (``src/llama-adapter.cpp``).

general.type = "adapter", adapter.type = "lora", adapter.lora.alpha
<name>.weight.lora_a [r, in], <name>.weight.lora_b [out, r];    s = alpha / r of each tensor
token_embd.weight.lora_a [vocab, r], lora_b [dim, r]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapter import Adapter, SiteAdapter
from rankwise.inspection.engines.architectures import ARCHITECTURES, gguf_names, gguf_package
from rankwise.inspection.engines.rules import BaseFacts
from rankwise.shapes import Float

ADAPTER_FILE = "adapter.gguf"


def write_gguf(adapter: Adapter, base: BaseFacts, heads: dict[str, int], path: Path) -> None:
    """Write the file. Scales are folded into B, so that one alpha is right for all ranks.

    Args:
        heads: "q_proj" and "k_proj" → how many heads share the rows of such a layer.
        path: the file, which must not be there yet.
    """
    gguf = gguf_package()
    architecture = ARCHITECTURES[base.model_type]
    alpha = max(site.delta.rank for site in adapter.sites.values())
    names = gguf_names(base)
    writer = gguf.GGUFWriter(path, architecture.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for site_path, site in adapter.sites.items():
        rotated = heads.get(site_path.rpartition(".")[2]) if architecture.rotated else None
        for suffix, tensor in _pair(site, alpha, rotated):
            writer.add_tensor(f"{names.get_name(site_path)}.weight.{suffix}", _array(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pair(site: SiteAdapter, alpha: int, heads: int | None) -> Iterator[tuple[str, Tensor]]:
    A, B = site.delta.A, site.delta.B * (site.delta.scale * site.delta.rank / alpha)
    yield "lora_a", A.T if site.kind == "embedding" else A
    yield "lora_b", B if heads is None else interleaved(B, heads)


def interleaved(rows: Float[Tensor, "out r"], heads: int) -> Float[Tensor, "out r"]:
    """Each head's rows 0 … d/2, d/2 … d as 0, d/2, 1, d/2 + 1, …: GGUF's llamas rotate neighbours, not halves.

    >>> import torch
    >>> interleaved(torch.arange(8.0)[:, None], heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _array(tensor: Tensor) -> Any:
    return tensor.float().contiguous().numpy()
