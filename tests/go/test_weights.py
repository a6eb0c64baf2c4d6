"""Tests of Leela Zero's text format of weights: written files can be read, and faulty files are refused in one line."""

import gzip
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from msae_sweep.errors import DataError
from msae_sweep.go.weights import Convolution, Weights, random_weights, read_weights, weights_sha256, write_weights


def arrays_of(weights: Weights) -> list[np.ndarray]:
    found: list[np.ndarray] = []

    def collect(part: object) -> None:
        if isinstance(part, np.ndarray):
            found.append(part)
        elif isinstance(part, tuple):
            for below in part:
                collect(below)

    collect(weights)
    return found


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["net.txt", "net.txt.gz"])
def test_what_is_written_is_read_back_equal(tmp_path, name, version):
    weights = random_weights(2, 8, seed=0, version=version)
    write_weights(weights, tmp_path / name)
    read = read_weights(tmp_path / name)
    assert (read.version, len(read.blocks), read.filters) == (version, 2, 8)
    for got, expected in zip(arrays_of(read), arrays_of(weights), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    write_weights(random_weights(1, 4, seed=0), tmp_path / "packed.gz")
    write_weights(random_weights(1, 4, seed=0), tmp_path / "plain.txt")
    (tmp_path / "packed.gz").rename(tmp_path / "packed.txt")
    (tmp_path / "plain.txt").rename(tmp_path / "plain.gz")
    assert len(read_weights(tmp_path / "packed.txt").blocks) == len(read_weights(tmp_path / "plain.gz").blocks) == 1


def test_folding_takes_bias_into_the_mean_and_adds_leela_zeros_epsilon():
    one = np.ones((1, 1, 1, 1), np.float32)
    bias, mean, variance = (np.array([x], np.float32) for x in (3.0, 1.0, 1e-5))
    weight, shift = Convolution(one, bias, mean, variance).folded()
    np.testing.assert_allclose(weight.item(), 2e-5**-0.5, rtol=1e-6)
    np.testing.assert_allclose(shift, 2 * 2e-5**-0.5, rtol=1e-6)


def test_carriage_returns_and_blank_lines_at_the_end_are_read_over(tmp_path):
    write_weights(random_weights(1, 4, seed=0), tmp_path / "net.txt")
    windows = (tmp_path / "net.txt").read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n"
    (tmp_path / "net.txt").write_bytes(windows)
    assert read_weights(tmp_path / "net.txt").filters == 4


def test_the_hash_is_of_the_bytes_of_the_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert weights_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _line(number: int, change: Callable[[list[bytes]], Iterable[bytes]]) -> Callable[[list[bytes]], list[bytes]]:
    """Return a function that changes the words of one line of a file."""
    return lambda lines: [
        b" ".join(change(line.split())) if i == number else line for i, line in enumerate(lines, start=1)
    ]


FAULTS = [
    (lambda lines: [], "ends after line 0; expected the version"),
    (_line(1, lambda words: [b"3"]), "line 1: begins '3'; Leela Zero's text weights begin with a line that is 1 or 2"),
    (lambda lines: [b"\x89PNG\r", *lines], "line 1: begins '\ufffdPNG'"),
    (
        _line(2, lambda words: words[1:]),
        "line 2: 647 numbers, expected 162 per filter: a convolution of 18 planes",
    ),
    (_line(3, lambda words: [*words, b"0"]), "line 3: 5 numbers, expected 4: biases of the input convolution"),
    (_line(5, lambda words: [b"-1", *words[1:]]), "line 5: -1 among the variances of the input convolution"),
    (_line(6, lambda words: words[1:]), "line 6: 143 numbers, expected 144: a 3x3 convolution of 4 to 4 filters"),
    (_line(10, lambda words: words[1:]), "expected 144: residual block 1's second convolution, 4 to 4 filters"),
    (_line(14, lambda words: [*words, b"0"]), "line 14: 145 numbers"),
    (_line(14, lambda words: [b"1.5.2", *words[1:]]), "line 14: '1.5.2' is not a number"),
    (_line(14, lambda words: [b"nan", *words[1:]]), "line 14: nan among the numbers"),
    (_line(14, lambda words: [b"1e39", *words[1:]]), "line 14: inf among the numbers"),
    (
        _line(22, lambda words: words[1:]),
        "line 22: 7 numbers, expected 8: the policy head's convolution of 4 to 2 filters",
    ),
    (
        _line(26, lambda words: words[: 2 * 81 * 82]),
        "expected 261364: the policy head's layer of 722 to 362, for 19 x 19 boards",
    ),
    (
        _line(32, lambda words: words[1:]),
        "line 32: 92415 numbers, expected 92416: the value head's first layer of 361 to 256",
    ),
    (lambda lines: lines[:20], "ends after line 20; expected variances of residual block 2's second convolution"),
    (lambda lines: lines[:21], "ends after line 21; expected a 3x3 convolution of 4 to 4 filters or the policy head's"),
    (lambda lines: lines[:34], "ends after line 34; expected the value head's last bias"),
    (lambda lines: [*lines, b"1 2"], "line 36: text after the end of a network of 2 blocks, which ends with line 35"),
    (
        lambda lines: lines[:13] + lines[25:],
        "line 14: 261364 numbers, expected 144: a 3x3 convolution of 4 to 4 filters",
    ),
]


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Lines of the file of a network with 2 blocks and 4 filters."""
    path = tmp_path_factory.mktemp("weights") / "net.txt"
    write_weights(random_weights(2, 4, seed=0), path)
    return path.read_bytes().splitlines()


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_file_that_does_not_fit_is_one_line_that_says_where(tmp_path, two_blocks, change, message):
    path = tmp_path / "net.txt"
    path.write_bytes(b"".join(line + b"\n" for line in change(two_blocks)))
    with pytest.raises(DataError) as caught:
        read_weights(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_one_line(tmp_path):
    write_weights(random_weights(1, 4, seed=0), tmp_path / "net.gz")
    packed = (tmp_path / "net.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "bent.gz").write_bytes(packed[:5000] + bytes(100) + packed[5100:])
    (tmp_path / "bent checksum.gz").write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    (tmp_path / "two bytes").write_bytes(packed[:2])
    for name, message in (
        ("cut.gz", "end too early; copy the file again"),
        ("bent.gz", "are damaged"),  # although it unpacks to text with a faulty line before the checksum is seen
        ("bent checksum.gz", "are damaged"),
        ("two bytes", "end too early; copy the file again"),
        ("nothing.gz", "No such file or directory; expected a file of Leela Zero's text weights"),
        (".", "Is a directory"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_line_without_end_is_not_read_whole(tmp_path):
    with gzip.open(tmp_path / "net.gz", "wb", compresslevel=1) as file:
        file.write(b"1\n")
        for _ in range(200):
            file.write(b"0" * 1_000_000)
    with pytest.raises(DataError, match="line 2: longer than"):
        read_weights(tmp_path / "net.gz")
