"""Relaxed ReLU gates and other precisions, in anybody's network.

The gradient of a ReLU network sees its gates as steps, whose own derivative is 0: the stationarity sum cannot tell a
generator which gates to open. A relaxed gate has the same value and a smooth derivative (Haim et al. 2022). The
function is read as JAX sees it, operation by operation, and every gate in it is given that derivative.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend import core
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.classifier import Classifier, Evaluation, Forward

Result = TypeVar("Result")
#: Primitives that only call, and where their program is.
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}
_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")
_RUN_AGAIN = ("checkpoint", "remat2")  # what `jax.checkpoint` is called, depending on the version
_GUARD = 1e-3  # max(norm, 1e-6) keeps a division finite: a positive constant below this makes no gate


def relaxed_relu(x: jax.Array, sharpness: float) -> jax.Array:
  """ReLU with a smooth derivative, ``sigmoid(sharpness * x)`` (Haim et al. 2022).

  The value is ReLU's. In the stationarity sum the smooth derivative stands for the sub-differential at the kinks, and
  it lets the sum's own gradient see the gates, which for ReLU's step function is 0 almost everywhere.

  Args:
    x: pre-activations, any shape.
    sharpness: k, positive; 20 to 500 are usual, below 10 the sum is biased.

  Returns:
    max(x, 0).

  >>> print(relaxed_relu(jnp.array([-1.0, 2.0]), 20.0), jax.grad(relaxed_relu)(0.0, 20.0))
  [0. 2.] 0.5
  """
  return _mixed(jax.nn.relu(x), jnp.zeros_like(x), x, jax.nn.sigmoid(sharpness * x))


@jax.custom_jvp
def _mixed(value: jax.Array, below: jax.Array, above: jax.Array, gate: jax.Array) -> jax.Array:
  """The value, with the derivatives of ``below`` and ``above`` mixed by the gate, from 0 to 1."""
  del below, above, gate
  return value


@_mixed.defjvp
def _mixed_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
  value, _, _, gate = primals
  _, below, above, _ = tangents
  return value, gate * above + (1 - gate) * below


def relax_gates(apply_fn: Callable[[PyTree, jax.Array], Result], *, sharpness: float) -> Callable[..., Result]:
  """The same function with a smooth derivative of every gate: the slopes of both sides mixed by ``sigmoid(k x)``.

  What it finds, also in functions that are jitted or checkpointed (`jax.checkpoint`, ``nn.remat``) and in the bodies of
  `jax.lax.scan`, ``while_loop`` and ``cond``:

  =========================  ================================================================
  gate                       written as
  =========================  ================================================================
  ReLU                       ``jax.nn.relu``, ``jnp.maximum(x, 0)``, ``jnp.clip(x, 0)``,
                             ``jnp.where(x > 0, x, 0)``, ``x * (x > 0)``
  leaky and parametric ReLU  ``jax.nn.leaky_relu``, ``nn.PReLU``, ``jnp.maximum(x, 0.1 * x)``
  ReLU6, both kinks          ``jax.nn.relu6``, ``jnp.clip(x, 0, 6)``
  negative part              ``jnp.minimum(x, 0)``
  =========================  ================================================================

  Left as they are: smooth functions (GELU, softplus, ELU), pooling, functions with a custom derivative unless they are
  a mere ReLU, and guards of a variance or a norm such as ``max(mean(x^2) - mean(x)^2, 0)``.

  Args:
    apply_fn: ``(params, x[M, ...]) -> logits[M, C]``.
    sharpness: k, positive; 20 to 500 are usual.

  Returns:
    ``(params, x)`` or ``(params, x, free)``, of the same values. ``free`` are logits of gates at their kinks, arrays
    like `pre_activations` in its order: their mix is ``(1 - b) s + b sigmoid(free)`` with ``s = sigmoid(k x)`` and
    ``b = 4 s (1 - s)``. Gates without an array of their shape are not free. When the function is called or
    traced, it raises a ValueError if ``apply_fn`` has other kinks (``jnp.clip(x, -1, 1)``, ``jnp.maximum(x, y)``) and
    no gate that could be relaxed.

  Raises:
    ValueError: ``sharpness`` is not positive.

  >>> relaxed = relax_gates(lambda w, x: jax.nn.relu(w * x), sharpness=20.0)
  >>> float(jax.grad(lambda w: relaxed(w, jnp.ones(())))(0.0)), float(relaxed(2.0, jnp.ones(())))  # at the kink
  (0.5, 2.0)
  """
  _checks.check_positive("sharpness", sharpness)

  def with_relaxed_gates(params: PyTree, x: jax.Array, free: Sequence[jax.Array] = ()) -> Result:
    following = iter(free)

    def gate(root: jax.Array) -> jax.Array:
      given, smooth = next(following, None), jax.nn.sigmoid(sharpness * root)
      if given is None or given.shape != root.shape:
        return smooth
      return smooth + 4 * smooth * (1 - smooth) * (jax.nn.sigmoid(given.astype(root.dtype)) - smooth)

    report = _Report(gate, lambda root: jax.nn.sigmoid(sharpness * root))
    result: Result = _relaxed(apply_fn, params, x, report)
    if report.kinks and not report.gates:
      raise ValueError(
        f"apply_fn must be smooth or have gates that can be relaxed; it has {', '.join(dict.fromkeys(report.kinks))}"
        " but no gate that is recognised. Write its gates as jax.nn.relu, or use exact ones (sharpness None or 0)."
      )
    return result

  return with_relaxed_gates


def gates(apply_fn: ApplyFn, params: PyTree, x: Any) -> list[str]:
  """The operations that `relax_gates` relaxes, in order.

  >>> gates(lambda w, x: jnp.tanh(jax.nn.relu6(w * x)), 1.0, jnp.ones(3))
  ['max', 'min']
  """
  report = _Report()
  jax.eval_shape(lambda params, x: _relaxed(apply_fn, params, x, report), params, x)
  return report.gates


@_checks.annotated
@functools.partial(jax.jit, static_argnums=0)
def pre_activations(apply_fn: ApplyFn, params: PyTree, x: Any) -> list[jax.Array]:
  """The arguments of all gates outside loops and branches, in order; a gate's kink is at 0.

  >>> pre_activations(lambda w, x: jnp.tanh(jax.nn.relu6(w * x)), 2.0, jnp.array([-1.0, 2.0]))[0].tolist()
  [-2.0, 4.0]
  """
  report = _Report()
  _relaxed(apply_fn, params, x, report)
  return report.roots


def relaxed(classifier: Classifier, sharpness: float | None) -> Classifier:
  """A classifier with relaxed gates in its derivatives; with exact ones if ``sharpness`` is None or 0."""
  if not sharpness:
    return dataclasses.replace(classifier, forward=classifier.exact_forward)
  classifier = dataclasses.replace(classifier, forward=Relaxed(classifier.exact_forward, sharpness))
  probe = jax.ShapeDtypeStruct((2, *classifier.input_shape), jnp.result_type(float))
  jax.eval_shape(lambda params, x: classifier.forward(params, x, True), classifier.params, probe)  # or it complains now
  return classifier


@dataclasses.dataclass(frozen=True)
class Relaxed:
  """``forward`` of a classifier with relaxed gates; equal if what is relaxed is.

  Attributes:
    exact: ``forward`` with its own derivatives.
    sharpness: of the gates, see `relax_gates`.
  """

  exact: Forward
  sharpness: float

  def __call__(self, params: PyTree, x: jax.Array, train: bool, free: Sequence[jax.Array] = ()) -> Evaluation:
    """See `kkt_jax.classifiers.Classifier`; ``free`` are those of `relax_gates`."""
    return relax_gates(lambda params, x: self.exact(params, x, train), sharpness=self.sharpness)(params, x, free)


def given_gates(
  apply_fn: Callable[[PyTree, jax.Array], Result],
) -> Callable[[PyTree, jax.Array, Sequence[jax.Array]], Result]:
  """The same function with a derivative whose gates are given, instead of decided by the sign of their arguments.

  At a kink the gate of a stationary point is any number from 0 to 1: there gradient descent rests between the slopes.

  Args:
    apply_fn: as for `relax_gates`.

  Returns:
    ``(params, x, gates)``, of the same values. The gates are arrays like `pre_activations`, in its order: the share of
    the slope above the kink. Gates in loops and branches stay exact.

  >>> fixed = given_gates(lambda w, x: jax.nn.relu(w * x))
  >>> jax.grad(lambda w: fixed(w, jnp.ones(1), [jnp.array([0.3])])[0])(0.0).tolist()
  0.30000001192092896
  """

  def with_given_gates(params: PyTree, x: jax.Array, gates: Sequence[jax.Array]) -> Result:
    following = iter(gates)
    return _relaxed(apply_fn, params, x, _Report(lambda root: next(following).astype(root.dtype)))

  return with_given_gates


def computed_in(apply_fn: ApplyFn, dtype: DTypeLike) -> ApplyFn:
  """The same function computed in another precision, with logits and gradients in the dtypes of its arguments.

  >>> rough = computed_in(lambda w, x: w * x, jnp.bfloat16)
  >>> print(rough(1.001, jnp.ones(1)), jax.grad(lambda w: rough(w, jnp.ones(1))[0])(1.001).dtype)
  [1.] float32
  """

  def rough(params: PyTree, x: jax.Array, *free: Any) -> jax.Array:
    return apply_fn(*jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x)), *free).astype(x.dtype)

  return rough


class _Value(NamedTuple):
  """A value of the program, and what is known of it.

  Attributes:
    array: the value.
    constant: what all its entries equal.
    factors: the two values of which it is the product.
    step: (v, below, above, c): it is ``below`` where v < c and ``above`` where v > c.
    flags: "square"; "variance", a mean less a square; "gated", the output of a gate.
    depends: whether it depends on the function's arguments; random numbers that it draws by itself do not.
  """

  array: Any
  constant: float | None = None
  factors: tuple["_Value", ...] = ()
  step: tuple[Any, float, float, float] | None = None
  flags: frozenset[str] = frozenset()
  depends: bool = True

  def slopes(self, root: Any) -> tuple[Any, Any] | None:
    """Below and above 0 of ``root``, the factor that makes this value of it; None if there is none."""
    if self.constant == 0:
      return 0.0, 0.0
    if self.array is root:
      return 1.0, 1.0
    for value, other in zip(self.factors, self.factors[::-1], strict=True):
      if value.array is root:
        if other.step and other.step[0] is root and other.step[3] == 0:
          return other.step[1:3]
        slope = other.array if other.constant is None else other.constant
        return slope, slope
    return None


@dataclasses.dataclass
class _Report:
  """How gates are opened, outside and inside loops and branches, and which there were.

  Attributes:
    gate: ``root -> gate``: the share of the slope above the kink in the derivative, from 0 to 1.
    inside: the same in the bodies of loops and branches.
    gates: the operations that were gates.
    kinks: those that have a kink and are none.
    roots: the arguments of the gates outside loops and branches.
  """

  gate: Callable[[jax.Array], jax.Array] = lambda root: _step(root)
  inside: Callable[[jax.Array], jax.Array] = lambda root: _step(root)
  gates: list[str] = dataclasses.field(default_factory=list)
  kinks: list[str] = dataclasses.field(default_factory=list)
  roots: list[jax.Array] = dataclasses.field(default_factory=list)


def _step(root: jax.Array) -> jax.Array:
  """The exact gate; 0 at the kink, as ReLU's."""
  return (root > 0).astype(root.dtype)


