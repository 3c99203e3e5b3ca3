"""Work for the machines of a Ray cluster. Which machine does what, and when, is Ray's to decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from rankwise.errors import RecipeError

P = ParamSpec("P")
T = TypeVar("T")

LOCAL = "local"
RETRIES = 5  # of a task whose worker was killed


class Cluster:
    """A Ray cluster that this process is connected to.

    Attributes:
        workers: how many tasks it can do at once: one a GPU, or one a CPU where it has no GPU.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        has = ray.cluster_resources()
        self._resource = "num_gpus" if has.get("GPU") else "num_cpus"
        self.workers = max(1, int(has.get("GPU") or has.get("CPU", 1)))

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Hand a call to a worker, again if that is killed. Returns what waits for its result.

        What the call raises is raised by the wait.
        """
        task = self._ray.remote(**{self._resource: 1, "max_retries": RETRIES})(function).remote(*args, **kwargs)
        return lambda: self._ray.get(task)


@contextmanager
def cluster(address: str) -> Iterator[Cluster]:
    """Connect to a cluster for a while.

    Args:
        address: Ray's, such as ``auto`` or ``ray://head:10001``; ``local``: workers on this machine alone.

    Raises:
        RecipeError: Ray is not installed, or there is no cluster at this address.
    """
    try:
        import ray
    except ImportError:
        raise RecipeError("--ray needs Ray, which is not here. Run: pip install 'rankwise[ray]'") from None
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RecipeError(f"--ray {address}: expected a Ray cluster there, found: {error}") from None
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()
