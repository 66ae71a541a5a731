"""How images, maps and checks look to operators and, with qemu-img's words, to programs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from nbdserve.common.sizes import format_size
from overlay.formats.image import Backing, Image, Run, State
from overlay.formats.qed.check import Report
from overlay.formats.qed.header import Feature, Header


def info_json(path: str, header: Header, backing: Backing | None, actual_size: int, local: int | None) -> str:
    """Return what ``qemu-img info --output=json`` says of the image, and its tables' size (clusters).

    ``local``: bytes of the disk that are here; None where the tables do not say so.
    """
    answer: dict[str, object] = {
        "filename": path,
        "format": "qed",
        "virtual-size": header.image_size,
        "actual-size": actual_size,
        "cluster-size": header.cluster_size,
        "table-size": header.table_size,
        "dirty-flag": bool(header.features & Feature.NEED_CHECK),
    }
    if local is not None:
        answer["local-size"] = local
    if backing:
        answer["backing-filename"] = backing.name
        if backing.raw:
            answer["backing-filename-format"] = "raw"
    return json.dumps(answer, indent=4)


def info_text(path: str, header: Header, backing: Backing | None, actual_size: int, local: int | None) -> str:
    """Return the same for people."""
    lines = [
        f"image: {path}",
        "layout: qed",
        f"disk: {format_size(header.image_size)} ({header.image_size} bytes)",
        f"occupied: {format_size(actual_size)}",
        f"clusters: {format_size(header.cluster_size)}; tables of {header.table_size} clusters",
    ]
    if local is not None:
        lines.append(f"local: {format_size(local)} ({100 * local // max(1, header.image_size)}%)")
    if backing:
        kind = "raw" if backing.raw else "its format is probed"
        lines.append(f"backing: {printable(backing.name)} ({kind})")
    else:
        lines.append("backing: none")
    if header.features & Feature.NEED_CHECK:
        lines.append(f"not closed cleanly: run nbd-overlay check --repair {path}")
    return "\n".join(lines)


def check_json(path: str, report: Report) -> str:
    """Return what ``qemu-img check --output=json`` says, and a list of the problems."""
    answer = {
        "filename": path,
        "format": "qed",
        "check-errors": 0,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "dirty-flag": report.needs_check,
        "problems": report.problems,
    }
    return json.dumps(answer, indent=4)


def check_text(path: str, report: Report) -> str:
    """Return the same for people: the problems first, the verdict at the end."""
    lines = [f"{path}: {problem}" for problem in report.problems]
    hidden = report.corruptions + report.corruptions_fixed - len(report.problems)
    if len(report.problems) and hidden > 0:
        lines.append(f"{path}: and {hidden} more")
    if report.corruptions_fixed or report.leaks_fixed:
        lines.append(
            f"repaired: {report.corruptions_fixed} references cleared, {report.leaks_fixed} leaks cut off"
        )
    if report.leaks:
        lines.append(f"{report.leaks} leaked clusters: wasted space, no harm to data")
    if report.needs_check:
        lines.append(
            "the image was not closed cleanly; --repair marks it as clean if nothing is wrong with it"
        )
    if report.corruptions:
        lines.append(f"{report.corruptions} corruptions: do not use the image")
    else:
        lines.append("no corruption found")
    share = 100 * report.allocated_clusters / max(1, report.total_clusters)
    fragmented = 100 * report.fragmented_clusters / max(1, report.allocated_clusters)
    lines.append(
        f"{report.allocated_clusters}/{report.total_clusters} = {share:.2f}% allocated, "
        f"{fragmented:.2f}% fragmented clusters"
    )
    return "\n".join(lines)


def map_json(image: Image) -> Iterator[str]:
    """Yield what ``qemu-img map --output=json`` says, piece by piece; the backing counts as data."""
    opening = "["
    for run in image.runs(0, image.size):
        yield f"{opening}{json.dumps(_map_entry(run, image.backings))}"
        opening = ",\n"
    yield "[]\n" if opening == "[" else "]\n"


def map_text(image: Image) -> Iterator[str]:
    """Yield the same for people, a line for each run."""
    yield f"{'offset':>18} {'length':>18} {'state':<7} file offset\n"
    for run in image.runs(0, image.size):
        place = f" {run.file_offset:#x}" if run.file_offset is not None else ""
        yield f"{run.offset:>#18x} {run.length:>#18x} {run.state.value:<7}{place}".rstrip() + "\n"


def _map_entry(run: Run, backings: tuple[Backing, ...]) -> dict[str, object]:
    entry: dict[str, object] = {"start": run.offset, "length": run.length, "depth": 0, "present": True}
    match run.state:
        case State.DATA:
            return entry | {"zero": False, "data": True, "offset": run.file_offset}
        case State.ZERO:
            return entry | {"zero": True, "data": False}
        case State.ABSENT if not backings:
            return entry | {"present": False, "zero": True, "data": False}
        case State.ABSENT:
            place = {"offset": run.offset} if backings[0].raw else {}
            return entry | {"depth": 1, "zero": False, "data": True} | place


def printable(text: str) -> str:
    """Return the text with what a terminal would act on, or cannot show, as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