def _relaxed(apply_fn: Callable[[PyTree, Any], Any], params: PyTree, x: Any, report: _Report) -> Any:
  closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, x)
  values = _evaluate(closed, list(map(_Value, jax.tree.leaves((params, x)))), report)
  return jax.tree.unflatten(jax.tree.structure(shape), [value.array for value in values])


def _evaluate(closed: Any, arguments: Sequence[_Value], report: _Report) -> list[_Value]:
  """Runs a program with its gates relaxed."""
  jaxpr = closed.jaxpr
  known = {v: _Value(constant, depends=False) for v, constant in zip(jaxpr.constvars, closed.consts, strict=True)}
  known |= dict(zip(jaxpr.invars, arguments, strict=True))

  def read(atom: Any) -> _Value:
    if not isinstance(atom, core.Literal):
      return known[atom]
    constant = float(atom.val) if np.ndim(atom.val) == 0 and np.isreal(atom.val) else None
    return _Value(atom.val, constant=constant, depends=False)

  for equation in jaxpr.eqns:
    inputs, name = [read(atom) for atom in equation.invars], equation.primitive.name
    depends = any(value.depends for value in inputs)
    noted = report if depends else _Report()
    if name in INLINED:
      outputs = _evaluate(equation.params[INLINED[name]], inputs, report)
    elif name == "custom_jvp_call" and _only_gates(equation.params["call_jaxpr"]):
      outputs = _evaluate(equation.params["call_jaxpr"], inputs, report)
    elif name in _RUN_AGAIN:
      outputs = [_Value(array, depends=depends) for array in _checkpointed(equation.params, inputs, noted)]
    else:
      if name not in _OWN_DERIVATIVE:
        equation = equation.replace(params={k: _inside(v, noted) for k, v in equation.params.items()})
      outputs = [_Value(array) for array in run(jaxpr, equation, [value.array for value in inputs])]
      if len(outputs) == 1:
        outputs = [_described(name, inputs, outputs[0], noted)]
      outputs = [value._replace(depends=depends) for value in outputs]
    known |= dict(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def run(jaxpr: Any, equation: Any, arrays: Sequence[Any]) -> list[Any]:
  """One operation of a program on other arrays."""
  variables = {v: a for v, a in zip(equation.invars, arrays, strict=True) if not isinstance(v, core.Literal)}
  alone = jaxpr.replace(constvars=[], invars=list(variables), outvars=equation.outvars, eqns=[equation])
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*variables.values())


