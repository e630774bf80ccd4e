"""exp, erf, tanh and sigmoid as polynomials, which run in vectors.

The C library's take one number at a time. These agree with them to a few units in the last place:
exp after Cephes, erf and tanh by the rational approximations that Eigen uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Call
from tvm_ffi import structural_map

_LOG2_E = 1.44269504088896341
# ln 2 in two parts, so that a multiple of it can be taken away without loss.
_LN_2_HIGH, _LN_2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_EXP_LEAST, _EXP_MOST = -87.33654, 88.72283

_ERF_MOST = 4.0
_ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_TANH_MOST = 7.90531110763549805
_TANH_ABOVE = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_BELOW = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)


def in_vectors(value: Any) -> Any:
    """An expression whose float functions are polynomials."""

    def rewrite(call: Any) -> Any:
        write = _FUNCTIONS.get(getattr(call.op, "name", ""))
        if write is None or str(call.ty.dtype) != "float32":
            return call
        return _named(call.args[0], write)

    return structural_map(value, [(Call, rewrite)])


def _named(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body` of a value that is computed once."""
    var = tirx.Var("x", value.ty)
    return tirx.Let(var, value, body(var))


def _float(number: float) -> Any:
    return tirx.const(number, "float32")


def _polynomial(at: Any, factors: Sequence[float]) -> Any:
    total = _float(factors[0])
    for factor in factors[1:]:
        total = total * at + _float(factor)
    return total


def _exp(x: Any) -> Any:
    def with_power(bounded: Any) -> Any:
        rounded = tirx.floor(bounded * _float(_LOG2_E) + _float(0.5))
        return _named(rounded, lambda power: with_rest(bounded, power))

    def with_rest(bounded: Any, power: Any) -> Any:
        rest = bounded - power * _float(_LN_2_HIGH) - power * _float(_LN_2_LOW)
        return _named(rest, lambda rest: scaled(rest, power))

    def scaled(rest: Any, power: Any) -> Any:
        mantissa = _polynomial(rest, _EXP) * rest * rest + rest + _float(1.0)
        # Half of the power, twice: 2^128 is no number, though e^88.7 is.
        half = tirx.shift_right(power.astype("int32"), tirx.const(1, "int32"))
        return mantissa * _two_to(half) * _two_to(power.astype("int32") - half)

    bounded = tirx.max(tirx.min(x, _float(_EXP_MOST)), _float(_EXP_LEAST))
    value = _named(bounded, with_power)
    value = tirx.Select(x > _float(_EXP_MOST), tirx.const(float("inf"), "float32"), value)
    value = tirx.Select(x < _float(_EXP_LEAST), _float(0.0), value)
    return tirx.Select(tirx.isnan(x), x, value)


def _two_to(power: Any) -> Any:
    bits = tirx.shift_left(power + tirx.const(127, "int32"), tirx.const(23, "int32"))
    return tirx.reinterpret("float32", bits)


def _rational(most: float, above: Sequence[float], below: Sequence[float]) -> Callable[[Any], Any]:
    """An odd function that is constant beyond `most`."""

    def write(x: Any) -> Any:
        def quotient(bounded: Any) -> Any:
            return _named(
                bounded * bounded,
                lambda square: bounded * _polynomial(square, above) / _polynomial(square, below),
            )

        bounded = tirx.max(tirx.min(x, _float(most)), _float(-most))
        return tirx.Select(tirx.isnan(x), x, _named(bounded, quotient))

    return write


def _sigmoid(x: Any) -> Any:
    return _float(1.0) / (_float(1.0) + _named(_float(0.0) - x, _exp))


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": _exp,
    "tirx.erf": _rational(_ERF_MOST, _ERF_ABOVE, _ERF_BELOW),
    "tirx.tanh": _rational(_TANH_MOST, _TANH_ABOVE, _TANH_BELOW),
    "tirx.sigmoid": _sigmoid,
}
