"""A freeze and a thaw of one layer with its optimizer's state, against the layer's dense training step."""

SUITE, PARTS = "all", ("swap",)


def test_swap(timed):
    timed()
