"""batch_norm_act by the Triton kernels of model_batch_norm: one model, whose images are in channels_last."""

from kr_fast.kernels.batched import model_batch_norm as kernels


def _models(images):
    """``[N, C, H, W]`` as ``[1, N, H, W, C]``, contiguous."""
    return None if images is None else images.permute(0, 2, 3, 1)[None]


def _images(models):
    return models[0].permute(0, 3, 1, 2)


def forward(call):
    """See kr_fast.ops.nn.batch_norm_act; arguments are checked there."""
    y, mean, var = kernels.forward(call._replace(x=_models(call.x), residual=_models(call.residual)))
    return _images(y), mean[0], var[0]


def backward(call):
    """The gradients of x, weight and bias, and that behind the ReLU where it is asked for (else an empty tensor)."""
    images = (_models(each) for each in (call.grad, call.x, call.y))
    options = (call.weight, call.mean, call.var, call.relu, call.passes, call.eps)
    out, grad_weight, grad_bias, passed = kernels.backward((*images, *options), call.bias)
    return _images(out), grad_weight[0], grad_bias[0], _images(passed) if call.passes else passed