def _checkpointed(settings: Any, inputs: Sequence[_Value], report: _Report) -> Sequence[Any]:
  """What a program gives that is to be run again for its derivative; its gates are outside of loops, too."""
  program = settings["jaxpr"]
  closed = program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, [])

  def again(*arrays: Any) -> tuple[list[Any], list[jax.Array]]:
    within = dataclasses.replace(report, roots=[])
    values = _evaluate(closed, list(map(_Value, arrays)), within)
    return [value.array for value in values], within.roots

  again = jax.checkpoint(again, policy=settings["policy"], prevent_cse=settings["prevent_cse"])
  outputs, roots = again(*(value.array for value in inputs))
  report.roots.extend(roots)
  return outputs


def _inside(parameter: Any, report: _Report) -> Any:
  """The programs inside an operation (a loop's body, a branch) with their gates relaxed."""
  report = dataclasses.replace(report, roots=[], gate=report.inside)
  if type(parameter) is tuple:  # named ones hold no programs
    return tuple(_inside(part, report) for part in parameter)
  closed = isinstance(parameter, core.ClosedJaxpr)  # from JAX 0.12 on every program is
  if isinstance(parameter, core.Jaxpr) and not closed:
    return _inside(core.ClosedJaxpr(parameter, []), report).jaxpr
  if not closed:
    return parameter
  run = lambda *arrays: [v.array for v in _evaluate(parameter, list(map(_Value, arrays)), report)]
  return jax.make_jaxpr(run)(
    *(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in parameter.in_avals)
  )


