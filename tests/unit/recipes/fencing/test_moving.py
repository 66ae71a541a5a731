"""An image is put out of reach in steps of which each may be the last one, and given its name back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.common.errors import ImageError, UsageError
from nbdserve.exports.moved_images import (
    Marker,
    Standing,
    find_marker,
    marker_beside,
    read_marker,
    write_marker,
)
from recipes.fencing import giving_back, marks, moving
from recipes.fencing.giving_back import free
from recipes.fencing.moving import image_now, put_away, rename_new

TO = "b.example:/srv/vm.raw"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of a guest that has left."""
    path = tmp_path / "vm.raw"
    path.write_bytes(b"disk")
    return path


def names(directory: Path) -> set[str]:
    """What is there."""
    return {path.name for path in directory.iterdir()}


def marker_of(image: Path) -> Marker:
    """What is known of it."""
    place = find_marker(image)
    assert place
    return read_marker(place)


def test_an_image_is_out_of_reach_and_what_is_beside_it_says_why(image: Path) -> None:
    put_away(str(image), "vm", TO)
    assert names(image.parent) == {"vm.raw.moved", "vm.raw.moved.json"}
    assert image_now(str(image)).read_bytes() == b"disk"
    marker = marker_of(image)
    assert (marker.migration, marker.to, marker.standing) == ("vm", TO, Standing.NEEDED)


def test_it_may_be_done_again_and_tells_when_the_guest_went(image: Path) -> None:
    put_away(str(image), "vm", TO)
    before = marker_of(image)
    put_away(str(image), "vm", TO, Standing.OUT_OF_DATE)
    assert marker_of(image) == replace(before, standing=Standing.OUT_OF_DATE)
    assert names(image.parent) == {"vm.raw.moved", "vm.raw.moved.json"}


def test_what_a_death_between_marker_and_rename_has_left_is_put_away_and_given_back(image: Path) -> None:
    marker = Marker(str(image), f"{image}.moved", "vm", TO, 5.0)
    write_marker(marker_beside(image), marker)
    assert image_now(str(image)) == image
    free(image)
    assert names(image.parent) == {"vm.raw"}
    write_marker(marker_beside(image), marker)
    put_away(str(image), "vm", TO)
    assert names(image.parent) == {"vm.raw.moved", "vm.raw.moved.json"}
    assert marker_of(image) == marker


def test_what_a_death_between_rename_and_marker_has_left_of_giving_back_is_given_back(image: Path) -> None:
    put_away(str(image), "vm", TO)
    Path(f"{image}.moved").rename(image)
    free(image)
    assert names(image.parent) == {"vm.raw"}


def test_an_image_that_a_link_leads_to_is_out_of_reach_by_both_names(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    link = other / "link.raw"
    link.symlink_to(image)
    put_away(str(link), "vm", TO)
    assert not link.exists()
    assert not image.exists()
    assert image_now(str(link)) == other / "link.raw.moved"
    assert image_now(str(link)).read_bytes() == b"disk"
    assert marker_of(image) == marker_of(link)
    put_away(str(link), "vm", TO)
    free(link)
    assert link.read_bytes() == b"disk"
    assert names(other) == {"link.raw"}
    assert names(tmp_path) == {"vm.raw", "other"}


def test_what_has_the_name_of_a_moved_image_by_now_is_another(image: Path) -> None:
    put_away(str(image), "vm", TO)
    image.write_bytes(b"another")
    assert image_now(str(image)).read_bytes() == b"disk"
    with pytest.raises(ImageError, match="move one of them away"):
        free(image)
    assert image.read_bytes() == b"another"
    image.unlink()
    free(image)
    assert image.read_bytes() == b"disk"


def test_a_file_that_is_where_the_image_would_go_stays_and_the_image_has_its_marker(image: Path) -> None:
    away = Path(f"{image}.moved")
    away.write_bytes(b"mine")
    with pytest.raises(ImageError, match=r"put out of reach: .*/vm\.raw\.moved exists; see to it"):
        put_away(str(image), "vm", TO)
    assert (image.read_bytes(), away.read_bytes()) == (b"disk", b"mine")
    assert marker_of(image).moved == ""
    assert image_now(str(image)) == image
    free(image)
    assert (image.read_bytes(), away.read_bytes()) == (b"disk", b"mine")


def test_an_image_that_another_migration_has_put_away_is_told(image: Path) -> None:
    put_away(str(image), "vm", TO)
    with pytest.raises(ImageError, match=r"its guest went to .* \(migration vm\)"):
        put_away(str(image), "another", TO)


def test_an_image_that_is_half_written_is_neither_put_away_nor_given_back(image: Path) -> None:
    put_away(str(image), "vm", TO, Standing.COMMITTING)
    with pytest.raises(ImageError, match="nbd-migrate recover vm --on a"):
        put_away(str(image), "vm", TO)
    with pytest.raises(ImageError, match="nbd-migrate recover vm --on a"):
        free(image)


def test_an_image_without_a_marker_is_not_given_back(image: Path) -> None:
    with pytest.raises(ImageError, match="there is no marker to be lifted"):
        free(image)
    put_away(str(image), "vm", TO)
    image_now(str(image)).unlink()
    with pytest.raises(ImageError, match=r"only its marker: if it is gone for good, remove .*\.moved\.json"):
        free(image)


def test_a_name_is_not_taken_from_another_file(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    new.touch()
    with pytest.raises(FileExistsError):
        rename_new(old, new)
    new.unlink()
    rename_new(old, new)
    assert names(tmp_path) == {"new"}


def test_the_small_programs_take_several_images_and_do_what_they_can(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second"
    second.touch()
    Path(f"{image}.moved").touch()
    with pytest.raises(ImageError, match=r"vm\.raw cannot be put out of reach"):
        moving.main(["vm", "needed", str(image), TO, str(second), TO])
    assert not second.exists()
    assert marks.main([str(image), str(second), str(tmp_path / "third")]) == 0
    told = capsys.readouterr().out
    assert f'"{image}": ' in told
    assert f'"{second}": ' in told
    assert "third" not in told
    giving_back.main([str(image), str(second)])
    assert names(tmp_path) == {"vm.raw", "vm.raw.moved", "second"}


@pytest.mark.parametrize("words", [[], ["vm", "needed"], ["vm", "needed", "/a"], ["vm", "soon", "/a", "b"]])
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="put-away needs"):
        moving.main(words)
