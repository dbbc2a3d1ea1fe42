"""Helpers for tests of data: files of rows, records with their messages, and a hub that holds given rows."""

import json

from core.data import DataSpec, divide

# (record, its messages) for every set of columns that data sets use.
ROLES = [
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        (("system", "s"), ("user", "q"), ("assistant", "a")),
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        (("user", "q"), ("assistant", "a")),
    ),
    ({"instruction": "q", "input": "i", "output": "a", "text": "all of it"}, (("user", "q\n\ni"), ("assistant", "a"))),
    ({"instruction": "q", "input": "", "output": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"instruction": "q", "output": "a", "system": "s"}, (("system", "s"), ("user", "q"), ("assistant", "a"))),
    ({"system": "", "user": "q", "assistant": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"question": "q", "answer": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"text": "t", "label": "x"}, ((None, "t"),)),
]


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


def all_rows(*data):
    """The rows of all parts of the data set that `DataSpec(*data)` names."""
    return [row for rows in divide(DataSpec(*data)).parts.values() for row in rows]


def fake_hub(monkeypatch, records, commit=None):
    """Make `datasets.load_dataset` give a data set of these records, and return the list of what it is asked for.

    With a commit, the data set records the addresses of its files, as a downloaded data set does.
    """
    import datasets

    asked = []
    real = datasets.load_dataset

    def load(hub_id, config=None, split=None, revision=None, streaming=False, **local):
        if local:
            return real(hub_id, split=split, **local)
        asked.append((hub_id, config, split, revision, streaming))
        files = {f"hf://datasets/{hub_id}@{commit}/data/{n}.parquet": {"num_bytes": 1} for n in range(2)}
        data = datasets.Dataset.from_list(records)
        data.info.download_checksums = files if commit else None
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked
