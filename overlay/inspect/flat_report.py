"""How flat images and their checks look to operators and, with qemu-img's words, to programs."""

from __future__ import annotations

import json

from nbdserve.common.sizes import format_size
from overlay.formats.flat.check import FlatReport
from overlay.formats.image import Image
from overlay.formats.redo.beside import point_text
from overlay.formats.redo.chunks import Point
from overlay.inspect.report import printable


def info_json(
    path: str,
    image: Image,
    actual_size: int,
    device_size: int | None = None,
    point: Point | None = None,
) -> str:
    """Return what ``qemu-img info --output=json`` says, with all the backings; a complete image is raw.

    ``actual_size`` is what the file occupies, ``device_size`` that of the device which it is on, in bytes;
    ``point`` what it holds as a mirror.
    """
    answer: dict[str, object] = {
        "filename": path,
        "format": "flat" if image.backings else "raw",
        "virtual-size": image.size,
        "actual-size": actual_size,
        "cluster-size": image.cluster_size,
        "local-size": image.local_bytes,
    }
    if device_size is not None:
        answer["device-size"] = device_size
    if image.backings:
        answer["map-filename"] = image.map_path
        answer["written-size"] = image.written_bytes
        answer["backing-filename"] = image.backings[0].name
        answer["backing-filename-format"] = "raw"
        answer["backing-filenames"] = [backing.name for backing in image.backings]
    if point is not None:
        answer["mirror-point"], answer["mirror-point-time"] = point.number, point.nanoseconds / 1e9
    return json.dumps(answer, indent=4)


def info_text(
    path: str,
    image: Image,
    actual_size: int,
    device_size: int | None = None,
    point: Point | None = None,
) -> str:
    """Return the same for people."""
    share = 100 * image.local_bytes // image.size
    on_device = device_size is not None
    occupied = device_size if device_size is not None else actual_size
    return "\n".join(
        [
            f"image: {path}",
            "layout: flat" if image.backings else "layout: raw, a complete disk",
            f"disk: {format_size(image.size)} ({image.size} bytes)",
            f"{'block device' if on_device else 'occupied'}: {format_size(occupied)}",
            f"local: {format_size(image.local_bytes)} ({share}%)",
            *([f"written by the guest: {format_size(image.written_bytes)}"] if image.backings else []),
            *(f"backing: {printable(backing.name)}" for backing in image.backings),
            *([] if image.backings else ["backing: none"]),
            *([] if point is None else [f"mirror: {point_text(point)}"]),
            *([f"map: {printable(image.map_path)}"] if on_device and image.backings else []),
        ]
    )


def check_json(path: str, report: FlatReport) -> str:
    """Return what ``qemu-img check --output=json`` says, with what a flat image has."""
    answer = {
        "filename": path,
        "format": "flat",
        "check-errors": 0,
        "total-clusters": report.total,
        "allocated-clusters": report.present,
        "written-clusters": report.written,
        "logged-writes": report.logged,
        "miscounts": report.miscounts,
        "miscounts-fixed": report.miscounts_fixed,
        "corruptions": report.corruptions,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks": 0,
        "dirty-flag": not report.is_clean,
        "problems": report.problems,
    }
    return json.dumps(answer, indent=4)


def check_text(path: str, report: FlatReport) -> str:
    """Return the same for people."""
    lines = [f"{path}: {problem}" for problem in report.problems]
    if report.corruptions_fixed:
        lines.append("repaired: the image can be used again; what the log said is dropped")
    if report.miscounts_fixed:
        lines.append(f"repaired: {report.miscounts_fixed} counts of the map's directory")
    if report.miscounts:
        lines.append(
            f"{report.miscounts} wrong counts in the map's directory: left by a power cut, no harm to data"
        )
    if not report.is_clean:
        lines.append(f"the image was not closed cleanly; opening it takes over {report.logged} logged writes")
    if report.corruptions:
        lines.append("do not use the image, or see --repair")
    else:
        lines.append("no corruption found")
    share = 100 * report.present / max(1, report.total)
    lines.append(
        f"{report.present}/{report.total} = {share:.2f}% of the grains are local, "
        f"{report.written} written by the guest"
    )
    return "\n".join(lines)
