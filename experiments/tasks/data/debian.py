"""Descriptions of Debian's packages: translations, summaries, and what is looked for by its short description.

Source: the lists of a Debian mirror, by apt; each description is under its package's licence. Versions move, so that
counts do: `about.json` has a checksum of what was read. All splits are by the source package, as packages built of
one source describe themselves in the same words.

    translation:LANGUAGE   paragraphs, aligned: a description and its translation have the same paragraphs
    summaries              a long description -> the short one, one of each source
    descriptions           a short description -> the long one it belongs to, one of each source
"""

from collections.abc import Iterator
import hashlib
import re

from experiments.tasks.data import splits
from llm_jax.data import packages

_LANGUAGES = ("it", "fr", "de", "da", "es", "pt_BR", "ru", "pl", "nl", "sv", "ja")
_FEWEST, _MOST = 4, 80  # words of a paragraph


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yields the fields of each stanza of a control file; lines of a field are joined by line ends."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] += "\n" + line[1:]
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def description(text: str) -> tuple[str, list[str]]:
    """Returns the short description, and the paragraphs of the long one, each as one line.

    Paragraphs end at a line with a dot alone. Lines that are set further in are lists or code and stay out, with
    the paragraph that they are in.
    """
    short, _, long = text.partition("\n")
    paragraphs = []
    for paragraph in re.split(r"^\.$", long, flags=re.M):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        is_prose = lines and not any(re.match(r"\s|[*+o-]\s", line) for line in lines)
        paragraphs.append(" ".join(" ".join(lines).split()) if is_prose else "")
    return " ".join(short.split()), paragraphs


def sources_of(packages_text: str) -> dict[str, str]:
    """Returns the source package of each package of a list."""
    found = {}
    for fields in stanzas(packages_text):
        source = fields["Source"] if "Source" in fields else fields["Package"]
        found[fields["Package"]] = source.partition(" ")[0]
    return found


def described(translation_text: str, language: str) -> dict[str, tuple[str, str]]:
    """Returns the package and the description of each checksum of a list of translations."""
    field = f"Description-{language}"
    return {
        fields["Description-md5"]: (fields["Package"], fields[field])
        for fields in stanzas(translation_text)
        if field in fields and "Description-md5" in fields
    }


def aligned(
    english: dict[str, tuple[str, str]],
    other: dict[str, tuple[str, str]],
    sources: dict[str, str],
) -> Iterator[splits.Example]:
    """Yields paragraphs and their translations: of descriptions with as many paragraphs in both."""
    seen = set()
    for checksum in sorted(english.keys() & other.keys()):
        package, text = english[checksum]
        ours, theirs = description(text), description(other[checksum][1])
        if len(ours[1]) != len(theirs[1]):
            continue
        pairs = [(ours[0], theirs[0]), *zip(ours[1], theirs[1], strict=True)]
        for source, target in pairs:
            sizes = [len(source.split()), len(target.split())]
            is_clean = _FEWEST <= min(sizes) and max(sizes) <= _MOST and source != target
            if is_clean and max(sizes) < 3 * min(sizes) and (source, target) not in seen:
                seen.add((source, target))
                owner = sources[package] if package in sources else package
                yield {"source": source, "target": target, "package": owner}


def summaries_of(
    english: dict[str, tuple[str, str]], sources: dict[str, str]
) -> Iterator[splits.Example]:
    """Yields the long and the short description of one package of each source, the first by name."""
    seen = set()
    for package, text in sorted(english.values()):
        owner = sources[package] if package in sources else package
        short, paragraphs = description(text)
        long = " ".join(filter(None, paragraphs))
        if owner not in seen and len(short.split()) >= 2 and len(long.split()) >= 10:
            seen.add(owner)
            yield {"long": long, "short": short, "package": owner}


def _lists(languages: tuple[str, ...]) -> tuple[dict[str, str], dict[str, dict], str]:
    """Returns sources by package, descriptions by language, and a checksum of what was read."""
    folder = packages.apt_lists(languages)
    digest = hashlib.sha256()
    sources: dict[str, str] = {}
    texts: dict[str, dict] = {language: {} for language in languages}
    for path in sorted(folder.iterdir()):
        named = re.search(r"_(Packages|Translation-(\w+))(\.\w+)?$", path.name)
        if not path.is_file() or named is None or (named[2] and named[2] not in texts):
            continue
        text = packages.read_apt(path)
        digest.update(text.encode())
        if named[2]:
            texts[named[2]] |= described(text, named[2])
        else:
            sources |= sources_of(text)
    return sources, texts, digest.hexdigest()


def _about(checksum: str, split: str) -> dict[str, str]:
    return {
        "source": "the lists of a Debian mirror (apt-get update)",
        "read": f"sha256 {checksum}",
        "licence": "of each package",
        "split": split,
    }


def translation(language: str) -> splits.DataSet:
    """Returns English paragraphs and their translations; downloads the lists if need be."""
    if language not in _LANGUAGES:
        raise ValueError(f"translation:{language}: use one of {', '.join(_LANGUAGES)}")
    sources, texts, checksum = _lists(("en", language))
    examples = splits.by_key(
        aligned(texts["en"], texts[language], sources), _package, {"validation": 0.02, "test": 0.02}
    )
    about = _about(checksum, "by source package: 96% train, 2% validation, 2% test")
    return splits.DataSet(examples, about, lambda example: example["source"])


def summaries() -> splits.DataSet:
    """Returns long and short descriptions, one pair of each source package."""
    sources, texts, checksum = _lists(("en",))
    examples = splits.by_key(summaries_of(texts["en"], sources), _package)
    about = _about(checksum, "by source package, one of each: 90% train, 5% validation, 5% test")
    return splits.DataSet(examples, about, lambda example: example["long"])


def descriptions() -> splits.DataSet:
    """Returns queries (short descriptions) and documents (long ones), one pair of each source package."""
    found = summaries()
    examples = {
        name: [{"query": row["short"], "document": row["long"]} for row in rows]
        for name, rows in found.examples.items()
    }
    return splits.DataSet(examples, found.about, lambda example: example["document"])


def _package(example: splits.Example) -> str:
    return example["package"]
