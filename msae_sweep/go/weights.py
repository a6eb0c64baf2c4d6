"""Reading, writing and random generation of network weights in Leela Zero's text format, versions 1 and 2.

A file, plain or gzipped, has these lines of numbers:

    1                 the version
    2 – 5             input convolution, 18 planes to `filters`, 3×3
    8 per block       two convolutions, `filters` to `filters`, 3×3
    14 at the end     policy: 1×1 convolution to 2, layer of 722 to 362, its biases;
                      value: 1×1 convolution to 1, layer of 361 to 256, its biases, layer of 256 to 1, its bias

A convolution is four lines: weights `[out, in, height, width]`, biases, and the means and variances of the batch
normalisation after it, which has no scale or shift of its own. The file does not state the numbers of blocks and
filters. The number of filters follows from the length of the second line. After each block, the length of the next line
decides whether another block or the policy head follows.

Version 2 (ELF OpenGo) has one difference: the value is black's, not that of the side to move.

Source: Leela Zero, `src/Network.cpp` and `training/tf/tfprocess.py`.
"""

import gzip
import hashlib
import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from msae_sweep.errors import DataError

BOARD = 19
POINTS = BOARD * BOARD
PLANES = 18
MOVES = POINTS + 1
"""Number of moves: every point and the pass, which is last."""
POLICY_FILTERS, VALUE_FILTERS, VALUE_HIDDEN = 2, 1, 256
EPSILON = 1e-5
"""Constant that Leela Zero adds to a variance before taking the square root."""

_MAX_FILTERS = 4096
"""Maximum number of filters, 16 times that of Leela Zero's largest network; limits the length of the first lines."""
_MAX_CHARACTERS = 32
"""Maximum length of a number; a full float64 needs 25 with sign, exponent and the following space."""
_GZIP = b"\x1f\x8b"  # the first two bytes of gzipped data

Numbers = Float32[np.ndarray, " n"]


class Convolution(NamedTuple):
    """Convolution and the batch normalisation after it, as stored."""

    weight: Float32[np.ndarray, "out in height width"]
    bias: Float32[np.ndarray, " out"]
    mean: Float32[np.ndarray, " out"]
    variance: Float32[np.ndarray, " out"]

    def folded(self) -> tuple[Float32[np.ndarray, "out in height width"], Float32[np.ndarray, " out"]]:
        """Return weight and bias of a single convolution that includes the batch normalisation.

        With s = 1 / √(variance + ε), they are weight · s and (bias − mean) · s. This is computed in float64, because
        weights may be integers whose scale is removed only by the variance.
        """
        scale = 1 / np.sqrt(self.variance.astype(np.float64) + EPSILON)
        weight = (self.weight * scale[:, None, None, None]).astype(np.float32)
        return weight, ((self.bias.astype(np.float64) - self.mean) * scale).astype(np.float32)


class PolicyHead(NamedTuple):
    """Policy head, which maps the last block's activations to one logit per move."""

    convolution: Convolution
    weight: Float32[np.ndarray, "moves inputs"]
    bias: Float32[np.ndarray, " moves"]


class ValueHead(NamedTuple):
    """Value head, which maps the last block's activations via a hidden layer to a number whose tanh is the value."""

    convolution: Convolution
    hidden_weight: Float32[np.ndarray, "hidden points"]
    hidden_bias: Float32[np.ndarray, " hidden"]
    weight: Float32[np.ndarray, "1 hidden"]
    bias: Float32[np.ndarray, " 1"]


class Weights(NamedTuple):
    """Weights of a network as stored in its file, in plain arrays, which Ray shares between processes uncopied."""

    version: int
    input: Convolution
    blocks: tuple[tuple[Convolution, Convolution], ...]
    policy: PolicyHead
    value: ValueHead

    @property
    def filters(self) -> int:
        """Number of channels of every block."""
        return len(self.input.bias)


