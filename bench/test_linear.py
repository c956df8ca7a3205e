"""Linear layers: sparse, dense torch, torch's CSR product, peers."""

SUITE = "linear"


def test_linear(timed):
    timed()
