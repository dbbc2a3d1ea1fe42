"""Licences: read from cards and licence files, and reported when they differ or are not stated."""

import logging

import pytest
from stages import front_matter, fuse_by_id

from core.runs.licences import licence_text, read_licence


@pytest.mark.parametrize(
    ("target", "source", "licence", "warning"),
    [
        ("license: apache-2.0", "license: mit", "other", "licences differ: target apache-2.0, source mit; check that"),
        ("license: apache-2.0", None, "other", "licences differ: target apache-2.0, source unknown; check that both"),
        (
            "license: other\nlicense_name: llama3\nlicense_link: https://x/y",
            "license: llama3.1",
            "other",
            "licences differ: target llama3, source llama3.1",
        ),
        ("license: [", "x: 1", "unknown", "licences are not stated: target unknown, source unknown"),
    ],
)
def test_licences_that_differ_or_are_unknown_give_one_warning(
    plans, licensed, tmp_path, caplog, target, source, licence, warning
):
    licensed(target, source)
    with caplog.at_level(logging.WARNING):
        out = fuse_by_id(plans, tmp_path / "f")
    lines = [r.getMessage() for r in caplog.records if "licence" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(warning)
    assert front_matter(out)["license"] == licence and lines[0][1:] in (out / "README.md").read_text()


def test_a_licence_is_read_from_the_card_or_a_licence_file(tmp_path):
    assert read_licence(tmp_path) == {} and licence_text({}) == "unknown"
    (tmp_path / "LICENSE.txt").write_text("\n   LLAMA 3.1 COMMUNITY License\n\nterms")
    found = read_licence(tmp_path)
    assert found == {"license": "other", "license_name": "llama-3.1-community-license"}
    assert licence_text(found) == "llama-3.1-community-license"
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == {"license": "other", "license_name": "mine"}
    link = "https://huggingface.co/a/b/blob/main/LICENSE"
    assert read_licence(tmp_path, "a/b") == {"license": "other", "license_name": "mine", "license_link": link}
    (tmp_path / "README.md").write_text("---\nlicense:\n- mit\n- 3\nlicense_name: [a]\nlicense_link: 1.5\n---\n")
    assert read_licence(tmp_path) == {"license": ["mit", "3"]} and licence_text(read_licence(tmp_path)) == "mit, 3"