def read_weights(path: Path) -> Weights:
    """Return the network stored in a file. Gzip is recognised by the file's content, not by its name.

    Lines are read one at a time, so that memory holds only the weights and the text of one line.

    Raises:
        DataError: the file has another format, is truncated, is for another board size, or has lines that do not fit
            together; the message names the line.
    """
    with _opened(path) as file:
        lines = _Lines(path, file)
        version = lines.version()
        stem = _input_convolution(lines)
        filters = len(stem.bias)
        lines.expect_filters(filters)
        blocks: list[tuple[Convolution, Convolution]] = []
        while len(weight := lines.numbers(_block_or_head(filters))) != POLICY_FILTERS * filters:
            where = f"residual block {len(blocks) + 1}"
            first = _convolution(lines, weight, filters, 3, f"{where}'s first convolution")
            second = f"{where}'s second convolution"
            weight = lines.numbers({9 * filters**2: f"{second}, {filters} to {filters} filters"})
            blocks.append((first, _convolution(lines, weight, filters, 3, second)))
        policy = _policy_head(lines, weight)
        network = Weights(version, stem, tuple(blocks), policy, _value_head(lines, filters))
        lines.end(f"a network of {len(blocks)} blocks")
    return network


def _block_or_head(filters: int) -> dict[int, str]:
    """Return the two kinds of line that can follow a block, keyed by their length; the lengths are never equal."""
    return {
        9 * filters**2: f"a 3x3 convolution of {filters} to {filters} filters",
        POLICY_FILTERS * filters: f"the policy head's convolution of {filters} to {POLICY_FILTERS} filters",
    }


def _input_convolution(lines: "_Lines") -> Convolution:
    weight = lines.numbers({})
    filters, rest = divmod(len(weight), 9 * PLANES)
    if rest or not filters:
        raise lines.fault(f"{len(weight)} numbers, expected {9 * PLANES} per filter: a convolution of {PLANES} planes")
    return _convolution(lines, weight, filters, 3, "the input convolution")


def _convolution(lines: "_Lines", weight: Numbers, n_out: int, size: int, what: str) -> Convolution:
    """Read the next three lines and return the convolution that they form with the weights just read."""
    bias, mean, variance = (lines.numbers({n_out: f"{name} of {what}"}) for name in ("biases", "means", "variances"))
    if (variance < 0).any():
        raise lines.fault(f"{variance.min():g} among the variances of {what}; no variance can be negative")
    return Convolution(weight.reshape(n_out, -1, size, size), bias, mean, variance)


def _policy_head(lines: "_Lines", weight: Numbers) -> PolicyHead:
    """Read the rest of the policy head; `weight` is the line of its convolution's weights, just read."""
    convolution = _convolution(lines, weight, POLICY_FILTERS, 1, "the policy head's convolution")
    layer = lines.layer("the policy head's layer", POLICY_FILTERS * POINTS, MOVES)
    return PolicyHead(convolution, layer, lines.numbers({MOVES: "the policy head's biases of 361 points and the pass"}))


def _value_head(lines: "_Lines", filters: int) -> ValueHead:
    weight = lines.numbers({VALUE_FILTERS * filters: f"the value head's convolution of {filters} filters to one"})
    convolution = _convolution(lines, weight, VALUE_FILTERS, 1, "the value head's convolution")
    hidden = lines.layer("the value head's first layer", VALUE_FILTERS * POINTS, VALUE_HIDDEN)
    hidden_bias = lines.numbers({VALUE_HIDDEN: "the value head's first layer's biases"})
    last = lines.layer("the value head's second layer", VALUE_HIDDEN, 1)
    return ValueHead(convolution, hidden, hidden_bias, last, lines.numbers({1: "the value head's last bias"}))


