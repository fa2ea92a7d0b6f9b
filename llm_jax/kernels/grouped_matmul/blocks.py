"""Sizes of the kernels by device and shape: as large as VMEM lets them be."""

from collections.abc import Iterator
import dataclasses

import jax.numpy as jnp

_MIB = 1 << 20
_LANES = 128
# Elements that go into an unrolled product, rows x depth x columns: some 16,000 bundles on a v5e. Twice
# that takes the compiler several times as long and is no faster.
_LARGEST_PRODUCT = 1 << 30


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel.

    Attributes:
      ring: rows in VMEM, a lap.
      chunk: rows of a copy; divides `ring`.
      piece: rows of a product.
      rest: rows of the products with what is left of a group; divides `piece`, is at most `chunk`.
      columns: of the result, made in one pass over the rows.
      tile: columns of a product; divides `columns`.
      depth: of the result's other dimension, for gradients of matrices.
      slots: groups whose matrices are in VMEM.
    """

    ring: int
    chunk: int
    piece: int
    rest: int
    columns: int
    tile: int
    depth: int = 0
    slots: int = 3

    def __post_init__(self):
        divisors = (
            ("chunk", "ring"),
            ("rest", "piece"),
            ("tile", "columns"),
        )
        for small, large in divisors:
            if getattr(self, large) % getattr(self, small):
                raise ValueError(f"{self}: {small} must divide {large}")
        if self.rest > self.chunk or self.piece > self.ring or self.slots < 2:
            raise ValueError(
                f"{self}: rest must be chunk at most, piece ring at most, slots 2 or more"
            )

    @property
    def chunks(self) -> int:
        """Of the ring."""
        return self.ring // self.chunk


@dataclasses.dataclass(frozen=True)
class Device:
    """What sizes depend on.

    Attributes:
      vmem_limit: bytes that a kernel may use of a core's.
      cores: that a device runs on together.
      rests: smallest pieces, of products, of those with transposes, of gradients: what the matrix unit
        takes as long for as for less.
    """

    vmem_limit: int
    cores: int = 1
    rests: tuple[int, int, int] = (64, 64, 128)


_DEVICES = {
    "cpu": Device(64 * _MIB, 1, (16, 16, 16)),
    "TPU v5 lite": Device(100 * _MIB),
    "TPU v5": Device(56 * _MIB, 2),
    "TPU v6 lite": Device(100 * _MIB, 1, (128, 256, 256)),
}


def is_known(device_kind: str) -> bool:
    """Returns whether there are sizes for a device."""
    return device_kind in _DEVICES


def device(device_kind: str) -> Device:
    """Returns what is known of a device; raises ValueError for one that the kernels are not made for."""
    if device_kind not in _DEVICES:
        raise ValueError(
            f"grouped matmul 'pallas' has no sizes for {device_kind!r}, only for"
            f" {', '.join(_DEVICES)}"
        )
    return _DEVICES[device_kind]


def for_product(
    device_kind: str, num_rows: int, depth: int, width: int, dtype, *, is_transposed: bool
) -> Blocks:
    """Returns the sizes for rows of `depth` times matrices that make them `width` wide.

    Raises:
      ValueError: an unknown device, or rows too wide for its VMEM.
    """
    chip, size = device(device_kind), jnp.dtype(dtype).itemsize
    found = []
    for ring, chunk, slots in _rings(num_rows):
        piece, rest = _pieces(chip.rests[int(is_transposed)], chunk, ring)
        # Float32 sums of a product, and what lies in VMEM for good.
        free = chip.vmem_limit - 8 * _MIB - ring * depth * size
        each = slots * depth * size + ring * size + 4 * piece
        passes = _passes(width, free // each, chip.cores)
        if passes is not None:
            columns = _share(width, passes)
            blocks = Blocks(ring, chunk, piece, rest, columns, columns, slots=slots)
            moved = passes * num_rows * depth
            found.append((moved * _penalty(blocks), blocks))
    return _fitted(_best(found, depth, device_kind), depth)


def for_gradient(device_kind: str, num_rows: int, depth: int, width: int, dtype) -> Blocks:
    """Returns the sizes for the sums of outer products of rows `depth` and `width` wide.

    Raises:
      ValueError: an unknown device, or rows too wide for its VMEM.
    """
    chip, size = device(device_kind), jnp.dtype(dtype).itemsize
    found = []
    for ring, chunk, slots in _rings(num_rows):
        piece, rest = _pieces(chip.rests[2], chunk, ring)
        for cuts in range(chip.cores, _ceil(depth, _LANES) + 1):
            rows = _share(depth, cuts)
            # Rows that are read, and those with others' set to zero.
            free = chip.vmem_limit - 8 * _MIB - (ring + piece) * rows * size
            each = (ring + piece) * size + rows * (slots * size + 4)
            passes = _passes(width, free // each, 1)
            if passes is not None and _ceil(depth, rows) % chip.cores == 0:
                columns = _share(width, passes)
                blocks = Blocks(ring, chunk, piece, rest, columns, columns, rows, slots)
                moved = num_rows * (passes * depth + cuts * width)
                found.append((moved * _penalty(blocks), blocks))
    best = _best(found, depth, device_kind)
    return _fitted(best, best.depth)


def _rings(num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields sizes of rings and chunks, and numbers of slots. Chunks divide whole tiles of rows."""
    chunk = 256 if num_rows % 256 == 0 else 128
    for ring in (2048, 1024, 512):
        for slots in (3, 2):
            yield min(ring, _ceil(num_rows, chunk) * chunk), chunk, slots


def _pieces(rest: int, chunk: int, ring: int) -> tuple[int, int]:
    return min(512 if ring % 512 == 0 else chunk, ring), min(rest, chunk)


def _passes(width: int, most: int, cores: int) -> int | None:
    """Returns how many passes of at most so many columns it takes, the same number for each core."""
    most = most // _LANES * _LANES
    if most < _LANES:
        return None
    passes = _ceil(_ceil(width, most), cores) * cores
    # Of few columns cores may have to make the same ones.
    return passes if passes * _LANES <= max(width, cores * _LANES) else None


def _share(width: int, passes: int) -> int:
    return _ceil(width, passes * _LANES) * _LANES


def _penalty(blocks: Blocks) -> float:
    """Returns what less to fetch ahead into costs, about."""
    return (1.0 if blocks.slots > 2 else 1.2) * (1.0 + 100.0 / blocks.ring)


def _best(found: list[tuple[float, Blocks]], depth: int, device_kind: str) -> Blocks:
    if not found:
        raise ValueError(
            f"grouped matmul 'pallas' cannot hold rows of width {depth} on {device_kind!r}; use"
            " 'ragged_dot'"
        )
    return min(found, key=lambda one: one[0])[1]


def _fitted(blocks: Blocks, depth: int) -> Blocks:
    """Returns the sizes with products that are not too large: of fewer rows first, then columns."""
    piece, tiles = blocks.piece, blocks.columns // _LANES
    while piece > max(256, blocks.rest) and piece * depth * blocks.columns > _LARGEST_PRODUCT:
        piece //= 2
    fitting = [
        count
        for count in range(1, tiles + 1)
        if tiles % count == 0 and piece * depth * count * _LANES <= _LARGEST_PRODUCT
    ]
    tile = max(fitting, default=1) * _LANES
    return dataclasses.replace(blocks, piece=piece, tile=tile)


def _ceil(number: int, size: int) -> int:
    return -(-number // size)
