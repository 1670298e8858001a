"""Files of items with several endings, one JSON object per line: read, check and tokenize them.

A line has a context and its possible endings, ``{"context": ..., "endings": [...], "label": 0}``, or several contexts
that are followed by the same ending, ``{"contexts": [...], "ending": ..., "label": 0}``. ``label`` is the index of the
correct one. A space joins context and ending.

Text is tokenized as lm-evaluation-harness 0.4.13 does (``TemplateLM._encode_pair`` in ``lm_eval/api/model.py``):
trailing white space of the context belongs to the ending, the ending's tokens are those of the whole text after the
context's, and an empty context becomes <|endoftext|>. With several contexts, the log-likelihood of the common ending is
compared ("partial evaluation", Trinh and Le 2018, arXiv 1806.02847).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import read_small
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES
from ds_gpt2.data import tokenizer
from ds_gpt2.data.items import Item, ItemList

LAST_WORD = "lambada"  # the evaluation whose items have one ending, the word to predict
# The measures that lm-evaluation-harness 0.4.13 reports for each evaluation (``metric_list`` in its task files).
MEASURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(EVALUATION_NAMES, ("acc", "acc_norm")),
    **dict.fromkeys(("boolq", "copa", "winogrande"), ("acc",)),
    LAST_WORD: ("acc", "perplexity"),
}
OWN_MEASURES = ("acc", "acc_norm")  # of a file of the user

_FORMAT = 1  # of the cache; to be increased when the tokens or the arrays change
_MOST_ENDINGS = 100


@dataclass(frozen=True)
class Choice:
    """One line of a file: either one context or one ending for each possible answer."""

    contexts: list[str]
    endings: list[str]
    label: int  # index of the correct answer


def line_of(choice: Choice) -> dict[str, Any]:
    """Return the fields of a line, in our format."""
    if len(choice.contexts) > 1:
        return {"contexts": choice.contexts, "ending": choice.endings[0], "label": choice.label}
    return {"context": choice.contexts[0], "endings": choice.endings, "label": choice.label}


def measures_of(name: str) -> tuple[str, ...]:
    """Return the measures of an evaluation by its name."""
    return MEASURES.get(name, OWN_MEASURES)


def load_items(path: Path, name: str, cache_dir: Path | None = None) -> ItemList:
    """Return all items of a file, in its order.

    The tokens are cached beside the file or, if that is not possible, in ``cache_dir``, under a name with the hash of
    the file. A damaged cache is written again; if none can be written, there is none. A cache beside the file replaces
    those of earlier contents.

    Args:
        name: of the evaluation; the items of ``LAST_WORD`` have one ending.

    Raises:
        UserError: the file cannot be read or has no items, or a line is not a valid item.
    """
    content = _read(path, name)
    kind = "word" if name == LAST_WORD else "choice"
    digest = hashlib.sha256(content).hexdigest()
    cache_name = f".{path.stem[:50]}_{kind}_{tokenizer.NAME}_v{_FORMAT}_{digest}.npz"
    caches = [directory / cache_name for directory in (path.parent, cache_dir) if directory is not None]
    for cache in caches:
        if (items := ItemList.read(cache)) is not None and len(items):
            return items
    items = ItemList(_items(content, path, name))
    if not len(items):
        raise UserError(f"{path} has no items: {_how_to_get(path, name)}")
    written = next((cache for cache in caches if items.write(cache)), None)  # in the first writable directory
    if written is not None and written.parent == path.parent:
        _delete_older(written)
    return items


def _delete_older(cache: Path) -> None:
    """Delete the caches beside ``cache`` of the same file with other content or of another format."""
    beginning = cache.name.rpartition("_v")[0]
    for other in cache.parent.iterdir():
        if other != cache and re.fullmatch(re.escape(beginning) + r"_v[0-9]+_[0-9a-f]{64}\.npz", other.name):
            with contextlib.suppress(OSError):
                other.unlink()


def count_items(path: Path, name: str) -> int:
    """Return the number of items of a file, without tokens and without writing a cache.

    Raises:
        UserError: see ``load_items``.
    """
    count = sum(1 for _ in read_choices(_read(path, name), str(path), name))
    if not count:
        raise UserError(f"{path} has no items: {_how_to_get(path, name)}")
    return count


def _read(path: Path, name: str) -> bytes:
    try:
        return read_small(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {_how_to_get(path, name)}") from None


def _items(content: bytes, path: Path, name: str) -> Iterator[Item]:
    for choice, where in read_choices(content, str(path), name):
        try:
            yield to_item(choice)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


def read_choices(content: bytes, where: str, name: str) -> Iterator[tuple[Choice, str]]:
    """Yield the lines of a file, each with the text ``where, line NUMBER``; empty lines are skipped.

    Args:
        where: the file, for errors.
        name: of the evaluation.

    Raises:
        UserError: a line is not a valid item.
    """
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            at = f"{where}, line {number}"
            try:
                line.decode()  # JSON may also be UTF-16, which this split into lines has cut
                yield to_choice(safe_json.parse(line), name), at
            except UnicodeDecodeError:
                raise UserError(f"{at}: not UTF-8; convert the file") from None
            except safe_json.BadJsonError:
                raise UserError(f"{at}: not JSON; a line is one item, see docs/data.md") from None
            except ValueError as error:
                raise UserError(f"{at}: {error}; see docs/data.md") from None


def to_item(choice: Choice) -> Item:
    """Tokenize a line. The beginning that several contexts have in common becomes the item's context.

    Raises:
        ValueError: an ending has no tokens.
    """
    contexts, endings = choice.contexts, choice.endings
    count = max(len(contexts), len(endings))
    pairs = [_encode(contexts[number % len(contexts)], endings[number % len(endings)]) for number in range(count)]
    starts = [start for start, _ in pairs]
    shared = _common_length(starts)
    unscored = np.array([len(start) - shared for start in starts], np.int32)
    if not all(ending for _, ending in pairs):
        raise ValueError("an ending has no tokens")
    texts = [endings[number % len(endings)] for number in range(count)]
    return Item(
        context=np.array(starts[0][:shared], np.uint16),
        endings=[np.array([*start[shared:], *ending], np.uint16) for start, ending in pairs],
        label=choice.label,
        characters=np.array([len(text) for text in texts], np.int32),
        bytes=np.array([len(text.encode()) for text in texts], np.int32),
        unscored=unscored if unscored.any() else None,
    )


def _encode(context: str, ending: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of the ending that follows it."""
    encode = tokenizer.gpt2().encode_ordinary
    start = encode(context.rstrip())
    rest = encode(f"{context} {ending}")[len(start) :]
    return start or [tokenizer.END_OF_TEXT], rest


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens at the start that all ``rows`` have in common."""
    shortest = min(map(len, rows))
    return next((at for at in range(shortest) if len({row[at] for row in rows}) > 1), shortest)


def to_choice(fields: Any, name: str) -> Choice:
    """Return a parsed line of the evaluation ``name``. In a file of the user, no ending is blank.

    Raises:
        ValueError: it is not a valid item.
    """
    if not isinstance(fields, dict):
        raise ValueError('not an object with "context", "endings" and "label"')
    if "contexts" in fields or "ending" in fields:
        if "context" in fields or "endings" in fields:
            raise ValueError('give "context" and "endings", or "contexts" and "ending", not both')
        contexts, endings = _texts(fields, "contexts"), [_text(fields, "ending")]
        count, several = len(contexts), "contexts"
    else:
        contexts, endings = [_text(fields, "context")], _texts(fields, "endings")
        count, several = len(endings), "endings"
    last_word = name == LAST_WORD
    if name not in EVALUATION_NAMES and not all(ending.strip() for ending in endings):
        raise ValueError("an ending is empty")
    if last_word and (count != 1 or several != "endings"):
        raise ValueError(f'"endings" are {count}, not one word')
    if not last_word and not 2 <= count <= _MOST_ENDINGS:
        raise ValueError(f'"{several}" are {count}, not 2 to {_MOST_ENDINGS} texts')
    label = fields.get("label")
    if type(label) is not int or not 0 <= label < count:
        raise ValueError(f'"label" is not a whole number from 0 to {count - 1}')
    return Choice(contexts, endings, label)


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    values = fields.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f'"{name}" is not a list of texts')
    return [_text({name: value}, name) for value in values]


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f'no text in "{name}"')
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ValueError(f'"{name}" cannot be encoded as UTF-8') from None
    return value


def _how_to_get(path: Path, name: str) -> str:
    if name in EVALUATION_NAMES:
        return f"`./launch.sh prepare evaluation {name}` downloads it"
    return f"check evaluations.{name}.path; the format is in docs/data.md"