def _only_gates(closed: Any) -> bool:
  """Whether a function with a derivative of its own is `jax.nn.relu` or the like, and nothing else."""
  inner = [(eqn.primitive.name, eqn.params) for eqn in closed.jaxpr.eqns]
  return bool(inner) and all(
    _only_gates(params[INLINED[name]]) if name in INLINED else name in ("max", "min") for name, params in inner
  )


def _described(name: str, inputs: Sequence[_Value], out: _Value, report: _Report) -> _Value:
  """An operation's output with what is known of it, and relaxed if it is a gate."""
  match name:
    case "convert_element_type":
      return inputs[0]._replace(array=out.array, factors=())
    case "broadcast_in_dim" | "reshape" | "squeeze":
      return out._replace(constant=inputs[0].constant)
    case "gt" | "ge" | "lt" | "le":
      for (root, other), rising in ((inputs, name[0] == "g"), (inputs[::-1], name[0] == "l")):
        if other.constant is not None:
          return out._replace(step=(root.array, float(not rising), float(rising), other.constant))
    case "neg":
      return out._replace(factors=(inputs[0], _Value(-1.0, constant=-1.0)))
    case "square" | "integer_pow":
      return out._replace(flags=frozenset({"square"}))
    case "sub" if "square" in inputs[1].flags:
      return out._replace(flags=frozenset({"variance"}))
    case "clamp" if inputs[0].constant == 0:
      low, x, high = inputs
      rectified = _described("max", [x, low], _Value(jnp.maximum(x.array, 0)), report)
      return _described("min", [rectified, high], out, report)
    case "mul":
      square = inputs[0].array is inputs[1].array
      out = out._replace(factors=tuple(inputs), flags=frozenset({"square"} if square else ()))
  if not jnp.issubdtype(jnp.result_type(out.array), jnp.floating):
    return out
  gate = _gate(name, inputs)
  if gate is None:
    report.kinks.extend([name] if _has_kink(name, inputs) else [])
    return out
  report.gates.append(name)
  root, *slopes = gate
  report.roots.append(root)
  below, above = (jnp.zeros_like(root) if isinstance(s, float) and s == 0 else s * root for s in slopes)
  return _Value(_mixed(out.array, below, above, report.gate(root)), flags=frozenset({"gated"}))


