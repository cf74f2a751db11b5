"""The verdict of the bench: a floor that cannot be missed would settle no argument."""

from bench.figures import Figures, Run


def run(system: str, writes_per_s: float, p50_us: float, *, number: int = 0) -> Run:
    return Run("tmpfs", "4k QD1", system, number, writes_per_s, 0.0, p50_us, p50_us, p50_us, {})


def test_a_mirror_at_the_floor_passes() -> None:
    """Breaks in the field: a good change is refused."""
    assert not Figures([run("mirror", 800, 125), run("sketch", 1000, 100)]).below_floor()


def test_a_slow_mirror_fails() -> None:
    """Breaks in the field: writes become slower from release to release, unseen."""
    assert Figures([run("mirror", 790, 125), run("sketch", 1000, 100)]).below_floor()


def test_a_busy_neighbour_of_the_sketch_does_not_pass_the_mirror() -> None:
    """Breaks in the field: a burst of other work during the sketch's run hides a slow mirror."""
    assert Figures([run("mirror", 800, 200), run("sketch", 1000, 100)]).below_floor()


def test_no_figure_is_no_proof() -> None:
    """Breaks in the field: a bench whose sketch did not run calls the mirror fast."""
    assert Figures([run("mirror", 800, 125)]).below_floor()


def test_ratios_are_taken_within_a_round() -> None:
    """Breaks in the field: a machine that slows down between rounds bends the ratio."""
    runs = [run("mirror", 400, 1, number=1), run("mirror", 900, 1, number=0)]
    runs += [run("sketch", 1000, 1, number=0), run("sketch", 500, 1, number=1)]
    assert Figures(runs).ratios("tmpfs", "4k QD1", "sketch") == [0.9, 0.8]
