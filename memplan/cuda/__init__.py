"""What CUDA kernels and libraries allocate on their way: pure functions of a card and of shapes, each with its
source."""
