"""The two training engines: autograd on any device, and the fused step on CUDA."""
