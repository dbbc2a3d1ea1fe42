"""What the tests of data share: files of rows, all rows of a data set, a hub that holds given rows."""

import json

from core.data import DataSpec, divide


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


def all_rows(*data):
    """The rows of all parts of the data set that `DataSpec(*data)` names."""
    return [row for rows in divide(DataSpec(*data)).parts.values() for row in rows]


def fake_hub(monkeypatch, records, commit=None):
    """`datasets.load_dataset` with a data set of these records; returns what was asked for.

    With a commit, the data set knows the addresses of the files it was made of, as one that was downloaded does.
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
