"""What the kernel keeps of a directory is what the directory is, or it is told to drop it."""

from hypothesis import given
from hypothesis import strategies as st

from fuse.listings import Listings

INO = 7
STEPS = st.lists(
    st.one_of(
        st.just(("open",)),
        st.just(("change",)),
        st.just(("expire",)),
        st.just(("other",)),
        st.tuples(st.just("page"), st.booleans(), st.integers(0, 2)),
    ),
    max_size=40,
)


@given(STEPS, st.integers(1, 3))
def test_what_is_kept_is_of_the_edition_of_now(steps: list[tuple[object, ...]], remembered: int) -> None:
    """However readings overlap, whatever is forgotten meanwhile. This kernel keeps all that it is given."""
    listings = Listings(remembered)
    edition, known = 1, True
    kernel: list[int | None] = []
    for step in steps:
        match step:
            case ("open",):
                if listings.opened(INO, edition if known else None):
                    assert known
                    assert set(kernel) == {edition}
                else:
                    kernel.clear()
            case ("change",):
                edition, known = edition + 1, True
            case ("expire",):
                known = False
            case ("other",):
                listings.given(INO + len(kernel) + 1, 1, first=True)
            case ("page", bool(first), int(age)):  # of a reading that began so many changes ago
                of = max(1, edition - age) if known else None
                listings.given(INO, of, first=first)
                kernel.append(of)


def test_a_listing_that_was_given_whole_is_kept_until_it_changes() -> None:
    listings = Listings()
    assert not listings.opened(INO, 3)
    listings.given(INO, 3, first=True)
    listings.given(INO, 3, first=False)
    assert listings.opened(INO, 3)
    assert listings.opened(INO, 3)
    assert not listings.opened(INO, None), "nobody knows whether it holds"
    listings.given(INO, 3, first=True)
    assert listings.opened(INO, 3)
    assert not listings.opened(INO, 4)
    assert not listings.opened(INO, 4)


def test_pages_of_two_editions_are_dropped() -> None:
    listings = Listings()
    listings.given(INO, 3, first=True)
    listings.given(INO, 4, first=False)
    assert not listings.opened(INO, 3)
    listings.given(INO, 3, first=True)
    listings.given(INO, None, first=False)
    assert not listings.opened(INO, 3)
