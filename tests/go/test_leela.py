"""Tests of Leela Zero's network: its arithmetic, its operations, and real games beside an independent loader."""

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sgfmill import sgf, sgf_moves
from torch import Tensor
from torch.nn import functional as F

from msae_sweep.errors import ConfigError
from msae_sweep.go import leela
from msae_sweep.go.leela import Network, gather_points, spatial_mean
from msae_sweep.go.weights import Convolution, Weights, random_weights, read_weights


def random_planes(n: int) -> Tensor:
    planes = torch.randint(0, 2, (n, 18, 19, 19), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    planes[:, 16] = (torch.arange(n) % 2 == 0)[:, None, None]  # black is to move in every other position
    planes[:, 17] = 1 - planes[:, 16]
    return planes


def plainly(weights: Weights, planes: Tensor) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Return the network's outputs in float64, with convolution, bias and batch normalisation one after another."""

    def normalised(x: Tensor, c: Convolution) -> Tensor:
        weight, bias, mean, variance = (torch.from_numpy(a).double() for a in c)
        x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return F.batch_norm(x, mean, variance, eps=1e-5)

    def layer(x: Tensor, weight: np.ndarray, bias: np.ndarray) -> Tensor:
        return x @ torch.from_numpy(weight).double().T + torch.from_numpy(bias)

    x = normalised(planes.double(), weights.input).relu()
    activations = {}
    for number, (first, second) in enumerate(weights.blocks):
        x = (normalised(normalised(x, first).relu(), second) + x).relu()
        activations[number] = x
    policy, value = weights.policy, weights.value
    logits = layer(normalised(x, policy.convolution).relu().flatten(1), policy.weight, policy.bias)
    hidden = layer(normalised(x, value.convolution).relu().flatten(1), value.hidden_weight, value.hidden_bias).relu()
    return activations, logits, layer(hidden, value.weight, value.bias).tanh()[:, 0]


def test_folded_network_equals_batch_normalisation_after_convolution():
    weights, planes = random_weights(3, 8, seed=0), random_planes(5)
    activations, logits, value = plainly(weights, planes)
    got = Network(weights)(planes, taps=(0, 1, 2))
    for block, expected in activations.items():
        torch.testing.assert_close(got.activations[block].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.policy_logits.double(), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.value.double(), value, rtol=1e-5, atol=1e-5)
    assert got.policy_logits.shape == (5, 362)
    assert got.value.shape == (5,)


def test_integer_weights_whose_scale_lies_in_the_variance_are_the_same_network():
    plain = random_weights(2, 8, seed=0)

    def scaled(c: Convolution) -> Convolution:  # the square of 1e5 exceeds float16 and makes the epsilon negligible
        return Convolution(c.weight * 1e5, c.bias * 1e5, c.mean * 1e5, c.variance * 1e10)

    large = plain._replace(blocks=tuple((scaled(a), scaled(b)) for a, b in plain.blocks))
    planes = random_planes(3)
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.05)):
        a, b = (Network(w, precision=precision)(planes, (1,), heads=False).activations[1] for w in (plain, large))
        assert (a.float() - b.float()).norm() < tolerance * a.float().norm()


def test_without_heads_nothing_behind_the_last_tap_is_computed():
    network = Network(random_weights(5, 8, seed=0))
    ran = []
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    planes = random_planes(2)
    short = network(planes, taps=(0, 2), heads=False)
    assert ran == [0, 1, 2]
    assert list(short.activations) == [0, 2]
    assert short.policy_logits is None
    assert short.value is None
    whole = network(planes, taps=(2, 0))
    for block in (0, 2):  # no later block has overwritten a tap
        torch.testing.assert_close(short.activations[block], whole.activations[block], rtol=0, atol=0)


def test_a_block_that_is_not_there_is_said_in_one_line():
    network = Network(random_weights(5, 8, seed=0))
    for block in (5, -1):
        with pytest.raises(ConfigError, match=f"block {block}: this network has blocks 0 to 4"):
            network(random_planes(1), taps=(block,))


def test_version_2_gives_the_same_value_but_blacks():
    planes = random_planes(6)
    one, two = (random_network_of(version)(planes).value for version in (1, 2))
    torch.testing.assert_close(two, one * torch.tensor([1, -1] * 3))