class _Lines:
    """Reader of a file's lines in turn, which checks how many numbers each line has."""

    def __init__(self, path: Path, file: io.BufferedIOBase) -> None:
        self.path, self.file, self.number = path, file, 0
        self.limit = _MAX_CHARACTERS * 9 * PLANES * _MAX_FILTERS

    def expect_filters(self, filters: int) -> None:
        """Limit the length of lines to the longest line of a network with this number of filters."""
        self.limit = _MAX_CHARACTERS * max(9 * filters**2, POLICY_FILTERS * POINTS * MOVES)

    def fault(self, text: str) -> DataError:
        """Return an error that names the line last read."""
        return DataError(f"{self.path}: line {self.number}: {text}")

    def version(self) -> int:
        line = self._next("the version")
        if line.strip() not in (b"1", b"2"):
            seen = line.strip()[:24].decode("utf-8", "replace")
            raise self.fault(f"begins {seen!r}; Leela Zero's text weights begin with a line that is 1 or 2")
        return int(line)

    def numbers(self, expected: dict[int, str]) -> Numbers:
        """Return the numbers of the next line.

        Args:
            expected: the allowed lengths of the line, each with a description; if empty, any length is allowed.
        """
        line = self._next(what := " or ".join(expected.values()) or "the input convolution")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)  # before 2.3 NumPy only warned
                numbers = np.fromstring(line, dtype=np.float32, sep=" ")
        except (ValueError, DeprecationWarning):
            raise self.fault(f"{_first_fault(line)} is not a number; expected {what}") from None
        if expected and len(numbers) not in expected:
            nearest = min(expected, key=lambda n: abs(n - len(numbers)))
            raise self.fault(f"{len(numbers)} numbers, expected {nearest}: {expected[nearest]}")
        if not np.isfinite(numbers).all():
            raise self.fault(
                f"{numbers[~np.isfinite(numbers)][0]} among the numbers; weights must be finite in float32"
            )
        return numbers

    def layer(self, what: str, n_in: int, n_out: int) -> Float32[np.ndarray, "out in"]:
        """Return the next line as the weights of a fully connected layer."""
        what = f"{what} of {n_in} to {n_out}, for {BOARD} x {BOARD} boards"
        return self.numbers({n_in * n_out: what}).reshape(n_out, n_in)

    def end(self, what: str) -> None:
        """Raise an error unless only blank lines are left."""
        n_lines = self.number
        while line := self.file.readline(4096):
            self.number += 1
            if line.strip():
                raise self.fault(f"text after the end of {what}, which ends with line {n_lines}")

    def _next(self, what: str) -> bytes:
        line = self.file.readline(self.limit)
        if not line:
            raise DataError(f"{self.path}: ends after line {self.number}; expected {what}; copy the file again")
        self.number += 1
        if len(line) == self.limit:
            raise self.fault(f"longer than {self.limit} characters; expected {what}")
        return line


def _first_fault(line: bytes) -> str:
    """Return the first word of a line that is not a number, shortened for an error message."""
    for word in line.split():
        try:
            float(word)
        except ValueError:
            return repr(word.decode("utf-8", "replace")[:32])
    return "something"


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Yield the file's text, decompressed if it is gzipped; convert errors while reading to a DataError of one line."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            if not packed:
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as file:
                try:
                    yield file
                except DataError:
                    while file.read(1 << 20):  # damaged data may yield wrong text; reading on verifies the checksum
                        pass
                    raise
    except EOFError:
        raise DataError(f"{path}: the compressed data end too early; copy the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the compressed data are damaged ({error}); copy the file again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a file of Leela Zero's text weights") from None


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's bytes as stored, without decompressing a gzipped file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a file of Leela Zero's text weights") from None


def write_weights(weights: Weights, path: Path) -> None:
    """Write the text format, gzipped if the name ends in .gz; nine digits are enough to read back equal values."""
    convolutions = [weights.input, *(convolution for block in weights.blocks for convolution in block)]
    arrays = [array for convolution in convolutions for array in convolution]
    for head in (weights.policy, weights.value):
        arrays += [*head.convolution, *head[1:]]
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(b"%d\n" % weights.version)
        for array in arrays:
            file.write(" ".join(f"{x:.9g}" for x in array.ravel().tolist()).encode() + b"\n")


def random_weights(blocks: int, filters: int, seed: int, version: int = 1) -> Weights:
    """Return a network of the given size with random weights, for tests and speed measurements.

    Every part of the format has random values. Weights have He scaling. The second convolution of a block is smaller by
    √blocks, so that activations keep their size at any depth.
    """
    generator = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> np.ndarray:
        return generator.normal(scale=std, size=shape).astype(np.float32)

    def convolution(n_in: int, n_out: int, size: int, shrink: float = 1) -> Convolution:
        weight = normal(n_out, n_in, size, size, std=(2 / (n_in * size * size)) ** 0.5 / shrink)
        variance = generator.uniform(0.5, 2, n_out).astype(np.float32)
        return Convolution(weight, normal(n_out, std=0.1), normal(n_out, std=0.1), variance)

    def layer(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
        return normal(n_out, n_in, std=n_in**-0.5), normal(n_out, std=0.1)

    stem = convolution(PLANES, filters, 3)
    tower = tuple(
        (convolution(filters, filters, 3), convolution(filters, filters, 3, blocks**0.5)) for _ in range(blocks)
    )
    policy = PolicyHead(convolution(filters, POLICY_FILTERS, 1), *layer(POLICY_FILTERS * POINTS, MOVES))
    value = ValueHead(
        convolution(filters, VALUE_FILTERS, 1), *layer(VALUE_FILTERS * POINTS, VALUE_HIDDEN), *layer(VALUE_HIDDEN, 1)
    )
    return Weights(version, stem, tower, policy, value)
