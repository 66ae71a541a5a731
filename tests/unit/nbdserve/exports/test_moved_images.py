"""An image whose guest has moved is found by its marker, whatever path leads to it, and not used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.common.errors import ImageError
from nbdserve.exports.moved_images import (
    MARKER,
    MOVED,
    Marker,
    Standing,
    find_marker,
    marker_beside,
    read_marker,
    refuse_moved,
    remove_marker,
    write_marker,
)


def marker_of(image: Path) -> Marker:
    """A marker as a migration writes it."""
    return Marker(str(image), f"{image}{MOVED}", "vm", "b.example:/srv/vm.raw", 1893456000.5)


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The path of an image that was moved away, with its marker."""
    image = tmp_path / "vm.raw"
    image.with_name("vm.raw.moved").touch()
    marker_beside(image).write_text(marker_of(image).to_json())
    return image


@pytest.mark.parametrize("standing", Standing)
def test_a_marker_is_read_as_it_was_written(tmp_path: Path, standing: Standing) -> None:
    marker = replace(marker_of(tmp_path / "vm.raw"), standing=standing)
    assert Marker.from_json(marker.to_json()) == marker


@pytest.mark.parametrize("standing", Standing)
def test_what_refuses_an_image_names_it_and_where_its_guest_went(moved: Path, standing: Standing) -> None:
    marker = replace(marker_of(moved), standing=standing)
    marker_beside(moved).write_text(marker.to_json())
    with pytest.raises(ImageError) as error:
        refuse_moved(moved)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{moved}: its guest went to b.example:/srv/vm.raw on ")
    assert f"; the image is {moved}.moved now; " in line


def test_the_marker_is_found_by_each_path_of_the_image(moved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(moved)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "link").symlink_to(moved.with_name("vm.raw.moved"))
    for path in (moved, moved.with_name("vm.raw.moved"), link, other / "link"):
        assert find_marker(path) == marker_beside(moved), path


def test_other_images_have_no_marker(moved: Path, tmp_path: Path) -> None:
    for name in ("other.raw", "vm.raw.moved.moved", "vm", "nothing/vm.raw"):
        assert find_marker(tmp_path / name) is None, name
        refuse_moved(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '"version"',
        '{"version": 2}',
        '{"version": 1, "image": 5, "moved": "", "migration": "", "to": "", "time": 0, "standing": "needed"}',
        '{"version": 1, "image": "/x", "moved": "", "migration": "", "to": "", "time": "x", "standing": ""}',
        '{"version": 1, "image": "/x", "moved": "", "migration": "", "to": "", "time": 0, "standing": "?"}',
        "[" * 100_000,
        "\ud800",
    ],
    ids=str.__len__,
)
def test_what_is_no_marker_is_told_in_one_line_and_the_image_is_not_used(moved: Path, text: str) -> None:
    marker_beside(moved).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ImageError, match=r"vm\.raw\.moved\.json: the marker .* cannot be read") as error:
        refuse_moved(moved)
    assert "\n" not in str(error.value)


def test_the_marker_is_told_apart_from_the_image(moved: Path) -> None:
    assert marker_beside(moved).name.endswith(MARKER)
    assert read_marker(marker_beside(moved)).place == moved.with_name("vm.raw.moved")


def test_an_image_that_keeps_its_name_is_where_it_was(tmp_path: Path) -> None:
    marker = replace(marker_of(tmp_path / "vm.raw"), moved="")
    assert marker.place == tmp_path / "vm.raw"


def test_a_marker_takes_the_place_of_another_and_goes_again(moved: Path) -> None:
    path, marker = marker_beside(moved), replace(marker_of(moved), standing=Standing.COMMITTING)
    write_marker(path, marker)
    assert read_marker(path) == marker
    assert {each.name for each in moved.parent.iterdir()} == {"vm.raw.moved", "vm.raw.moved.json"}
    remove_marker(path)
    remove_marker(path)
    refuse_moved(moved)
