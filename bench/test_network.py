"""Training steps of networks: dense SGD, a coarse step, a pair of a fine and a coarse one with freeze and thaw."""

SUITE = "network"


def test_network(timed):
    timed()
