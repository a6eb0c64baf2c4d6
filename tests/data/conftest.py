import numpy as np
import pytest
from activation_files import INPUT_DIM, N_ROWS


@pytest.fixture
def rows() -> np.ndarray:
    """Rows whose channels have different means and scales. Channel 2 is constant."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N_ROWS, INPUT_DIM)) * np.arange(1, INPUT_DIM + 1) + np.arange(INPUT_DIM) * 10
    x[:, 2] = 3.5
    return x.astype(np.float32)


@pytest.fixture
def games() -> np.ndarray:
    return np.arange(N_ROWS) // 10
