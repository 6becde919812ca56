"""Plan to results: pieces, dispatch by size, CUDA graphs, cache, and the front doors of vLLM and torch.compile."""
