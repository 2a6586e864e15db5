"""A few turns of the soak run: it works, and what it checks holds. ``make soak`` goes on for hours."""
from soak import run


def test_a_few_random_turns(capfd):
    run.main(3 / 3600, 1)
    assert "every byte was right, and nothing was left" in capfd.readouterr().out
