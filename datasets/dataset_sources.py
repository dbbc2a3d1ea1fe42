"""The data sets of the paper's tasks and of general text, by name: where each is, and how its rows become messages."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import dataset_gsm8k
from core.hub import HUB_TIMEOUT_S

# Rows held while a stream is shuffled.
SHUFFLE_BUFFER = 10_000
# The paper's entropic regularisation of Q (section 5), where a data set has none of its own.
EPSILON = 0.1
COMMIT = re.compile("hf://datasets/[^@]+@([0-9a-f]{40})/")


@dataclass(frozen=True)
class Source:
    """One data set on the hub.

    Attributes:
        hub_id, config, split, revision: as `datasets.load_dataset` takes them. Where the revision, a commit of the
            data set's repository, is None, the newest state is read.
        licence: as its page states it; None where this table does not know: see the page.
        streaming: too large to download; the first rows of a seeded shuffle buffer are read.
        columns: column of the data set -> role column of `core.data`, where the names differ.
        rows: what else is peculiar: record -> record, or None to leave it out.
        epsilon: the paper's entropic regularisation of Q for it.
    """

    hub_id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    licence: str | None = None
    streaming: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    rows: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    epsilon: float = EPSILON


def _wikitext(record: dict[str, Any]) -> dict[str, Any] | None:
    """WikiText has one row per line: headings and blank lines are no texts."""
    text = record["text"].strip()
    return None if not text or text.startswith("=") else {"text": text}


def _c4(language: str) -> Source:
    """One language of C4."""
    revision = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    return Source("allenai/c4", language, revision=revision, licence="odc-by", streaming=True)


SOURCES = {
    "medical": Source("Shekswess/medical_llama3_instruct_dataset"),
    "finance": Source("Josephgflowers/Finance-Instruct-500k", streaming=True),
    "thai": Source("ChavyvAkvar/fineweb-2-1M-Sample-Thai", streaming=True),
    "cantonese": Source("stvlynn/Cantonese-Dialogue"),
    "cantonese_wikipedia": Source("jed351/cantonese-wikipedia"),
    "indonesian": Source("izzulgod/indonesian-conversation"),
    "malay": Source("mesolitica/Malaysian-SFT", split="google_translate_camel_ai", streaming=True),
    "gsm8k": Source(
        "openai/gsm8k",
        "main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        licence="mit",
        rows=dataset_gsm8k.question_and_answer,
        epsilon=dataset_gsm8k.EPSILON,
    ),
    "wikitext": Source(
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        licence="cc-by-sa-3.0, gfdl",
        rows=_wikitext,
    ),
    "alpaca": Source("tatsu-lab/alpaca", revision="dce01c9b08f87459cf36a430d809084718273017", licence="cc-by-nc-4.0"),
    **{f"c4_{language}": _c4(language) for language in ("en", "id", "ms", "th", "zh")},
}


def read_source(name: str, limit: int, seed: int) -> tuple[list[dict[str, Any]], str | None]:
    """At most `limit` rows of a data set in a seeded order, its columns renamed to those of `core.data`; and the
    revision that was read: the table's, else the hub's newest, else the one that `datasets` recorded, else None.

    Raises:
        OSError, ValueError, datasets' own errors: it cannot be had.
    """
    import datasets

    source = SOURCES[name]
    revision = source.revision or _newest(source.hub_id)
    options = {"split": source.split, "revision": revision, "streaming": source.streaming}
    data = datasets.load_dataset(source.hub_id, source.config, **options)
    shuffled = data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if source.streaming else data.shuffle(seed=seed)
    return list(islice(_rows(shuffled, source), limit)), revision or _resolved(data)


def _newest(hub_id: str) -> str | None:
    """The newest commit of a data set on the hub; None where the hub cannot be asked.

    It is asked for before reading because a streamed data set does not tell afterwards which commit it was read from.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT_S).sha
    except (HTTPError, OSError):  # a reason to refuse (gated, unknown) is told when the data set is loaded
        return None


def _resolved(data: Any) -> str | None:
    """The commit in the addresses of the files that a data set was made of (hf://datasets/NAME@COMMIT/FILE)."""
    addresses = data.info.download_checksums or {}
    found = {match[1] for address in addresses if (match := COMMIT.match(address))}
    return found.pop() if len(found) == 1 else None


def _rows(records: Iterable[dict[str, Any]], source: Source) -> Iterable[dict[str, Any]]:
    names = dict(source.columns)
    for record in records:
        row: dict[str, Any] | None = {names.get(column, column): value for column, value in record.items()}
        if source.rows is not None and row is not None:
            row = source.rows(row)
        if row is not None:
            yield row