def random_network_of(version: int) -> Network:
    return Network(random_weights(1, 8, seed=0, version=version))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float64])
def test_planes_may_be_of_any_type(dtype):
    network, planes = Network(random_weights(1, 8, seed=0)), random_planes(2)
    expected = network(planes.float(), taps=(0,)).activations[0]
    torch.testing.assert_close(network(planes.to(dtype), taps=(0,)).activations[0], expected)


def test_weights_that_cannot_be_written_to_make_a_network():
    """Ray hands out arrays that are read-only like these."""
    weights = random_weights(1, 4, seed=0)
    for array in (*weights.input, *weights.policy[1:], *weights.value[1:]):
        array.flags.writeable = False
    assert torch.isfinite(Network(weights)(random_planes(1)).policy_logits).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathered_points_and_means_are_those_of_the_board(layout):
    activations = torch.randn(3, 5, 19, 19).contiguous(memory_format=layout)
    points = torch.tensor([[0, 360], [18, 19], [7, 7]], dtype=torch.int16)
    got = gather_points(activations, points)
    for b, n in np.ndindex(3, 2):
        row, column = divmod(int(points[b, n]), 19)
        torch.testing.assert_close(got[b, n], activations[b, :, row, column], rtol=0, atol=0)
    torch.testing.assert_close(spatial_mean(activations), activations.flatten(2).mean(2))


def test_a_cpu_takes_plain_operations_in_float32_and_says_why():
    choice = Network(random_weights(1, 8, seed=0)).choice
    assert (choice.name, choice.dtype) == ("plain", torch.float32)
    assert choice.reason == "fp32 on cpu; fused convolutions need cuDNN"


def test_what_cudnn_refuses_is_a_reason_and_no_traceback():
    reason = leela.fused_hindrance(torch.device("cpu"), torch.bfloat16, 8)
    assert reason.startswith("cuDNN refuses 8 filters in torch.bfloat16: ")
    assert "\n" not in reason


def stand_in(x, weight, bias, stride, padding, dilation, groups, z=0.0, alpha=0.0):
    return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()


def stand_in_add(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    return stand_in(x, weight, bias, stride, padding, dilation, groups, z, alpha)


def test_fused_operations_are_called_as_cudnn_has_them(monkeypatch):
    """The arguments are in the order of torch's schema, which is also checked where there is no CUDA."""
    for name, own in (("cudnn_convolution_relu", stand_in), ("cudnn_convolution_add_relu", stand_in_add)):
        schema = getattr(torch.ops.aten, name).default._schema
        parameters = own.__code__.co_varnames[: len(schema.arguments)]
        assert [a.name for a in schema.arguments][1:] == list(parameters)[1:]
        monkeypatch.setattr(torch, name, own)
    assert leela.fused_hindrance(torch.device("cpu"), torch.bfloat16, 8) is None
    network, planes = Network(random_weights(2, 8, seed=0)), random_planes(2)
    expected = network(planes, taps=(1,)).activations[1]
    for block in network.blocks:
        block.choice = network.choice._replace(conv_relu=leela.cudnn_conv_relu, conv_add_relu=leela.cudnn_conv_add_relu)
    torch.testing.assert_close(network(planes, taps=(1,)).activations[1], expected)


def test_fused_operations_that_compute_something_else_are_not_taken(monkeypatch):
    monkeypatch.setattr(torch, "cudnn_convolution_relu", stand_in)
    monkeypatch.setattr(
        torch, "cudnn_convolution_add_relu", lambda x, w, z, alpha, bias, **shape: stand_in(x, w, bias, **shape)
    )
    assert "differ from plain ones by" in leela.fused_hindrance(torch.device("cpu"), torch.bfloat16, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.005), ("bf16", 0.03), ("fp32", 1e-5)])
@pytest.mark.parametrize("filters", [64, 256])
def test_cuda_equals_the_cpu_within_the_roundings_of_its_type(precision, tolerance, filters):
    weights, planes = random_weights(6, filters, seed=0), random_planes(9)
    expected = Network(weights)(planes, taps=(1, 5))
    network = Network(weights, "cuda", precision)
    assert network.choice.name == ("plain" if precision == "fp32" else "fused"), network.choice.reason
    got = network(planes, taps=(1, 5))
    for block, activations in expected.activations.items():
        assert relative_error(got.activations[block].cpu(), activations) < tolerance
    assert relative_error(got.policy_logits.cpu(), expected.policy_logits) < tolerance


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


