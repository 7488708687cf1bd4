"""What do my weights reveal? ``python -m experiments.audit`` answers for anybody's classifier."""
