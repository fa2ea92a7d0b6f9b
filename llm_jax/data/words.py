"""What a word is made of, where tokens are to be taken by whole words."""

# Kinds of characters. A space belongs to the word behind it; other white space is alone.
SPACE, BREAK, LETTER, MARK = range(4)


def _kind(char: str) -> int:
    if char == " ":
        return SPACE
    if not char.isascii():
        return LETTER  # or a byte of one
    if char.isspace():
        return BREAK
    return LETTER if char.isalnum() else MARK


def edges(text: str) -> tuple[int, int]:
    """Returns the kinds of the first and the last character of a token; an empty one is alone."""
    return (_kind(text[0]), _kind(text[-1])) if text else (BREAK, BREAK)
