"""Small programs, written as libtpu prints them."""

import pathlib

from llm_jax.aot import bundles

_HEADER = """= control target key start
LH: loop header
= control target key end

"""


def text(lines: list[str]) -> str:
    """Returns the text of a program with one bundle a line."""
    numbered = (f"{n:#6x}   :  {{ {line} }}\n" for n, line in enumerate(lines))
    return _HEADER + "".join(numbered).replace("   0x0 ", "     0 ", 1)


def program(directory: pathlib.Path, lines: list[str]) -> tuple[bundles.Bundle, ...]:
    """Writes a program and reads it."""
    path = directory / "1-name-01-packed-bundles-post-ra.txt"
    path.write_text(text(lines))
    return bundles.parse(path)


def loop(turns: int | str, body: list[str], before: list[str] = ()) -> list[str]:
    """Returns a loop; each turn takes 7 bundles (4 delay slots among them) and the body's."""
    start = len(before) + 1
    return [
        *before,
        "%s1_s0 = smov 0",
        "%s3_s0 = sadd.s32 1, %s2_s0  ;;  %s2_s0 = sphi %s1_s0, %s3_s0 /* phi copy */",
        *body,
        f"%p4_p0 = scmp.lt.s32.totalorder %s3_s0, {turns}",
        f"%5 = sbr.rel (%p4_p0) target bundleno = {start} ({start:#x}), region = 3",
        *[""] * 4,
    ]


def copy_from_hbm(granules: int | str, flag: str = "[#allocation9]") -> str:
    return (
        "%7 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s10_s1, "
        f"/*size_in_granules=*/{granules}, /*vmem=*/[#allocation3], /*dst_syncflagno=*/{flag}"
        " /* base_bounds: (1, 2)\nstrides: {1} ;; of no importance */"
    )


OPERAND = "%s10_s1 = inlined_call_operand.hbm [shape: f32[8,128], index: 0, kind: input]"
