"""Estimators of scikit-learn are the classifiers that they say they are, and what is none is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, PowerTransformer, StandardScaler
from sklearn.svm import LinearSVC

import kkt_jax

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
DATA = {2: load_breast_cancer(return_X_y=True), 3: load_wine(return_X_y=True)}


def network(**settings):
  return MLPClassifier((6, 5), max_iter=40, random_state=0, **settings)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
  "last",
  [LogisticRegression(), network(), network(activation="tanh"), network(activation="logistic"),
   network(activation="identity")],
  ids=["linear", "relu", "tanh", "logistic", "identity"],
)  # fmt: skip
def test_probabilities_are_those_of_the_estimator(last, classes):
  x, y = DATA[classes]
  for scaler in (StandardScaler(), MinMaxScaler()):
    estimator = make_pipeline("passthrough", scaler, last).fit(x, y)
    own = kkt_jax.from_sklearn(estimator)
    assert (own.input_shape, own.labels, own.value_range) == ((x.shape[1],), tuple(range(classes)), None)
    found = jax.nn.softmax(own.predict(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(found, estimator.predict_proba(x), atol=1e-5)


def test_logits_are_the_decision_function_and_names_and_layouts_are_those_of_scikit_learn():
  x, y = DATA[3]
  x = StandardScaler().fit_transform(x)
  linear = LogisticRegression().fit(x, y)
  own = kkt_jax.from_sklearn(linear)
  np.testing.assert_allclose(own.predict(jnp.asarray(x, jnp.float32)), linear.decision_function(x), atol=1e-5)
  assert {name: leaf.shape for name, leaf in own.params.items()} == {"coef_": (3, 13), "intercept_": (3,)}
  mlp = network().fit(x, y)
  own = kkt_jax.from_sklearn(mlp)
  assert kkt_jax.tensor_names(own.params) == [f"{kind}/{i}" for kind in ("coefs_", "intercepts_") for i in range(3)]
  np.testing.assert_array_equal(own.params["coefs_"]["1"], mlp.coefs_[1].astype(np.float32))


def test_the_weights_of_a_converged_estimator_are_stationary_with_its_own_data_and_no_others():
  x, y = DATA[3]
  x = StandardScaler().fit_transform(x)
  linear = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(x, y)
  own = kkt_jax.from_sklearn(linear, weight_decay=lambda name: 1 / (0.1 * len(x)) if name == "coef_" else 0.0)

  def gradient(x):
    loss = lambda params: -jnp.mean(jax.nn.log_softmax(own.apply_fn(params, x))[jnp.arange(len(y)), y])
    return jax.grad(loss)(own.params)["coef_"]

  decay = own.params["coef_"] / (0.1 * len(x))
  apart = [float(jnp.linalg.norm(gradient(jnp.asarray(own)) + decay)) for own in (x, x[::-1])]
  assert apart[0] < 1e-4 * float(jnp.linalg.norm(decay)) < 1e-2 * apart[1]


def test_labels_are_the_classes_where_they_are_integers():
  x, y = DATA[2]
  fit = lambda y: LogisticRegression(max_iter=50).fit(MinMaxScaler().fit_transform(x), y)
  assert kkt_jax.from_sklearn(fit(3 + 4 * y)).labels == (3, 7)
  assert kkt_jax.from_sklearn(fit(np.array(["a", "b"])[y])).labels == (0, 1)
  assert kkt_jax.from_sklearn(fit(y), labels=(8, 9)).labels == (8, 9)


@pytest.mark.parametrize(
  ("estimator", "said"),
  [
    (network(), "estimator must be an MLPClassifier, .* and fitted; got MLPClassifier"),
    (LinearSVC(), "got LinearSVC"),
    (LinearRegression(), "got LinearRegression"),
    (MLPRegressor(hidden_layer_sizes=(3,), max_iter=5), "got MLPRegressor"),
    (make_pipeline(PowerTransformer(), LogisticRegression()), "scale columns one by one .* got PowerTransformer"),
    (make_pipeline(PCA(3), LogisticRegression()), "scale columns one by one .* got PCA"),
    (make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss")), "got SGDClassifier"),
  ],
)
def test_what_is_no_such_classifier_is_refused(estimator, said):
  x, y = DATA[3]
  if not isinstance(estimator, MLPClassifier):
    estimator.fit(x, y)
  with pytest.raises(ValueError, match=said):
    kkt_jax.from_sklearn(estimator)


def test_several_labels_at_once_are_refused():
  x, y = DATA[3]
  with pytest.raises(ValueError, match="one label per sample"):
    kkt_jax.from_sklearn(network().fit(x, np.eye(3, dtype=int)[y] | np.eye(3, dtype=int)[(y + 1) % 3]))
