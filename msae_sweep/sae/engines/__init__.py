"""Two ways to train: autograd on any device, and the fused step on CUDA."""
