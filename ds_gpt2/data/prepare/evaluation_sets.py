"""Prepare published evaluations: download the split that lm-evaluation-harness 0.4.13 uses, and write our own format.

The repositories, splits and texts are those of the task files in its folder ``lm_eval/tasks``: ``lambada_openai``,
``arc_easy``, ``arc_challenge``, ``piqa``, ``winogrande``, ``openbookqa``, ``boolq`` and ``copa`` of SuperGLUE, and
``sciq``, all with no examples before the question. The format is described in ``data/evaluation_files.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import read_small, replace_file, sha256
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES, EVALUATIONS_DIR
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.data.evaluation_files import line_of, to_choice, to_item
from ds_gpt2.data.prepare.formats import PARQUET
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.hub_download import CONVERTED, HubFile, fetch, list_files
from ds_gpt2.data.prepare.parquet import parquet_rows

DIR = PROJECT_DIR / EVALUATIONS_DIR

_MAGIC = b"PAR1"  # at the start of a parquet file

Row = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """Where an evaluation is on the Hugging Face hub, and how a row of it becomes a line of our format."""

    repository: str
    config: str | None  # of the dataset; None: its only one
    split: str
    convert: Callable[[Row], Row]


@dataclass(frozen=True)
class Record:
    """What an evaluation was prepared from; stored beside its file."""

    name: str
    source: str  # repository, or local file
    revision: str | None  # commit of the repository
    files: list[dict[str, str]]  # path and sha256 of each file read
    items: int
    sha256: str  # of the prepared file
    time: str


def _lambada(row: Row) -> Row:
    *context, word = row["text"].split(" ")
    return {"context": " ".join(context), "endings": [word], "label": 0}


def _arc(row: Row) -> Row:
    choices = row["choices"]
    return {
        "context": f"Question: {row['question']}\nAnswer:",
        "endings": choices["text"],
        "label": choices["label"].index(row["answerKey"]),
    }


def _piqa(row: Row) -> Row:
    context = f"Question: {row['goal']}\nAnswer:"
    return {"context": context, "endings": [row["sol1"], row["sol2"]], "label": row["label"]}


def _winogrande(row: Row) -> Row:
    sentence = row["sentence"]
    blank = sentence.index("_")
    return {
        "contexts": [sentence[:blank] + row[option] for option in ("option1", "option2")],
        "ending": sentence[blank + 1 :].strip(),
        "label": {"1": 0, "2": 1}[row["answer"]],
    }


def _openbookqa(row: Row) -> Row:
    choices = row["choices"]
    label = choices["label"].index(row["answerKey"].lstrip())
    return {"context": row["question_stem"], "endings": choices["text"], "label": label}


def _boolq(row: Row) -> Row:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"context": context, "endings": ["no", "yes"], "label": row["label"]}


def _copa(row: Row) -> Row:
    """The period of the premise is replaced by a conjunction. The harness has two spaces before the ending."""
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    endings = [f" {choice[0].lower()}{choice[1:]}" for choice in (row["choice1"], row["choice2"])]
    return {"context": f"{row['premise'].strip()[:-1]} {connector}", "endings": endings, "label": row["label"]}


def _sciq(row: Row) -> Row:
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return {"context": context, "endings": [row[name] for name in names], "label": 3}


PUBLISHED: dict[str, Published] = {
    "arc_challenge": Published("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "arc_easy": Published("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "boolq": Published("aps/super_glue", "boolq", "validation", _boolq),
    "copa": Published("aps/super_glue", "copa", "validation", _copa),
    "lambada": Published("EleutherAI/lambada_openai", "default", "test", _lambada),
    "openbookqa": Published("allenai/openbookqa", "main", "test", _openbookqa),
    "piqa": Published("baber/piqa", None, "validation", _piqa),
    "sciq": Published("allenai/sciq", None, "test", _sciq),
    "winogrande": Published("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
}


def check_names(names: Iterable[str]) -> None:
    """Check that all of ``names`` are published evaluations.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name not in PUBLISHED:
            known = ", ".join(EVALUATION_NAMES)
            raise UserError(
                f"no such evaluation: {name}; known are {known}; a file of your own needs no preparation, see"
                " docs/data.md"
            )


