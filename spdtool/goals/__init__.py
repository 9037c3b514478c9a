"""Goals of a run: what speed-up, size or score asks for, the shape or sparsity that reaches it, and the promise."""
