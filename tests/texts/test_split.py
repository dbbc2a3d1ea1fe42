"""The split: parts that do not change, groups of rows that share texts, near duplicates across parts."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from conftest import WORDS, sentences
from data_files import all_rows, fake_hub, write

from core.data import DataSpec, divide, export_rows, load_rows
from core.errors import UserError
from core.texts.near_duplicates import near_duplicates
from core.texts.rows import Row
from core.texts.split import SHARES, group_names, part_of, seeded_order

LONG = "A passage that is long enough to be told apart from a phrase that texts share by chance. " * 3


def asked(question, answer="a", system=None):
    first = () if system is None else (("system", system),)
    return Row((*first, ("user", question), ("assistant", answer)))


def groups(*rows):
    """The groups as sets of row numbers, among enough other rows that nothing is shared by too many."""
    others = [Row(((None, f"other {n}"),)) for n in range(1000)]
    names, _ = group_names([*rows, *others], [None] * (len(rows) + len(others)))
    assert len(set(names[len(rows) :])) == len(others)
    found = {}
    for number, name in enumerate(names[: len(rows)]):
        found.setdefault(name, set()).add(number)
    return sorted(map(sorted, found.values()))


def parts_of(path, seed=0):
    return {row.plain: part for part, rows in divide(DataSpec("file", path, seed)).parts.items() for row in rows}


def test_a_part_follows_from_seed_and_group_alone():
    """The known values must never change, or the texts of earlier runs would change their parts."""
    expected = ["calibration", "calibration", "held_out", "calibration", "validation", "sft"]
    assert [part_of(name, 0) for name in "abcdef"] == expected
    counts = Counter(part_of(f"group {n}", 3) for n in range(20_000))
    for part, share in SHARES.items():
        assert counts[part] / 20_000 == pytest.approx(share, abs=0.015)
    assert sum(SHARES.values()) == pytest.approx(1) and SHARES["validation"] == 0.15


def test_no_row_changes_its_part_when_data_grows(tmp_path):
    texts = sentences(400, 5)
    before = parts_of(write(tmp_path / "few.jsonl", [{"text": text} for text in texts[:200]]))
    for more in (texts[:201], texts[::-1]):  # one row more; twice as many in another order
        after = parts_of(write(tmp_path / "many.jsonl", [{"text": text} for text in more]))
        assert {text: after[text] for text in before} == before and len(after) == len(more)
    assert parts_of(str(tmp_path / "few.jsonl"), seed=1) != before


def test_a_group_keeps_its_name_when_a_row_joins_it(tmp_path):
    """As when somebody asks one question more about a passage."""
    rows = [{"instruction": f"question {n}?", "input": f"{n // 3} {LONG}", "output": "a"} for n in range(240)]
    few = {row.messages: row.group for row in all_rows("file", write(tmp_path / "a.jsonl", rows[::3]))}
    many = {row.messages: row.group for row in all_rows("file", write(tmp_path / "b.jsonl", rows))}
    assert {messages: many[messages] for messages in few} == few and len(set(many.values())) == 80


def test_rows_are_chosen_so_that_many_groups_take_part():
    rows = [Row(((None, f"{n} of {group}"),), group) for group, n in (("a", 50), ("b", 3), ("c", 1)) for n in range(n)]
    ordered = seeded_order(rows, "sft", 0)
    assert [len({row.group for row in ordered[start:stop]}) for start, stop in ((0, 3), (3, 5), (5, 7))] == [3, 2, 2]
    assert Counter(ordered) == Counter(rows) and ordered == seeded_order(rows[::-1], "sft", 0)
    assert ordered != seeded_order(rows, "sft", 1) != seeded_order(rows, "held_out", 1)
    without = seeded_order([row for row in rows if row.group != "b"], "sft", 0)
    assert without == [row for row in ordered if row.group != "b"]


def test_fewer_rows_are_the_first_of_more(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(100)])
    few, many = (load_rows(DataSpec("file", path), "calibration", n) for n in (10, 30))
    assert few == many[:10] and len(many) == 30


def test_texts_questions_and_passages_make_groups():
    same = (
        "The  Cat\tsat",
        "the cat SAT",
        "the \uff43\uff41\uff54 sat",
    )  # equal up to case, white space and full width
    assert groups(*(Row(((None, text),)) for text in (*same, "the cat ran"))) == [[0, 1, 2], [3]]
    assert groups(asked("Who?", "she"), asked("who?", "he"), asked("Whom?", "she")) == [[0, 1], [2]]
    for passage in (LONG, LONG.replace(" ", "\n", 9).replace("\n", " \n")):
        before, after = asked(f"Why?\n\n{passage}"), asked(f"{passage}\nWhen was it?")
        plain = Row(((None, f"A heading\n\n{passage}\n\nand an end"),))
        assert groups(before, after, asked("Why?\n\nanother"), plain) == [[0, 1, 3], [2]]
    lines = "\n".join(f"short line {n}" for n in range(30))  # like a table, in which no line is long
    assert groups(asked(f"How many?\n\n{lines}"), asked(f"How few?\n\n{lines}")) == [[0, 1]]
    assert groups(asked("one"), asked(f"two {LONG}"), asked("three")) == [[0], [1], [2]]


def test_rows_are_joined_through_others():
    first, second = LONG, LONG.upper().replace("A", "E")
    assert groups(asked(f"1\n\n{first}"), asked(f"2\n\n{second}"), asked("3")) == [[0], [1], [2]]
    assert groups(asked(f"1\n\n{first}"), asked(f"2\n\n{second}"), asked(f"{first}\n\n{second}")) == [[0, 1, 2]]


def test_system_prompts_answers_and_what_many_rows_share_make_no_groups():
    assert groups(asked("one", LONG), asked("two", LONG)) == [[0], [1]]
    assert groups(asked("one", system=LONG), asked("two", system=LONG)) == [[0], [1]]
    few, many = ([asked(f"{n}\n\n{LONG}") for n in range(count)] for count in (20, 21))  # of 1020 and 1021 rows
    assert len(groups(*few)) == 1 and len(groups(*many)) == 21
    template = [asked("Say something.", f"answer {n}") for n in range(40)]  # a whole file with one prompt
    assert len(set(group_names(template, [None] * 40)[0])) == 40
    passages = [asked(f"{n}\n\n{n // 8}{LONG}") for n in range(40)]  # eight questions on each of five passages
    assert len(set(group_names(passages, [None] * 40)[0])) == 5


def test_a_column_names_the_groups(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"text": text, "document": n % 20, "group": "one"} for n, text in enumerate(sentences(200, 6))]
    path = write(tmp_path / "t.jsonl", rows)
    found = {row.group for row in all_rows("file", path, 0, 1000, "document")}
    assert found == {str(n) for n in range(20)}
    assert "20 groups of 200 rows, 200 of the rows named by the column document" in caplog.text
    assert {row.group for row in all_rows("file", path)} == {"one"}
    with pytest.raises(UserError, match=r"no column 'doc' \(--group-column\); it has text, document, group"):
        divide(DataSpec("file", path, group_column="doc"))


def test_a_blank_group_is_none_and_a_number_has_one_name(tmp_path, caplog):
    rows = [{"text": f"text {n}", "group": blank} for n, blank in enumerate(("", "  ", None))]
    assert len({row.group for row in all_rows("file", write(tmp_path / "blank.jsonl", rows))}) == 3
    lines = [f"text {n},{n % 4}" for n in range(40)]
    found = []
    for name, more in (("full", []), ("gap", ["one more text,"])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,group", *lines, *more]) + "\n")
        found.append({row.plain: row.group for row in all_rows("file", str(tmp_path / f"{name}.csv"))})
    assert set(found[0].values()) == set("0123") and found[1].items() > found[0].items()
    assert found[1]["one more text"].startswith("text ")
    assert "1 of 41 rows have no group in the column group, so all rows" in caplog.text


def test_rows_without_a_group_join_the_rows_that_have_one():
    rows = [asked(f"{n}?\n\n{passage}") for n, passage in enumerate((LONG, LONG, f"1{LONG}", f"2{LONG}"))]
    assert group_names(rows, ["b", None, "b", None])[0][:3] == ["b"] * 3
    assert group_names(rows, ["b", "a", None, None])[0][:2] == ["a", "a"]
    assert group_names(rows, ["b", "a", "b", "c"]) == (["b", "a", "b", "c"], None)
    many = [asked(f"{n}?") for n in range(40)]
    assert set(group_names(many, ["all"] * 39 + [None])[0][:39]) == {"all"}


def test_of_two_groups_of_one_row_the_smallest_name_stays_whatever_the_order(tmp_path):
    rows = [{"text": "twice", "group": name} for name in ("b", "", "a")]
    for number, order in enumerate((rows, rows[::-1])):
        (row,) = all_rows("file", write(tmp_path / f"{number}.jsonl", order))
        assert row.group == "a"


def test_small_and_empty_parts_are_reported(tmp_path, caplog):
    path = write(tmp_path / "one.jsonl", [{"text": f"text {n}", "group": "b"} for n in range(30)])
    division = divide(DataSpec("file", path))
    only = part_of("b", 0)
    assert len(division.rows(only, 99)) == 30
    for part in SHARES.keys() - {only}:
        error = f"30 texts in 1 groups, none of them in the {part} part; take another --split-seed, more texts,"
        with pytest.raises(UserError, match=rf"{error} or finer groups \(--group-column\), and run all stages again"):
            division.rows(part, 1)
    small = next(f"name {n}" for n in range(99) if part_of(f"name {n}", 0) == "validation")
    rows = [{"text": f"text {n}", "group": "b" if n else small} for n in range(30)]
    assert len(load_rows(DataSpec("file", write(tmp_path / "two.jsonl", rows)), "validation", 9)) == 1
    assert "3 % of them in the validation part instead of 15 %; take another --split-seed" in caplog.text


def test_near_duplicates_are_not_taken_for_a_small_part(tmp_path, caplog):
    """The error must not propose another seed, which would not help: the texts share what no column names."""
    text = " ".join(random.Random(0).choices(WORDS, k=200))
    rows = [{"text": f"{text} {n}", "group": "c" if n < 4 else "a"} for n in range(9)]
    division = divide(DataSpec("file", write(tmp_path / "t.jsonl", rows)))
    assert len(division.parts["held_out"]) == 4
    with pytest.raises(UserError, match=r"every held-out text is a near duplicate .* share in a column \(--group-col"):
        division.rows("held_out", 9)
    assert "in the held_out part instead" not in caplog.text and "to keep more, name what the texts" in caplog.text


def test_near_duplicates_are_found_whatever_the_script():
    rng = random.Random(0)
    thai = [chr(0x0E01 + n) for n in range(46)]
    words = [Row(((None, " ".join(rng.choices(WORDS, k=60))),)) for _ in range(30)]
    characters = [Row(((None, "".join(rng.choices(thai, k=90))),)) for _ in range(30)]
    for texts, end in ((words, " and"), (characters, "ก")):
        original = texts[3].plain
        close, far = Row(((None, original + end),)), Row(((None, original[: len(original) // 2] + end * 40),))
        assert near_duplicates([close, far, texts[0]], texts[2:]) == [close]
    assert near_duplicates([asked("yes"), Row(((None, "!"),))], [asked("no")]) == []


def test_a_template_makes_no_near_duplicates():
    template = " ".join(random.Random(0).choices(WORDS, k=150))  # most of each text
    rows = [
        Row((("system", template * 3), ("user", f"{template} {' '.join(text.split()[1:])}"), ("assistant", f"{n}")))
        for n, text in enumerate(sentences(60, 8))
    ]
    assert near_duplicates(rows[:20], rows[20:]) == []
    again = replace(rows[30], messages=(*rows[30].messages[:2], ("assistant", "another")))
    assert near_duplicates([*rows[:20], again], rows[20:]) == [again]


def test_near_duplicates_are_left_out_of_the_held_out_part_and_logged(tmp_path, caplog):
    texts = [" ".join([*text.split(), *WORDS[n % 9 :: 2]]) for n, text in enumerate(sentences(200, 7))]
    division = divide(DataSpec("file", write(tmp_path / "a.jsonl", [{"text": text} for text in texts])))
    assert division.near_duplicates["left_out"] == 0
    trained = {row.plain for part in ("calibration", "sft", "validation") for row in division.rows(part, 999)}
    twins = [f"{text} again" for text in texts]
    grown = divide(DataSpec("file", write(tmp_path / "b.jsonl", [{"text": text} for text in texts + twins])))
    kept = {row.plain for row in grown.rows("held_out", 999)}
    every = {row.plain for row in grown.parts["held_out"]}
    lost = {text for text in every if text.endswith("again") and text.removesuffix(" again") in trained}
    assert lost and not lost & kept
    assert grown.near_duplicates["left_out"] == len(every - kept) >= len(lost)
    assert grown.near_duplicates["held_out"] == len(every)
    assert f"{len(every - kept)} of {len(every)} held-out texts are near duplicates" in caplog.text


def test_an_export_has_the_groups_of_the_data_set(tmp_path, monkeypatch):
    records = [{"instruction": f"q {n}", "input": f"{n // 4}{LONG}", "output": "a", "doc": n // 8} for n in range(160)]
    fake_hub(monkeypatch, records)
    for column, count in ((None, 40), ("doc", 20)):
        spec = DataSpec("alpaca", group_column=column)
        assert export_rows(spec, tmp_path / "t.jsonl") == 160
        lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
        assert len({line["group"] for line in lines}) == count
        local = DataSpec("alpaca", str(tmp_path / "t.jsonl"), group_column=column)
        of_hub, of_file = ({part: set(rows) for part, rows in divide(one).parts.items()} for one in (spec, local))
        assert of_hub == of_file
