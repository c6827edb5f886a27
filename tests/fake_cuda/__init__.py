"""A fake CUDA device: tensors of `cuda:0` without a GPU and without memory, so tests can watch what a GPU would run.

    harness.run_on_fake_cuda(function, ...)   calls function(...) in a child process whose torch has such a device
    recorder.Recorder                         notes host syncs, ops that mix devices, and bytes

Torch's FakeTensorMode runs every op on shapes, types and devices alone. On a torch built for CPUs it stops at the first
tensor of a GPU, for lack of a device guard: guard.cpp is one that does nothing. It changes the whole process, hence the
child. No number is computed, so tests of this folder are about devices, shapes, types, order and bytes.
"""
