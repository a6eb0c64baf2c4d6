"""The actors of both passes over boards: a chunk → activations of a block → a model's codes of every point."""

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
from msae_sweep.go.pipeline import BATCH, Boards, unpacked
from msae_sweep.go.planes import planes
from msae_sweep.go.top_positions import FiringStatistics, TopPositions, board_maxima, top_positions

if TYPE_CHECKING:
    from msae_sweep.go.top_activations import TopActivationSettings

_PRE_ACTS = 1 << 28
"""Pre_acts that are held at a time: 1 GiB."""


class _Codes:
    """Boards → codes of every point; keeps network and model on their device."""

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

    def activations(self, chunk: Boards, part: slice) -> Float[Tensor, "rows filters"]:
        """The block's activations, float32, 361 rows a position from the top left."""
        block, bottom = self.settings.block, self.settings.first_row == "bottom"
        boards = torch.tensor(chunk.boards[part]).to(self.device)
        black_to_move = torch.tensor(chunk.black_to_move[part]).to(self.device)
        x = planes(boards, black_to_move, self.network.choice.dtype)
        tapped = self.network(x.flip(2) if bottom else x, (block,), heads=False).activations[block]
        tapped = tapped.flip(2) if bottom else tapped
        return tapped.permute(0, 2, 3, 1).reshape(-1, self.network.filters).float()

    def parts(self, n: int) -> list[slice]:
        """So many positions, cut into what the device holds at a time."""
        return [slice(start, start + self.batch) for start in range(0, n, self.batch)]

    def answer(self, n: int, found: object) -> dict[str, list[Any]]:
        """The row that says what came of a chunk."""
        device = f"{self.device.type}: {self.network.choice.name} ({self.network.choice.reason})"
        return {"n_positions": [n], "device": [device], "found": [pickle.dumps(found)]}


class TopActivationActor(_Codes):
    """A chunk's `TopPositions` and `FiringStatistics`."""

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """One chunk."""
        chunk = unpacked(batch)
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
    """Where on the board the wanted latents fire."""

    def __init__(
        self, references: list[Any], settings: "TopActivationSettings", wanted: dict[tuple[int, int], list[int]]
    ) -> None:
        super().__init__(references, settings)
        self.wanted = wanted

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """One chunk."""
        found, chunk = {}, unpacked(batch)
        for part in self.parts(len(chunk.ply)):
            values, indices = self.model.encode_sparse(self.activations(chunk, part), self.settings.k)
            places = list(zip(chunk.game_id[part].tolist(), chunk.ply[part].tolist(), strict=True))
            for number, place in enumerate(places):
                rows = slice(number * N_POINTS, (number + 1) * N_POINTS)
                for latent in self.wanted[place]:
                    acts = torch.where(indices[rows] == latent, values[rows], 0).sum(dim=1)
                    found[(latent, *place)] = acts.cpu().numpy()
        return self.answer(len(chunk.ply), found)
