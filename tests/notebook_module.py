"""The notebook's MSAE as a module, against which model files are checked."""

import torch


class NotebooksModule(torch.nn.Module):
    """Module with the parameters, buffers and arithmetic of the notebook's MSAE, as its documentation gives them."""

    def __init__(self, input_dim: int, hidden_dim: int, k_levels: list[int], weighting: str) -> None:
        super().__init__()
        self.k_levels, self.weighting = k_levels, weighting
        self.b_pre = torch.nn.Parameter(torch.empty(input_dim))
        self.W_enc = torch.nn.Parameter(torch.empty(hidden_dim, input_dim))
        self.W_dec = torch.nn.Parameter(torch.empty(input_dim, hidden_dim))
        self.register_buffer("activation_counts", torch.empty(hidden_dim))
        self.register_buffer("total_samples", torch.empty(()))

    def reconstruct(self, x: torch.Tensor, k: int) -> torch.Tensor:
        pre_acts = torch.relu((x - self.b_pre) @ self.W_enc.T)
        values, indices = torch.topk(pre_acts, k)
        return torch.zeros_like(pre_acts).scatter(-1, indices, values) @ self.W_dec.T + self.b_pre
