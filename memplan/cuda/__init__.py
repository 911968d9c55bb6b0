"""What CUDA kernels and libraries allocate on their way: functions of card and shapes, each with its source."""
