"""The dimension key: one letter, one meaning, in every array suffix, einsum and sharding rule.

A name such as `x_BTD` says that the array has dimensions batch, query length and model width.
Layers stacked for `jax.lax.scan` carry a leading `L` that their names, written for one layer, omit.
"""

from typing import Any

DIMS = {
    "B": "batch (sequences)",
    "T": "query length (tokens)",
    "S": "key length (tokens)",
    "D": "model width",
    "H": "query heads (K * G)",
    "K": "key-value heads",
    "G": "query heads per key-value head",
    "C": "head width",
    "W": "widths of key-value heads side by side (K * C; in a kernel those of a pack)",
    "M": "model width that a projection to it gives",
    "Z": "width of a latent that queries, or keys and values, are made of",
    "F": "feed-forward width",
    "V": "vocabulary",
    "P": "positions of a learned table",
    "U": "buckets of relative distance",
    "Y": "labels",
    "J": "token types",
    "L": "layers",
    "Q": "beams of a row",
    "O": "beams of a row whose slots others read (origins)",
    "A": "candidates for the beams of a row, or to follow it",
    "N": "tokens (B * T)",
    "E": "experts",
    "I": "rank of a low-rank update",
    "X": "expert capacity",
    "R": "routed slots",
}


# How the letters of a layer's matrices split into inputs and outputs; tables and heads are missing here.
MATRICES = {
    "DKGC": ("D", "KGC"),
    "DKC": ("D", "KC"),
    "KGCD": ("KGC", "D"),
    "DHC": ("D", "HC"),
    "DZ": ("D", "Z"),
    "ZHC": ("Z", "HC"),
    "DC": ("D", "C"),
    "HCD": ("HC", "D"),
    "DF": ("D", "F"),
    "FD": ("F", "D"),
    "EDF": ("D", "F"),  # each expert by itself
    "EFD": ("F", "D"),
}


def suffix(name: str) -> str:
    """Returns the dimension letters of an array's name: `"w_DF"` gives `"DF"`.

    Raises:
      ValueError: the name has no suffix, or a letter of it is not in the key.
    """
    letters = name.rpartition("_")[2]
    unknown = [letter for letter in letters if letter not in DIMS]
    if unknown or "_" not in name:
        raise ValueError(f"{name!r} does not end in an underscore and letters of {''.join(DIMS)}")
    return letters


def of_path(path: tuple[Any, ...]) -> str:
    """Returns the dimension letters of the parameter at a tree path, layers' `L` left out."""
    names = [getattr(entry, "name", None) for entry in path]
    return suffix([name for name in names if name not in (None, "value")][-1])
