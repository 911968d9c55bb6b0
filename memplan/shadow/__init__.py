"""Eager PyTorch with the numbers taken out.

Tensors here have a shape, a dtype, strides, a storage and a grad history, but no data. Operations
allocate, save for backward and release exactly what their counterparts in PyTorch do; CPython's
reference counting does the rest: when the last reference to a storage goes, its release is written
on the tape, as it would have been in the real run. Nothing here may build a reference cycle.
"""
