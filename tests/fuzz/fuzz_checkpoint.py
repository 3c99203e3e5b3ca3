"""Coverage-guided fuzzing of everything that reads an adapter directory: `make fuzz`.

python tests/fuzz/fuzz_checkpoint.py CORPUS [libFuzzer's flags, such as -max_total_time=600]

Each input is a directory (checkpoint_directory.py). Whatever is in it, `inspect` reports and `read_adapter` either
gives an adapter or raises from the error tree. Anything else, more than ten seconds or two gigabytes is a finding: it
is written to the working directory as crash-*, timeout-* or oom-*, and `fuzz_checkpoint.py FILE` runs it again.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["rankwise"]):
    from rankwise.format.peft import read_adapter
    from rankwise.inspection.inspection import inspect
from fuzz.checkpoint_directory import packed, sound_directories, unpack

from rankwise.errors import RankwiseError

_folder = Path(tempfile.mkdtemp(prefix="rankwise-fuzz-"))  # under $TMPDIR; libFuzzer ends without cleaning up


def read(content: bytes) -> None:
    """One input."""
    unpack(content, _folder)
    found = inspect(_folder)
    json.dumps(found.to_dict(), allow_nan=False)
    try:
        read_adapter(_folder)
    except RankwiseError as error:
        str(error).encode()
        if found.peft_type != "RANKWISE_BOTTLENECK":  # which load reads otherwise
            assert found.problems, f"inspect finds nothing wrong, read_adapter says {error}"
    else:
        assert not found.problems, f"read_adapter reads it, inspect says {found.problems}"


def main() -> None:
    """Fuzz, from a corpus whose first inputs are made anew."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-") and not Path(arguments[0]).is_file():
        corpus = Path(arguments[0])
        corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            for folder in sound_directories(Path(scratch)):
                (corpus / folder.name).write_bytes(packed(folder))
        dictionary = corpus.parent / f"{corpus.name}.dict"
        dictionary.write_text("".join(f'"{word}"\n' for word in _WORDS))
        arguments += [f"-dict={dictionary}"]
    atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", *arguments], read)
    atheris.Fuzz()


# Words that the readers look for.
_WORDS = [
    "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_magnitude_vector", ".lora_E",
    ".base_layer.weight", "__metadata__", "dtype", "shape", "data_offsets", "BF16", "F64", "I64", "F8_E4M3", "BOOL",
    "peft_type", "ADALORA", "RANKWISE_BOTTLENECK", "lora_alpha", "init_r", "rank_pattern", "alpha_pattern", "use_dora",
    "use_rslora", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "auto_map", "true",
    "null", "NaN", "-Infinity", "1e999", "9999999999999999999", "[]", "{}", "(a+)+$", "|", ".*", "^",
    "base_probe", "format_version", "sites", "spec", "width", "down.weight", "up.bias",
]  # fmt: skip

if __name__ == "__main__":
    main()
