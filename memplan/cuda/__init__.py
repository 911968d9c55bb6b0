"""What CUDA kernels and libraries allocate on the way: functions of card and shapes, each with its source."""
