"""Which engines read an adapter right, and what export does for the others. An engine is a file and a line here."""

from rankwise.inspection.engines.llama_cpp import LLAMA_CPP
from rankwise.inspection.engines.mlx import MLX
from rankwise.inspection.engines.ollama import OLLAMA
from rankwise.inspection.engines.peft import PEFT
from rankwise.inspection.engines.rules import Case, Engine
from rankwise.inspection.engines.sglang import SGLANG
from rankwise.inspection.engines.vllm import VLLM
from rankwise.inspection.facts import Finding, Remedy, Verdict

ENGINES: dict[str, Engine] = {engine.label.lower(): engine for engine in (PEFT, VLLM, SGLANG, LLAMA_CPP, OLLAMA, MLX)}

# What an export does about a finding.
REMEDIES: dict[Remedy, str] = {
    "fold": "folds scales into B, pads to one rank, alpha = rank",
    "rewrite": "writes the engine's own format",
    "base": "writes it anew, with the base's help",
    "nearest": "writes a merged checkpoint, or the nearest LoRA of a rank",
    "merge": "writes a merged checkpoint",
    "none": "writes nothing: rankwise alone reads it",
}


def verdict(engine: Engine, case: Case) -> Verdict:
    """Whether an engine reads an adapter right as it stands."""
    findings = engine.findings(case)
    if not findings:
        return Verdict(engine.label, "yes", engine.note(case))
    gravest = findings[0]
    lost = any(finding.remedy in ("nearest", "merge", "none") for finding in findings)
    return Verdict(engine.label, "no" if lost else "after export", described(gravest), findings)


def described(finding: Finding) -> str:
    """A finding in a line: "modules_to_save is refused: …; export writes a merged checkpoint"."""
    first, count = finding.sites[0], len(finding.sites)
    place = "" if first == "the adapter" else f" ({first}{f' and {count - 1} more' if count > 1 else ''})"
    return f"{finding.effect} {finding.about}{place}: {finding.why}; export {REMEDIES[finding.remedy]}"


def verdicts(case: Case) -> tuple[Verdict, ...]:
    """Every engine's."""
    return (Verdict("rankwise", "yes", ""), *(verdict(engine, case) for engine in ENGINES.values()))
