"""General texts: the Python language reference that ships with CPython."""

import re
from typing import Any

MIN_CHARACTERS = 200


def python_reference() -> list[dict[str, Any]]:
    """Paragraphs of `pydoc_data.topics` (PSF licence) of at least 200 characters, duplicates out.

    Returns:
        Rows {"text", "group"}. Topics that share a paragraph have one group, so that a split by group puts no topic,
        and no paragraph of it, into two parts.
    Raises:
        ModuleNotFoundError: a Python without `pydoc_data` (some distributions ship it as a package of its own).
    """
    from pydoc_data.topics import topics

    group = {topic: topic for topic in topics}

    def root(topic: str) -> str:
        while group[topic] != topic:
            topic = group[topic]
        return topic

    first: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = paragraph.strip()
            if len(text) >= MIN_CHARACTERS:
                group[root(topic)] = root(first.setdefault(text, topic))
    return [{"text": text, "group": root(topic)} for text, topic in first.items()]
