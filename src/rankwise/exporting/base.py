"""What the base of an adapter tells an export."""

from typing import Any

from torch import nn

from rankwise.foldable import parameter_owners
from rankwise.inspection.engines.rules import BaseFacts


def base_facts(model: nn.Module) -> BaseFacts:
    """The facts that rules go by, of a model whose weights need not be there (``torch.device("meta")``)."""
    config: Any = getattr(model, "config", None)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    owners = parameter_owners(model)
    return BaseFacts(
        getattr(config, "model_type", ""),
        getattr(config, "num_hidden_layers", 0),
        any(len(owners[id(weight)]) > 1 for weight in embeddings),
    )


def heads(model: nn.Module) -> dict[str, int]:
    """How many heads share the rows of ``q_proj`` and of ``k_proj``."""
    config: Any = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", 1)
    return {"q_proj": queries, "k_proj": getattr(config, "num_key_value_heads", None) or queries}
