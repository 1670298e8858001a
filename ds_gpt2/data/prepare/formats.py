"""The format of a text file, by its name; not case-sensitive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ds_gpt2.common.errors import UserError

Form = Literal["text", "jsonl", "parquet"]
FORMS: tuple[Form, ...] = get_args(Form)

_PROSE = (".txt", ".text", ".md", ".markdown", ".rst")
_JSON_LINES = (".jsonl", ".jsonlines", ".ndjson", ".json")
PARQUET = (".parquet",)
_PACKED = (".gz", ".zst")

# Plain text, too, but directories have such files for other reasons: read only if the file itself is given.
_OTHER_TEXT = (
    *(".adoc", ".asciidoc", ".htm", ".html", ".log", ".org", ".raw", ".tex", ".tokens", ".wiki", ".xhtml"),
    *(".c", ".cc", ".cpp", ".cs", ".css", ".cu", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".kt", ".lua", ".php"),
    *(".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts"),
)

_TABLE = "a table: write each row as one JSON object per line"
_ARCHIVE = "an archive: unpack it and name the files or their directory"
_COMPRESSED = "of an unsupported compression: unpack it, or compress it with gzip or zstd"
_OFFICE = "not plain text: save it as .txt"
_TENSORS = "not text"
_SHARD = "a token shard or an array, not text: a directory of shards needs no preparation; set data.dir to it"
_DESCRIPTION = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro"), _TABLE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".lzma", ".z", ".br", ".zstd", ".gzip"), _COMPRESSED),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".ipynb"), _OFFICE),
    **dict.fromkeys((".bin", ".npy"), _SHARD),
    **dict.fromkeys((".npz", ".pt", ".pth", ".pkl", ".pickle", ".safetensors", ".h5", ".db", ".sqlite"), _TENSORS),
}

READABLE = (
    f"plain text ({', '.join(_PROSE)}), JSON lines ({', '.join(_JSON_LINES)}), each also as .gz or .zst,"
    f" and {PARQUET[0]}"
)


@dataclass(frozen=True)
class Format:
    """How a file is read."""

    form: Form
    packing: str  # "", ".gz" or ".zst"


def format_of(path: Path, form: Form | None = None) -> Format:
    """Return the format of a file that the user named.

    Args:
        form: overrides the suffix, but not that of a compression.

    Raises:
        UserError: the suffix is not that of text, or unknown.
    """
    suffix, packing = _suffixes(path.name)
    if form is not None:
        return Format(form, packing)
    found = _form(suffix, (*_PROSE, *_OTHER_TEXT, ""))
    if found is None or (found == "parquet" and packing):
        unknown = f"of unknown format ({suffix}{packing}): if it is plain text, give --format text"
        raise UserError(f"{path} is {_DESCRIPTION.get(suffix, unknown)}. Supported files: {READABLE}")
    return Format(found, packing)


def is_searched(name: str) -> bool:
    """Return whether a file of this name is read if it is found in a directory."""
    suffix, packing = _suffixes(name)
    form = _form(suffix, _PROSE)
    return form is not None and not (form == "parquet" and packing)


def is_plain_json(name: str) -> bool:
    """Return whether a file has the suffix .json, which may be JSON lines or any other JSON."""
    return _suffixes(name)[0] == ".json"


def suffix_of(name: str) -> str:
    """Return the suffix of a name with that of its compression, in lower case; "" if there is none."""
    return "".join(_suffixes(name))


def stem_of(name: str) -> str:
    """Return a name without its suffixes."""
    suffix = suffix_of(name)
    return name[: len(name) - len(suffix)] if suffix else name


def _suffixes(name: str) -> tuple[str, str]:
    """Return (suffix, suffix of the compression). A suffix that starts with a digit (``notes.2024``) does not count."""
    name = name.lower()
    packing = next((each for each in _PACKED if name.endswith(each) and len(name) > len(each)), "")
    suffix = Path(name.removesuffix(packing)).suffix
    return (suffix if re.match(r"\.[^\W\d]", suffix) else ""), packing


def _form(suffix: str, text: tuple[str, ...]) -> Form | None:
    if suffix in text:
        return "text"
    if suffix in _JSON_LINES:
        return "jsonl"
    return "parquet" if suffix in PARQUET else None
