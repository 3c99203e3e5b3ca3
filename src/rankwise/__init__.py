"""rankwise: low-rank training that keeps step with full fine-tuning, on a base that is never touched.

Importing it needs no torch: the names are imported when one of them is first used. No module is called like a function
here, as importing the module would put it in the function's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rankwise.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        public = import_module("rankwise.public")
        if name not in public.__all__:  # which is not there yet while that module is being imported
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals().update({public_name: getattr(public, public_name) for public_name in public.__all__})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module("rankwise.public").__all__})
