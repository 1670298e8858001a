"""Published datasets by name: their repositories on the Hugging Face hub, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLES = ("10BT", "100BT", "350BT")


@dataclass(frozen=True)
class Repository:
    """A dataset on the Hugging Face hub, or a directory of it."""

    name: str
    path: str = ""  # directory, relative to its root
    revision: str = "main"


def fineweb_edu(sample: str) -> Repository:
    """Return the repository of a sample of FineWeb-Edu (Lozhkov et al. 2024). The column is ``text``.

    The 10BT sample, ``sample/10BT/000_00000.parquet`` to ``013_00000.parquet``, has 28.5 GB and 9,953,989,344 tokens of
    GPT-2's tokenizer (the shards of kjj0/finewebedu10B-gpt2: 99 of 100 M, including validation, and one of 53,989,344).
    """
    return Repository("HuggingFaceFW/fineweb-edu", f"sample/{sample}")


def fineweb(sample: str) -> Repository:
    """Return the repository of a sample of FineWeb (Penedo et al. 2024, arXiv 2406.17557); see ``fineweb_edu``."""
    return Repository("HuggingFaceFW/fineweb", f"sample/{sample}")


# Gokaslan and Cohen 2019: 8,013,769 documents, 9.04 B tokens (nanoGPT's data/openwebtext/readme.md).
OPENWEBTEXT = Repository("Skylion007/openwebtext")

# Shards with llm.c's header and 100 M tokens: one ``*_val_000000.bin``, then ``*_train_000001.bin`` and so on. They are
# downloaded by modded-nanogpt's data/cached_*.py and llm.c's dev/data/edu_fineweb.sh, too.
TOKENS = {
    "fineweb10B": Repository("kjj0/fineweb10B-gpt2"),
    "fineweb100B": Repository("kjj0/fineweb100B-gpt2"),
    "fineweb-edu10B": Repository("kjj0/finewebedu10B-gpt2"),
    "fineweb-edu100B": Repository("karpathy/fineweb-edu-100B-gpt2-token-shards"),
}
