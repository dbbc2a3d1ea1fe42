"""The data sets of the paper's tasks and of general text: where each is on the hub, and how its rows are read."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import dataset_gsm8k
from core.hub import HUB_TIMEOUT_S
from core.progress import Progress

# A stream is shuffled in a buffer of so many rows.
SHUFFLE_BUFFER = 10_000
# The paper's entropic regularisation of Q (section 5), unless a data set has one of its own.
EPSILON = 0.1
COMMIT = re.compile("hf://datasets/[^@]+@([0-9a-f]{40})/")


@dataclass(frozen=True)
class Source:
    """One data set on the hub.

    Attributes:
        hub_id, config, split: as `datasets.load_dataset` takes them.
        revision: commit of the data set's repository; None for its newest state.
        licence: as the page of the data set states it; None where this table does not say.
        streaming: the data set is too large to download, so the first rows of a seeded shuffle buffer are read.
        rows: function record -> record for what is peculiar to the data set. A record for which it returns None is left
            out.
        epsilon: the paper's entropic regularisation of Q for this data set.
    """

    hub_id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    licence: str | None = None
    streaming: bool = False
    rows: Callable[[dict[str, Any]], dict[str, Any] | None] = dict
    epsilon: float = EPSILON


def _wikitext(record: dict[str, Any]) -> dict[str, Any] | None:
    """A line of WikiText, which has one row per line; None for a heading or a blank line, which are no texts."""
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
    """Read a data set of the hub.

    Returns:
        (at most `limit` rows in a seeded order, the revision that was read). The revision is the one in the table; if
        there is none, the newest on the hub; if the hub does not answer, the one that `datasets` recorded; or None.
    Raises:
        OSError, ValueError, errors of `datasets`: the data set cannot be read.
    """
    import datasets  # imports pandas and pyarrow, which take a second

    datasets.disable_progress_bars()  # in place of which there is one of ours
    source = SOURCES[name]
    revision = source.revision or _newest(source.hub_id)
    options = {"split": source.split, "revision": revision, "streaming": source.streaming}
    found = []
    with Progress(desc=f"reading {source.hub_id}", total=limit, unit="rows") as bar:
        data = datasets.load_dataset(source.hub_id, source.config, **options)
        shuffled = data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if source.streaming else data.shuffle(seed=seed)
        rows = (row for record in shuffled if (row := source.rows(record)) is not None)
        for row in islice(rows, limit):
            found.append(row)
            bar.update()
    return found, revision or _recorded_commit(data)


def _newest(hub_id: str) -> str | None:
    """The newest commit of a data set on the hub, or None when the hub does not answer.

    The hub is asked before the data set is read, because a streamed data set does not say afterwards from which commit
    it was read.
    """
    from huggingface_hub import HfApi  # takes 0.4 s to import, which only data of the hub needs
    from huggingface_hub.errors import HTTPError

    try:
        return HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT_S).sha
    except (HTTPError, OSError):  # if the hub refuses the data set, loading it raises the reason
        return None


def _recorded_commit(data: Any) -> str | None:
    """The commit in the addresses of the files that a data set was read from (hf://datasets/NAME@COMMIT/FILE)."""
    addresses = data.info.download_checksums or {}
    found = {match[1] for address in addresses if (match := COMMIT.match(address))}
    return found.pop() if len(found) == 1 else None
