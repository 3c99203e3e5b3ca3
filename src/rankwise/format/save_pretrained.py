"""``model.save_pretrained(...)`` of an adapted transformers model: the habit, and what Trainer calls at a checkpoint.

Without it transformers would write the whole base, and the adapter under names that ``from_pretrained`` drops.
"""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError
from rankwise.placement import holding, is_sharded
from rankwise.sites import SLOT, WHOLE
from rankwise.tensor_files import write_tensors

TRAINED = "model.safetensors"  # transformers' own name for a checkpoint's weights
Save = Callable[[nn.Module, str | Path], None]
_REFUSED = ("push_to_hub", "distributed_checkpoint")


@runtime_checkable
class _SavesItself(Protocol):
    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any: ...


def save_as_adapter(model: nn.Module, save: Save) -> None:
    """Let the model's own ``save_pretrained`` write its adapter, until the last one is taken off.

    Args:
        save: :func:`rankwise.save`.
    """
    root = Adapted.of(model).root
    if isinstance(root, _SavesItself):
        vars(root)["save_pretrained"] = SavePretrained(root, save)


class SavePretrained:
    """An adapted model's ``save_pretrained``; it refers to the model weakly, and a copy of the model has its own."""

    def __init__(self, root: nn.Module, save: Save) -> None:
        self._root, self._save = weakref.ref(root), save

    def __reduce__(self) -> Any:
        return SavePretrained, (self._root(), self._save)

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write the active adapter as :func:`rankwise.save` does, and beside it the exact state that Trainer resumes.

        A merged model is written whole, as transformers does.

        Args:
            state_dict: of the whole model, as Trainer gathers it. What a sharded model's parameters are is taken from
                here, as the other processes wait.
            options: of transformers' method, of use for a merged model only.

        Raises:
            AttachError: several adapters are active, or an option asks for what is not done here.
        """
        root: Any = self._root()
        adapted = Adapted.of(root)
        state = root.state_dict() if state_dict is None else dict(state_dict)
        ours = {key for key in state if not {SLOT, WHOLE}.isdisjoint(key.split("."))}
        if adapted.merged:
            plain = {key: value for key, value in state.items() if key not in ours}
            type(root).save_pretrained(
                root, save_directory, is_main_process=is_main_process, state_dict=plain, **options
            )
            return
        refused = [name for name in _REFUSED if options.get(name)]
        if refused:
            raise AttachError(
                f"save_pretrained({refused[0]}=...): only the adapter of this model is saved, in a directory; expected "
                f"no such option: upload the directory afterwards, or merge the adapter first"
            )
        if is_main_process:
            with holding(root, _unlike(root, state)):
                self._save(root, save_directory)
            write_tensors(Path(save_directory) / TRAINED, {key: state[key] for key in sorted(ours)}, {})


def _unlike(root: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a gathered state, what the parameters here hold a part of (FSDP2), or nothing (ZeRO-3)."""
    parameters = root.named_parameters(remove_duplicate=False)
    return {
        key: state[key]
        for key, parameter in parameters
        if key in state and (is_sharded(parameter) or parameter.shape != state[key].shape)
    }
