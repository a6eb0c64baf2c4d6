"""Ray actors of both passes over boards: a chunk → activations of a block → a model's codes of every point."""

import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from jaxtyping import Float
from torch import Tensor

from msae_sweep.go.board import N_POINTS
from msae_sweep.go.leela import Network
from msae_sweep.go.pipeline import BATCH, ChunkBoards, unpack_boards
from msae_sweep.go.planes import planes
from msae_sweep.go.top_positions import FiringStatistics, TopPositions, board_maxima, top_positions

if TYPE_CHECKING:
    from msae_sweep.go.top_activations import TopActivationSettings

_PRE_ACTS = 1 << 28
"""Maximum number of `pre_acts` values held at a time; they take 1 GiB."""


class _Codes:
    """Base of the actors that encode every point of boards; it keeps the network and the model on one device."""

    def __init__(self, references: list[Any], settings: "TopActivationSettings") -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        weights, file = ray.get(references)
        self.network = Network(weights, self.device, settings.precision)
        self.model = file.standardised().to(self.device).eval()
        pre_acts = N_POINTS * file.model.hidden_dim
        self.batch = max(1, min(BATCH[self.device.type], _PRE_ACTS // pre_acts))

    def activations(self, chunk: ChunkBoards, part: slice) -> Float[Tensor, "rows filters"]:
        """Return the block's activations in float32, with 361 rows per position, ordered from the top left."""
        block, bottom = self.settings.tap, self.settings.first_row == "bottom"
        boards = torch.tensor(chunk.boards[part]).to(self.device)
        black_to_move = torch.tensor(chunk.black_to_move[part]).to(self.device)
        x = planes(boards, black_to_move, self.network.choice.dtype)
        tapped = self.network(x.flip(2) if bottom else x, (block,), heads=False).activations[block]
        tapped = tapped.flip(2) if bottom else tapped
        return tapped.permute(0, 2, 3, 1).reshape(-1, self.network.filters).float()

    def parts(self, n: int) -> list[slice]:
        """Return slices that split `n` positions into batches small enough for the device."""
        return [slice(start, start + self.batch) for start in range(0, n, self.batch)]

    def answer(self, n: int, found: object) -> dict[str, list[Any]]:
        """Return the result row of a chunk: its number of positions, the device, and `found` pickled."""
        device = f"{self.device.type}: {self.network.choice.name} ({self.network.choice.reason})"
        return {"n_positions": [n], "device": [device], "found": [pickle.dumps(found)]}


class TopActivationActor(_Codes):
    """Actor of the first pass, which computes the `TopPositions` and `FiringStatistics` of chunks."""

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Return the result row of one chunk, with its `TopPositions` and `FiringStatistics`."""
        chunk = unpack_boards(batch)
        n, hidden_dim = len(chunk.ply), self.model.sae.hidden_dim
        found: list[TopPositions] = []
        firing: list[FiringStatistics] = []
        for part in self.parts(n):
            values, indices = self.model.encode_sparse(self.activations(chunk, part), self.settings.k)
            largest, fired = board_maxima(values, indices, hidden_dim)
            game_id, ply = (torch.tensor(ids[part]).to(self.device) for ids in (chunk.game_id, chunk.ply))
            found.append(top_positions(largest, game_id, ply.long(), self.settings.top))
            firing.append(fired)
        best, total = found[0], firing[0]
        for more, fired in zip(found[1:], firing[1:], strict=True):
            best, total = best.merge(more), total.add(fired)
        return self.answer(n, (TopPositions(*(t.cpu() for t in best)), FiringStatistics(*(t.cpu() for t in total))))


class LatentMapActor(_Codes):
    """Actor of the second pass, which computes the wanted latents' values at every point of chosen positions."""

    def __init__(
        self, references: list[Any], settings: "TopActivationSettings", wanted: dict[tuple[int, int], list[int]]
    ) -> None:
        super().__init__(references, settings)
        self.wanted = wanted

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Return the result row of one chunk, with 361 values for each (latent, game id, ply) that is wanted."""
        found, chunk = {}, unpack_boards(batch)
        for part in self.parts(len(chunk.ply)):
            values, indices = self.model.encode_sparse(self.activations(chunk, part), self.settings.k)
            places = list(zip(chunk.game_id[part].tolist(), chunk.ply[part].tolist(), strict=True))
            for number, place in enumerate(places):
                rows = slice(number * N_POINTS, (number + 1) * N_POINTS)
                for latent in self.wanted[place]:
                    acts = torch.where(indices[rows] == latent, values[rows], 0).sum(dim=1)
                    found[(latent, *place)] = acts.cpu().numpy()
        return self.answer(len(chunk.ply), found)
