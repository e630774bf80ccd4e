"""The operators that a bundle's graph may name; anything else is refused before it is looked up.

All are pure functions of their arguments: nothing here reads files, keeps state or runs code. They
are core ATen (torch's own tag, by which a test holds this list) without what changes its arguments,
draws random numbers, or shows memory as it lies there, without gradients; and larger operators,
which torch would take apart, where a name says more to those who read graphs, or runs faster.
"""

from __future__ import annotations


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


_LAYERS = _aten(
    """
    conv1d.default conv2d.default conv2d.padding convolution.default
    conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input conv3d.default
    linear.default addmm.default mm.default bmm.default baddbmm.default matmul.default
    einsum.default embedding.default
    batch_norm.default _native_batch_norm_legit_no_training.default
    layer_norm.default native_layer_norm.default group_norm.default native_group_norm.default
    instance_norm.default rms_norm.default
    adaptive_avg_pool1d.default adaptive_avg_pool2d.default _adaptive_avg_pool2d.default
    adaptive_max_pool2d.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
    max_pool1d.default max_pool2d.default max_pool2d_with_indices.default
    scaled_dot_product_attention.default
    dropout.default feature_dropout.default
    pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default unfold.default
    im2col.default col2im.default
    _adaptive_avg_pool3d.default avg_pool3d.default max_pool3d_with_indices.default
    _native_batch_norm_legit.no_stats _embedding_bag.default
    _cdist_forward.default _pdist_forward.default _fft_r2c.default _fft_c2r.default
    _fft_c2c.default view_as_complex.default view_as_real.default
    """
)
_ACTIVATIONS = _aten(
    """
    relu.default relu6.default hardtanh.default leaky_relu.default prelu.default elu.default
    celu.default selu.default gelu.default silu.default mish.default softplus.default
    hardswish.default hardsigmoid.default sigmoid.default tanh.default erf.default
    softmax.int _softmax.default log_softmax.int _log_softmax.default
    clamp.default clamp.Tensor clamp_min.default clamp_max.default
    """
)
_ARITHMETIC = _aten(
    """
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor
    mul.Tensor mul.Scalar div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode
    floor_divide.default remainder.Scalar
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar sqrt.default rsqrt.default reciprocal.default
    square.default exp.default log.default neg.default abs.default sign.default
    floor.default ceil.default round.default sin.default cos.default
    maximum.default minimum.default addcmul.default addcdiv.default lerp.Scalar
    mean.default mean.dim sum.default sum.dim_IntList prod.dim_int amax.default amin.default
    max.dim min.dim var.correction var.dim var_mean.correction std.correction
    norm.ScalarOpt_dim linalg_vector_norm.default cumsum.default cumprod.default
    logcumsumexp.default argmax.default
    eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor
    gt.Scalar gt.Tensor ge.Scalar ge.Tensor
    logical_not.default logical_and.default logical_or.default bitwise_not.default
    bitwise_and.Tensor bitwise_or.Tensor where.self where.Scalar where.ScalarSelf
    where.ScalarOther
    masked_fill.Scalar masked_fill.Tensor tril.default triu.default
    acos.default acosh.default asin.default asinh.default atan.default atan2.default atanh.default
    cosh.default sinh.default tan.default expm1.default log10.default log1p.default log2.default
    trunc.default fmod.Scalar fmod.Tensor remainder.Tensor
    any.default any.dim any.dims argmin.default prod.default isinf.default isnan.default
    bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar bitwise_xor.Tensor logical_xor.default
    sort.default topk.default
    """
)
_SHAPES = _aten(
    """
    reshape.default view.default _unsafe_view.default view_as.default
    flatten.using_ints unflatten.int
    transpose.int permute.default t.default movedim.int movedim.intlist swapaxes.default
    unsqueeze.default squeeze.default squeeze.dim squeeze.dims
    expand.default expand_as.default repeat.default repeat_interleave.self_int tile.default
    cat.default concat.default stack.default
    select.int slice.Tensor narrow.default index_select.default index.Tensor gather.default
    unbind.int split.Tensor split.sizes split_with_sizes.default chunk.default
    tensor_split.sections
    slice_scatter.default select_scatter.default copy.default
    roll.default flip.default pad.default constant_pad_nd.default
    reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default
    replication_pad2d.default replication_pad3d.default
    upsample_nearest2d.default upsample_nearest2d.vec upsample_bilinear2d.default
    upsample_bilinear2d.vec upsample_bicubic2d.default upsample_bicubic2d.vec
    _upsample_bilinear2d_aa.default _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.default
    grid_sampler.default
    grid_sampler_2d.default diagonal.default index_copy.default
    index_put.default masked_scatter.default
    nonzero.default scatter.src scatter.value scatter_add.default scatter_reduce.two
    clone.default contiguous.default alias.default detach.default lift_fresh_copy.default
    to.dtype _to_copy.default type_as.default sym_size.int sym_numel.default
    """
)
_CREATION = _aten(
    """
    arange.default arange.start arange.start_step linspace.default full.default full_like.default
    fill.Scalar fill.Tensor
    zeros.default zeros_like.default new_zeros.default ones.default ones_like.default
    new_ones.default new_full.default scalar_tensor.default eye.default meshgrid.indexing
    """
)
_PYTHON = frozenset(
    f"operator.{name}"
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")
)

OPS: frozenset[str] = _LAYERS | _ACTIVATIONS | _ARITHMETIC | _SHAPES | _CREATION | _PYTHON