def _gate(name: str, inputs: Sequence[_Value]) -> tuple[Any, Any, Any] | None:
  """The root of a gate, whose kink is at 0, and the slopes below and above; None if the operation is none."""
  below: Any
  above: Any
  if name == "select_n" and inputs[0].step and inputs[0].step[3] == 0:
    root, *sides, _ = inputs[0].step
    slopes: list[Any] = [value.slopes(root) for value in inputs[1:]]
    if None in slopes:
      return None
    below, above = slopes[int(sides[0])][0], slopes[int(sides[1])][1]
    learned = not (isinstance(below, float) and isinstance(above, float))
    return (root, below, above) if learned or below < above else None  # where(x > 0, 0, x) guards, as in ELU
  for one, other in (inputs, inputs[::-1]) if name in ("max", "min", "mul") else ():
    if name == "mul" and other.step and other.step[0] is one.array and other.step[1:] == (0.0, 1.0, 0.0):
      return one.array, 0.0, 1.0
    if name == "min" and "gated" in one.flags and other.constant is not None and other.constant > 0:
      return one.array - other.constant, 1.0, 0.0
    if name != "mul" and one.constant is None and "variance" not in one.flags:
      slope = (other.slopes(one.array) or (None,))[0]
      if isinstance(slope, float) and slope != 1:
        return one.array, *sorted((slope, 1.0), reverse=name == "min")
  return None


def _has_kink(name: str, inputs: Sequence[_Value]) -> bool:
  """Whether an operation has a kink, and not just to guard a variance or a norm."""
  if name == "select_n" and inputs[0].step:
    ends = [value for value in inputs[1:] if value.constant is not None or value.array is inputs[0].step[0]]
    return inputs[0].step[3] != 0 and len(ends) == 2 and any(value.constant is None for value in ends)
  constants = [value.constant for value in inputs if value.constant is not None]
  guards = any("variance" in value.flags for value in inputs) or any(0 < c < _GUARD or np.isinf(c) for c in constants)
  return name in ("max", "min", "clamp") and len(constants) < len(inputs) and not guards
