"""The data sets of the paper's tasks and of general text, by name: where each is, and how its rows become messages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

# Rows held while a stream is shuffled.
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Source:
    """One data set on the hub.

    Attributes:
        hub_id, config, split: as `datasets.load_dataset` takes them.
        licence: as its page states it; None where this table does not know: see the page.
        streaming: too large to download; the first rows of a seeded shuffle buffer are read.
        columns: column of the data set -> role column of `core.data`, where the names differ.
        rows: what else is peculiar: record -> record, or None to leave it out.
    """

    hub_id: str
    config: str | None = None
    split: str = "train"
    licence: str | None = None
    streaming: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    rows: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None


def _wikitext(record: dict[str, Any]) -> dict[str, Any] | None:
    """WikiText has one row per line: headings and blank lines are no texts."""
    text = record["text"].strip()
    return None if not text or text.startswith("=") else {"text": text}


SOURCES = {
    "medical": Source("Shekswess/medical_llama3_instruct_dataset"),
    "finance": Source("Josephgflowers/Finance-Instruct-500k", streaming=True),
    "thai": Source("ChavyvAkvar/fineweb-2-1M-Sample-Thai", streaming=True),
    "cantonese": Source("stvlynn/Cantonese-Dialogue"),
    "cantonese_wikipedia": Source("jed351/cantonese-wikipedia"),
    "indonesian": Source("izzulgod/indonesian-conversation"),
    "malay": Source("mesolitica/Malaysian-SFT", split="google_translate_camel_ai", streaming=True),
    "gsm8k": Source("openai/gsm8k", "main", licence="mit"),
    "wikitext": Source("Salesforce/wikitext", "wikitext-103-raw-v1", licence="cc-by-sa-3.0, gfdl", rows=_wikitext),
    "alpaca": Source("tatsu-lab/alpaca", licence="cc-by-nc-4.0"),
    **{f"c4_{language}": Source("allenai/c4", language, licence="odc-by", streaming=True)
       for language in ("en", "id", "ms", "th", "zh")},
}  # fmt: skip


def read_source(name: str, limit: int, seed: int) -> list[dict[str, Any]]:
    """At most `limit` rows of a data set in a seeded order, its columns renamed to those of `core.data`.

    Raises:
        OSError, ValueError, datasets' own errors: it cannot be had.
    """
    import datasets

    source = SOURCES[name]
    data = datasets.load_dataset(source.hub_id, source.config, split=source.split, streaming=source.streaming)
    shuffled = data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if source.streaming else data.shuffle(seed=seed)
    return list(islice(_rows(shuffled, source), limit))


def _rows(records: Iterable[dict[str, Any]], source: Source) -> Iterable[dict[str, Any]]:
    names = dict(source.columns)
    for record in records:
        row: dict[str, Any] | None = {names.get(column, column): value for column, value in record.items()}
        if source.rows is not None and row is not None:
            row = source.rows(row)
        if row is not None:
            yield row