def prepare_evaluation(name: str, out: Path, source: Path | None = None) -> tuple[Path, Record]:
    """Write ``NAME.jsonl`` and its record ``NAME.json`` into ``out``, unless they exist; return its path and record.

    Args:
        source: a local file to convert, even if the result exists: rows of the published dataset as Parquet or JSON
            Lines, or lines in our own format; None: download.

    Raises:
        UserError: there is no such evaluation, or it cannot be read, downloaded or written.
    """
    check_names([name])
    path = out / f"{name}.jsonl"
    if source is None and (known := read_record(path)) is not None:
        return path, known
    if source is not None:
        content, items = _converted(name, [source])
        files = [{"path": source.name, "sha256": sha256(source)}]
        return path, _write(path, content, Record(name, str(source.absolute()), None, files, items, "", ""))
    published = PUBLISHED[name]
    try:
        remote = _files_of(published)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".fetched-") as directory:
            local = [fetch(file, Path(directory)) for file in remote]
            content, items = _converted(name, local)
            files = [{"path": file.path, "sha256": sha256(each)} for file, each in zip(remote, local, strict=True)]
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{error}; a local copy of the dataset can be given with --from FILE") from None
    record = Record(name, published.repository, remote[0].revision, files, items, "", "")
    return path, _write(path, content, record)


def read_record(path: Path) -> Record | None:
    """Return the record of a prepared file; None if there is none, or the file is missing or has changed since."""
    try:
        fields = safe_json.read(path.with_suffix(".json"))
        record = Record(**fields)
        return record if sha256(path) == record.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, content: bytes, record: Record) -> Record:
    digest = hashlib.sha256(content).hexdigest()
    done = Record(**{**asdict(record), "sha256": digest, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
        replace_file(path.with_suffix(".json"), json.dumps(asdict(done), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return done


def _files_of(published: Published) -> list[HubFile]:
    """Return the parquet files of the split: those of the repository, or of the hub's own conversion.

    Raises:
        UserError: there are none, or the hub cannot be reached.
    """
    found = _of_split(list_files(Repository(published.repository), PARQUET), published)
    if not found:
        try:
            converted = list_files(Repository(published.repository, revision=CONVERTED), PARQUET)
        except UserError:
            converted = []
        found = _of_split(converted, published)
    if not found:
        where = f"{published.repository}, {published.config or 'its only config'}"
        raise UserError(f"{where}: no parquet file of the split {published.split}")
    return found


def _of_split(files: Sequence[HubFile], published: Published) -> list[HubFile]:
    """Return the files of the split: ``CONFIG/SPLIT-00000-of-00001.parquet`` or ``CONFIG/SPLIT/0000.parquet``."""
    by_directory: dict[str, list[HubFile]] = {}
    for file in files:
        *directories, name = file.path.split("/")
        of_split = published.split in directories or re.match(rf"{published.split}[-_.]", name)
        if of_split and (published.config is None or published.config in directories):
            by_directory.setdefault("/".join(directories), []).append(file)
    return next(iter(by_directory.values()), [])


def _converted(name: str, sources: Sequence[Path]) -> tuple[bytes, int]:
    """Return the content of the prepared file and the number of its items.

    Raises:
        UserError: a file cannot be read, or a row is not an item of this evaluation.
    """
    lines = []
    for source in sources:
        for number, row in enumerate(_rows(source), start=1):
            where = f"{source.name}, row {number}"
            try:
                line = row if "endings" in row or "ending" in row else PUBLISHED[name].convert(row)
                choice = to_choice(line, name)
                to_item(choice)
            except KeyError as error:
                raise UserError(f"{where}: no field {error} of {name} in {', '.join(map(str, row))[:200]}") from None
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UserError(f"{where}: not an item of {name}: {error}") from None
            lines.append(json.dumps(line_of(choice), ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"{', '.join(source.name for source in sources)}: no items")
    return "".join(lines).encode(), len(lines)


def _rows(source: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet or JSON Lines file.

    Raises:
        UserError: it cannot be read, or a line is not a JSON object.
    """
    try:
        content = read_small(source)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from None
    if content.startswith(_MAGIC):
        yield from parquet_rows(source)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            if (row := safe_json.parse_object(line)) is None:
                raise UserError(f"{source}, line {number}: not a JSON object; give Parquet or JSON Lines")
            yield row
