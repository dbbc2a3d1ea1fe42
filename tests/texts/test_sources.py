"""Data sets of the hub: their schemas, their revisions, and what is peculiar to some of them. No hub is asked."""

import json
from types import SimpleNamespace

import pytest
from data_files import ROLES, all_rows, fake_hub

from core.data import SOURCES, DataSpec, divide
from core.errors import UserError


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_without_a_hub_every_source_says_what_to_do(name, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    error = rf"{name} \({SOURCES[name].hub_id}\) cannot be read: .*hf auth login.*--data-file"
    with pytest.raises(UserError, match=error):
        divide(DataSpec(name))


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_reads_its_own_schema(name, monkeypatch, caplog):
    schemas = {
        "medical": ROLES[2][0],
        "finance": ROLES[5][0],
        "cantonese": ROLES[4][0],
        "indonesian": ROLES[0][0],
        "malay": ROLES[0][0],
        "gsm8k": {"question": "a", "answer": "1 + 1\n#### 2"},
        "alpaca": ROLES[2][0],
    }
    record = schemas.get(name, {"text": "t"})
    asked = fake_hub(
        monkeypatch,
        [json.loads(json.dumps(record).replace('"a"', f'"a {n}"').replace('"t"', f'"t {n}"')) for n in range(60)],
    )
    rows = all_rows(name, None, 0, 40)
    source = SOURCES[name]
    assert len(rows) == 40 and asked == [
        (source.hub_id, source.config, source.split, source.revision, source.streaming)
    ]
    assert rows[0].has_roles == ("text" not in record or len(record) > 2)


def test_the_revision_of_a_hub_data_set_is_recorded(monkeypatch):
    """It is the one that the table pins, or the one that was read, or None."""
    pinned = SOURCES["gsm8k"].revision
    records = [{"question": f"q {n}", "answer": "#### 1", "instruction": f"q {n}", "output": "a"} for n in range(60)]
    fake_hub(monkeypatch, records, commit="c" * 40)
    assert [divide(DataSpec(name)).identity([])["revision"] for name in ("gsm8k", "medical")] == [pinned, "c" * 40]
    fake_hub(monkeypatch, records)
    assert divide(DataSpec("medical")).identity([])["revision"] is None
    assert len(pinned) == 40


def test_a_stream_is_read_at_the_hubs_newest_commit_which_is_recorded(monkeypatch):
    """A stream itself does not say from which commit it was read."""
    import huggingface_hub

    newest = SimpleNamespace(sha="d" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: newest)
    asked = fake_hub(monkeypatch, [{"text": f"t {n}"} for n in range(60)])
    assert divide(DataSpec("thai")).identity([])["revision"] == "d" * 40 == asked[0][3]

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert divide(DataSpec("thai")).revision is None and asked[1][3] is None


def test_wikitext_has_no_headings_and_hub_rows_without_text_are_left_out(monkeypatch, caplog):
    caplog.set_level("INFO")
    fake_hub(monkeypatch, [{"text": t} for t in (" = Heading = ", "", *(f" line {n} " for n in range(20)))])
    assert {row.plain for row in all_rows("wikitext")} == {f"line {n}" for n in range(20)}
    fake_hub(monkeypatch, [{"question": f"q {n}", "answer": f"{n}\n#### {n}" if n else " "} for n in range(21)])
    assert len(all_rows("gsm8k")) == 20
    assert "1 rows without a text" in caplog.text


def test_an_answer_of_gsm8k_without_its_number_is_left_out(monkeypatch):
    fake_hub(monkeypatch, [{"question": f"q {n}", "answer": f"{n}\n#### {n}" if n % 2 else "so"} for n in range(20)])
    rows = all_rows("gsm8k")
    assert len(rows) == 10 and all("####" in row.messages[1][1] for row in rows)