class Game(NamedTuple):
    boards: list[np.ndarray]
    """Boards after 0, 1, … moves, with row 0 at the top: 1 is black, −1 is white."""
    moves: list[tuple[int, int]]
    """Colour (1 or −1) and point of every move. Points are 0 – 360 row by row from the top, and 361 is the pass."""


def replayed(record: bytes) -> Game:
    board, plays = sgf_moves.get_setup_and_moves(sgf.Sgf_game.from_bytes(record))
    boards, moves = [], []

    def look() -> None:
        stones = np.zeros((19, 19), np.int8)
        for colour, (row, column) in board.list_occupied_points():  # sgfmill counts rows from the bottom
            stones[18 - row, column] = 1 if colour == "b" else -1
        boards.append(stones)

    look()
    for colour, move in plays:
        if move is not None:
            board.play(*move, colour)
        moves.append((1 if colour == "b" else -1, 361 if move is None else (18 - move[0]) * 19 + move[1]))
        look()
    return Game(boards, moves)


def planes_of(game: Game, ply: int) -> np.ndarray:
    """Return the 18 planes before a move, with the newest position first."""
    to_move = game.moves[ply][0] if ply < len(game.moves) else -game.moves[-1][0]
    planes = np.zeros((18, 19, 19), np.uint8)
    for ago in range(min(8, ply + 1)):
        planes[ago] = game.boards[ply - ago] == to_move
        planes[8 + ago] = game.boards[ply - ago] == -to_move
    planes[16 if to_move == 1 else 17] = 1
    return planes


@pytest.fixture(scope="module")
def networks_and_games(real_data: Path) -> Path:
    """Folder with weights/, reference/ and games. Tests are skipped, with the reason, if a file is missing."""
    folder = real_data.parent
    for name in ("weights", "reference", "games.tar.gz", "held_out_games.txt", "facts.json"):
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}; set MSAE_SWEEP_REAL_DATA to a folder that holds it")
    return folder


@pytest.fixture(scope="module")
def records(networks_and_games: Path) -> dict[int, bytes]:
    with tarfile.open(networks_and_games / "games.tar.gz") as tar:
        return {int(Path(file.name).stem): tar.extractfile(file).read() for file in tar if file.isfile()}


class Reference(NamedTuple):
    planes: Tensor
    arrays: dict[str, Tensor]

    def compare(self, network: Network, order: list[int] | None = None) -> None:
        """Raise AssertionError if the network's float32 outputs differ from the reference. `order` permutes the planes.

        Each number may differ by 1e-4 of itself plus 1e-5 of the array's largest. The second part is for numbers near
        zero, which remain when large terms cancel: no relative tolerance holds for them.
        """
        planes = self.planes if order is None else self.planes[:, order]
        blocks = [int(name.removeprefix("block")) for name in self.arrays if name.startswith("block")]
        got: dict[str, list[Tensor]] = {}
        for batch, points in zip(planes.split(30), self.arrays["points"].split(30), strict=True):
            outputs = network(batch, taps=[block - 1 for block in blocks])  # the reference numbers blocks from 1
            found = {f"block{b + 1}": gather_points(x, points) for b, x in outputs.activations.items()}
            found |= {"policy_logits": outputs.policy_logits, "value": outputs.value}
            for name, x in found.items():
                got.setdefault(name, []).append(x)
        assert len(got) == 5
        for name, parts in got.items():
            expected = self.arrays[name]
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def reference_of(folder: Path, records: dict[int, bytes], name: str) -> Reference:
    arrays = dict(np.load(folder / "reference" / f"{name}.npz"))
    games = {game: replayed(records[game]) for game in set(arrays["game_id"].tolist())}
    where = zip(arrays["game_id"].tolist(), arrays["ply"].tolist(), strict=True)
    planes = np.stack([planes_of(games[game], ply) for game, ply in where])
    return Reference(torch.from_numpy(planes), {name: torch.from_numpy(array) for name, array in arrays.items()})


