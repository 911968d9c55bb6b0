"""A card that is not there: PyTorch's real CUDA build, its real allocator, and nothing computed.

``card/`` is NVIDIA's driver and libraries in C, as far as somebody reads what they answer; ``build.py``
compiles them for the PyTorch of a program, ``program.py`` finds that, ``launch.py`` starts the program on the
card, ``hook/`` runs inside of it and watches, ``answer.py`` says what was seen.
"""
