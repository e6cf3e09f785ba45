"""One file per op family: check arguments, autograd, dispatch. The kernels live below, in :mod:`kr_fast.backends`."""
