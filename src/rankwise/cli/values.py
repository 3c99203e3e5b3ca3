"""`rankwise squeeze`, `combine`, `extract`, `convert` and `export`: from directories to another directory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

import rankwise as rw
from rankwise.algebra import Approximation
from rankwise.disk import whole_directory
from rankwise.errors import CheckpointError, SpecError
from rankwise.exporting.export import Export, Order, check_new
from rankwise.train.data.labels import read_labels, save_labels
from rankwise.train.yaml_text import parse_yaml


def save_squeezed(adapter: Path, out: Path, **how_few: Any) -> Approximation:
    """Squeeze the adapter in one directory into another.

    Raises:
        CheckpointError: ``out`` holds files. What ``rankwise.read`` and ``squeeze`` raise; nothing is written then.
    """
    check_new(out)
    squeezed: Approximation = rw.algebra.squeeze(rw.read(adapter), **how_few)
    _save(squeezed, out, read_labels(adapter))
    return squeezed


def save_combined(
    adapters: Sequence[Path], weights: Sequence[float], base: str | None, out: Path, method: str, **limits: Any
) -> Approximation:
    """Combine the adapters in some directories into one in another.

    Args:
        weights: one for each adapter; none: 1 for each.
        base: the base model, which is loaded where an adapter asks for it; default: the one that the first names.
        method: a name, or a mapping in YAML.

    Raises:
        CheckpointError: ``out`` holds files, or the adapters are classifiers for different labels.
        SpecError: not as many weights as adapters. What ``rankwise.read`` and ``combine`` raise; nothing is written
            then.
    """
    check_new(out)
    if weights and len(weights) != len(adapters):
        raise SpecError(f"--weight: expected one for each of the {len(adapters)} adapters, found {len(weights)}")
    parts = list(zip(map(rw.read, adapters), weights or [1.0] * len(adapters), strict=True))
    weighed = _base(adapters[0], base) if _needs_base(parts) else None
    combined: Approximation = rw.algebra.combine(parts, _method(method), base=weighed, **limits)
    _save(combined, out, _common_labels(adapters))
    return combined


def save_extracted(fine_tuned: str, base: str, out: Path, **options: Any) -> Approximation:
    """Write the LoRA that is nearest to what fine-tuning changed; both models are read from files, tensor by tensor.

    Raises:
        CheckpointError: ``out`` holds files. PretrainedError: a model is not there. What ``extract`` raises; nothing is
            written then.
    """
    from rankwise.train.model.skeleton import locate_files, skeleton  # with transformers

    check_new(out)
    files = locate_files(base)
    extracted: Approximation = rw.algebra.extract(locate_files(fine_tuned), files, layout=skeleton(files), **options)
    named = replace(extracted, adapter=replace(extracted.adapter, base_model=base))
    _save(named, out, None)
    return named


def save_converted(adapter: Path, base: str | None, out: Path, **limits: Any) -> Approximation:
    """Write the LoRA that is nearest to what an adapter of any of PEFT's kinds does to its base.

    Raises:
        CheckpointError: ``out`` holds files. What ``convert`` raises; nothing is written then.
    """
    from rankwise.train.model.merged import base_of

    check_new(out)
    converted: Approximation = rw.algebra.convert(adapter, _base(adapter, base), **limits)
    named = replace(converted, adapter=replace(converted.adapter, base_model=base or base_of(adapter)))
    _save(named, out, read_labels(adapter))
    return named


def save_export(adapter: Path, engine: str, base: str | None, out: Path | None, **limits: Any) -> Export:
    """Write an adapter as an engine reads it right. The base is loaded where that needs it: whole, or without weights.

    Args:
        base: the base model; default: the one that the adapter names.
        out: default: the adapter's directory's name with the engine's after it.

    Raises:
        CheckpointError: ``out`` holds files. PretrainedError: the base is not there. What ``export`` raises; nothing is
            written then.
    """
    target = adapter.with_name(f"{adapter.resolve().name}-{engine}") if out is None else out
    check_new(target)
    order = Order.of(adapter, engine, **limits)
    layout = skeleton_of(adapter, base) if order.needs_layers else None
    if not order.needs_weights(layout):
        return order.write(target, layout)
    from rankwise.train.model.merged import load_base  # with transformers

    return order.write(target, *load_base(adapter, base))


def skeleton_of(adapter: Path, base: str | None) -> Any:
    """The base model without its weights; default: the one that the adapter names."""
    from rankwise.train.model.merged import base_of
    from rankwise.train.model.skeleton import locate_files, skeleton

    return skeleton(locate_files(base or base_of(adapter)))


def _method(text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--method: expected a name or a mapping in YAML, found {text!r} ({error})") from None


def _needs_base(parts: Sequence[tuple[Any, float]]) -> bool:
    """DoRA's change depends on the base's weight; so does a mean of whole modules whose weights are not all of it."""
    turned = any(adapter.spec.variant.marks for adapter, _ in parts)
    whole = [weight for adapter, weight in parts if adapter.saved]
    return turned or (bool(whole) and not math.isclose(math.fsum(whole), 1.0))


def _base(adapter: Path, base: str | None) -> Any:
    from rankwise.train.model.merged import load_base  # with transformers

    return load_base(adapter, base)[0]


def _common_labels(adapters: Sequence[Path]) -> list[str] | None:
    first, *others = [read_labels(adapter) for adapter in adapters]
    if any(other != first for other in others):
        raise CheckpointError(
            f"{adapters[0]}: a classifier's labels are {first}, another's {others}; expected adapters of one task"
        )
    return first


def _save(approximation: Approximation, out: Path, labels: list[str] | None) -> None:
    with whole_directory(out) as directory:
        rw.write(approximation.adapter, directory)
        if labels is not None:
            save_labels(directory, labels)


def value_table(title: str, approximation: Approximation, out: Path) -> Table:
    """What was kept, what was lost, and where the adapter lies."""
    ranks = sorted(site.delta.rank for site in approximation.adapter.sites.values())
    errors = approximation.errors
    worst = max(errors, key=lambda path: errors[path])
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("ranks", f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}, at {len(ranks)} layers")
    table.add_row("numbers", f"{approximation.parameters:,}")
    table.add_row("change lost", f"{approximation.error:.2%}; {errors[worst]:.2%} at the worst layer, {worst}")
    for layers, sizes in _by_kind(approximation.left_out).items():
        count = f" ({len(sizes)} layers)" if sizes[1:] else ""
        table.add_row("left out", f"{layers}{count}, a change of {math.hypot(*sizes):.3g}")
    table.add_row("adapter", str(out))
    return table


def _by_kind(left_out: Mapping[str, float]) -> dict[str, list[float]]:
    """Names that differ in the number of their layer only, as one, with the sizes of all."""
    kinds: dict[str, list[float]] = {}
    for name, size in left_out.items():
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(size)
    return kinds
