"""The commands that a migration starts by the dozen: for recipes, for supervisors, and on the other host.

Each is imported alone: to start Python and import all of nbd-migrate takes 0.2 s of a processor, one of these
a quarter to a half of that.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdserve.common import program

PROGRAM = "nbd-migrate"

NEEDS = {
    "supervisor": "LOG READY COMMAND",
    "attach": "LOG",
    "bridge": "MONITOR",
    "listen": "SOCKET OWNER MODE",
    "take": "SOCKET NUMBER",
    "tunnel": "READY ORDERS",
}


def find(words: list[str]) -> Callable[[], int] | None:
    """Return what runs the small command of these words; None when they are another's, or ask for help."""
    match words:
        # Their arguments are another command's, which argparse must not look at.
        case ["supervisor", _, _, _, *_]:
            from recipes.processes import supervisor

            return lambda: supervisor.main(words[1:])
        case ["attach", _]:
            from recipes.processes import attach

            return lambda: attach.main(words[1:])
        case ["bridge", address] if not address.startswith("-"):
            from recipes.connections import bridge

            return lambda: bridge.main([address])
        case ["listen", path, owner, mode] if path.startswith("/"):
            from recipes.connections import listen

            return lambda: listen.main([path, owner, mode])
        case ["take", path, number] if path.startswith("/"):
            from recipes.connections import take

            return lambda: take.main([path, number])
        case ["tunnel", ready, orders] if ready.startswith("/"):
            from recipes.connections import tunnel

            return lambda: tunnel.main([ready, orders])
        case [name, *rest] if name in NEEDS and not {"-h", "--help"} & set(rest):
            return lambda: _refuse(f"{name} needs {NEEDS[name]}: see nbd-migrate --help")
        case ["fence", *rest] if {"--lift", "-h", "--help"} & set(rest):
            return None
        case ["fence" | "put-away" | "give-back" | "marks" as name, *rest]:
            return lambda: program.run(PROGRAM, lambda: _keep_away(name, rest))
        case ["qmp" | "probe" | "process" | "route" | "reach" as name, *rest]:
            return lambda: program.run(PROGRAM, lambda: _run(name, rest))
        case _:
            return None


def _refuse(message: str) -> int:
    program.complain(PROGRAM, message)
    return program.EXIT_USAGE


def _keep_away(name: str, rest: list[str]) -> int:
    match name:
        case "fence":
            from recipes.fencing import fence

            return fence.main(rest)
        case "put-away":
            from recipes.fencing import moving

            return moving.main(rest)
        case "give-back":
            from recipes.fencing import giving_back

            return giving_back.main(rest)
        case _:
            from recipes.fencing import marks

            return marks.main(rest)


def _run(name: str, rest: list[str]) -> int:
    parser = program.Parser(prog=f"{PROGRAM} {name}")
    if name == "qmp":
        from recipes.cli import qmp_command

        qmp_command.configure(parser)
        return qmp_command.main(parser.parse_args(rest))
    if name == "process":
        from recipes.discovery import process

        parser.add_argument("source", metavar="MONITOR|PID")
        return process.main(parser.parse_args(rest).source)
    if name == "route":
        from recipes.discovery import route

        parser.add_argument("other", metavar="ADDRESS")
        parser.add_argument("port", metavar="PORT", type=program.port)
        given = parser.parse_args(rest)
        return route.main(given.other, given.port)
    if name == "reach":
        from recipes.checks import reach

        parser.add_argument("end", choices=["answer", "ask"])
        parser.add_argument("address", metavar="ADDRESS")
        parser.add_argument("port", metavar="PORT", type=program.port)
        parser.add_argument("token", metavar="TOKEN")
        parser.add_argument("seconds", metavar="SECONDS", type=float)
        return reach.main(**vars(parser.parse_args(rest)))
    from recipes.cli import probe

    parser.add_argument("uri", metavar="URI")
    return probe.probe(parser.parse_args(rest).uri)
