"""kkt_jax: from a trained classifier's weights back to a generator of its training data.

An implementation of *Generator Born from Classifier* (Yu and Wang, NeurIPS 2023) as pure functions on pytrees. The
modules, in the order of the method:

- `kkt_jax.classifier`: what the library needs of a classifier.
- `kkt_jax.jacobians`: per-sample parameter Jacobians.
- `kkt_jax.homogeneity`: the rates Lambda (Eqs. 8-10).
- `kkt_jax.conditions`: what the weighted gradients must add up to (Eqs. 2a, 4).
- `kkt_jax.losses`: margins, stationarity, duality and their sum (Eqs. 5-7, 13).
- `kkt_jax.priors`: total variation and the other priors that choose among the solutions.
- `kkt_jax.multipliers`: the KKT multipliers mu.
- `kkt_jax.networks`: flax classifiers and the multiplier network.
- `kkt_jax.generators`: flax generators and their last layers.
- `kkt_jax.pretrain`: gradient descent to the convergence point.
- `kkt_jax.training`: the joint training of theta, eta and alpha (Algorithms 1 and 2).
- `kkt_jax.accumulation`: batches larger than memory, with an exact gradient.
- `kkt_jax.parallel`: many devices and processes.
- `kkt_jax.subject`: anybody's classifier, as its owner describes it.
- `kkt_jax.weights`: its parameters, from files that nobody vouches for.
- `kkt_jax.relaxation`: relaxed gates in a network that somebody else wrote.
- `kkt_jax.symmetries`: how far a classifier is from every KKT point, from its weights alone.
- `kkt_jax.diagnostics`: how well a classifier satisfies its own conditions.
- `kkt_jax.first_layer`: what the first layer gives away: the data's span and moments.
- `kkt_jax.last_layer`: what the last layer gives away: the data's margin.
- `kkt_jax.metrics`: how near, how diverse and how recognisable samples are.
- `kkt_jax.checkpoint`: saving and resuming.
"""
