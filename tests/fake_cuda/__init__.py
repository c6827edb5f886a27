"""A fake CUDA device: tensors of `cuda:0` without a GPU and without memory, so tests can watch what a GPU would run.

    harness.run_on_fake_cuda(function, ...)   calls function(...) in a child process whose torch has such a device
    recorder.Recorder                         notes host syncs, ops that mix devices, and bytes

Torch's FakeTensorMode runs every op on shapes, types and devices alone. Without a GPU it stops at the first tensor of
one, for lack of a device guard: guard.cpp is one that does nothing. It changes the whole process, hence the child. In
a torch built for CUDA it takes the place of CUDA's own, and the child sees no real GPU. No number is computed, so tests
of this folder are about devices, shapes, types, order and bytes.
"""