@pytest.mark.parametrize("name", ["lz-6x64", pytest.param("lz-40x256", marks=pytest.mark.slow)])
def test_real_networks_give_what_an_independent_loader_computed(networks_and_games, records, name):
    network = Network(read_weights(networks_and_games / "weights" / f"{name}.txt.gz"))
    reference_of(networks_and_games, records, name).compare(network)


WRONG_ORDERS = {
    "oldest first": [*range(7, -1, -1), *range(15, 7, -1), 16, 17],
    "the opponent first": [*range(8, 16), *range(8), 16, 17],
    "sides in turn": [*(i // 2 + 8 * (i % 2) for i in range(16)), 16, 17],
    "white before black": [*range(16), 17, 16],
}


@pytest.mark.parametrize("order", WRONG_ORDERS.values(), ids=WRONG_ORDERS)
def test_the_comparison_fails_on_a_wrong_order_of_planes(networks_and_games, records, small_network, order):
    with pytest.raises(AssertionError, match="not close"):
        reference_of(networks_and_games, records, "lz-6x64").compare(small_network, order)


class Accuracy(NamedTuple):
    positions: int
    top1: float
    top5: float
    cross_entropy: float


def accuracy(network: Network, games: Iterable[Game], order: list[int] | None = None) -> Accuracy:
    """Return how well the policy predicts the move of every fifth position of the games."""
    where = [(game, ply) for game in games for ply in range(0, len(game.moves), 5)]
    planes = torch.from_numpy(np.stack([planes_of(game, ply) for game, ply in where]))
    planes = planes if order is None else planes[:, order]
    logits = torch.cat([network(batch).policy_logits for batch in planes.split(128)])
    move = torch.tensor([game.moves[ply][1] for game, ply in where])
    best = logits.topk(5).indices == move[:, None]
    top1, top5 = (float(hits.float().mean()) for hits in (best[:, 0], best.any(1)))
    return Accuracy(len(where), top1, top5, float(F.cross_entropy(logits, move)))


@pytest.fixture(scope="module")
def small_network(networks_and_games: Path) -> Network:
    return Network(read_weights(networks_and_games / "weights" / "lz-6x64.txt.gz"))


@pytest.fixture(scope="module")
def held_out(networks_and_games: Path, records: dict[int, bytes]) -> list[Game]:
    numbers = (networks_and_games / "held_out_games.txt").read_text().split()
    return [replayed(records[int(number)]) for number in numbers]


@pytest.fixture(scope="module")
def facts(networks_and_games: Path) -> Accuracy:
    """Accuracy that the network's makers measured."""
    small = json.loads((networks_and_games / "facts.json").read_text())["data"]["small"]
    return Accuracy(small["positions"], small["top1"], small["top5"], small["ce"])


def test_policy_foretells_moves_of_unseen_games_as_its_makers_measured(small_network, held_out, facts):
    """A quarter of the games has about 980 positions, for which top-1 has a standard error of 1.6%.

    All 120 games give the makers' figures to the last digit (45.83%, 75.76%, 2.1002 over 3,919 positions).
    """
    got = accuracy(small_network, held_out[::4])
    assert abs(got.top1 - facts.top1) < 0.05, got
    assert abs(got.top5 - facts.top5) < 0.05, got
    assert abs(got.cross_entropy - facts.cross_entropy) < 0.2, got


@pytest.mark.parametrize("order", list(WRONG_ORDERS.values())[:3], ids=list(WRONG_ORDERS)[:3])
def test_policy_foretells_little_from_a_wrong_order_of_planes(small_network, held_out, facts, order):
    """The policy hardly depends on which colour is to move, so only the comparison can find the last wrong order."""
    assert accuracy(small_network, held_out[::10], order).top1 < facts.top1 - 0.15


@pytest.mark.parametrize(
    ("device", "capability", "meant"),
    [("cpu", None, "fp32"), ("cuda", (6, 1), "fp32"), ("cuda", (7, 0), "fp16"), ("cuda", (9, 0), "fp16")],
)
def test_auto_stands_for_the_fastest_precision_of_the_device_and_any_other_for_itself(
    monkeypatch, device, capability, meant
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert leela.resolve_precision(torch.device(device), "auto") == meant
    assert leela.resolve_precision(torch.device(device), "bf16") == "bf16"
