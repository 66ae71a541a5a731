"""What is secret of a migration on a host: a directory that only its user can enter.

A group can where the migration's images are made for one, too. QEMU and nbdserve look for certificates so:

    ca-cert.pem                        of the authority
    server-cert.pem, server-key.pem    of this host, as a server
    client-cert.pem, client-key.pem    and as a client: names of the same files

    channel.token                      and this is what both ends of the single channel know

They travel on the standard input of a shell there, so that no command line and no log has them.
"""

from __future__ import annotations

from collections.abc import Mapping

from recipes.certificates.authority import Identity
from recipes.hosts import places
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

TOKEN = "channel.token"

NAMES = ("ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem", TOKEN)
"""All that there may be in the directory."""

_PLACE = f"""
{places.making(NAMES)}
out=; while IFS= read -r line; do
case "$line" in
*.pem | {TOKEN}) out=$line;;
*) printf "%s\\n" "$line" >> "$out" || exit;;
esac;
done;
if test -e server-key.pem; then
ln -s server-cert.pem client-cert.pem && ln -s server-key.pem client-key.pem || exit;
fi;
if test -n "$3"; then chmod g+rX -- * . || exit; fi;
if test -n "$2"; then chown -- "$2" * . || exit; fi
"""
"""Makes the directory $1 for the user $2, or for whoever runs this.

With $3, whatever it says, the group may read what is in it, too. A line with a file's name begins it. The
directory is given away last: from then on its user may put links in the place of its files.
"""


def files_of(authority: str, identity: Identity) -> dict[str, str]:
    """Return what an identity is on a host, each file by its name."""
    return dict(zip(NAMES, (authority, identity.certificate, identity.key), strict=False))


async def place(
    host: Host,
    directory: str,
    files: Mapping[str, str],
    owner: str,
    limit: float,
    *,
    for_group: bool = False,
) -> None:
    """Write these files to a host, in place of what an earlier attempt has left in this directory.

    ``owner`` (USER, USER:GROUP or :GROUP) is whose they are, and who reads them besides root; with
    ``for_group`` the group does, too. Empty: who runs commands there. Raises MigrationError as Host.run()
    does.
    """
    given = "".join(f"{name}\n{content.rstrip()}\n" for name, content in files.items())
    script = on_one_line(_PLACE)
    await host.run("sh", "-c", script, "sh", directory, owner, "group" * for_group, limit=limit, given=given)


async def remove(host: Host, directory: str, limit: float) -> None:
    """Remove the directory with what place() has written; it may not be there. Raises as Host.run() does."""
    await host.run("sh", "-c", places.removing(NAMES), "sh", directory, limit=limit)


def removing(directory: str) -> list[str]:
    """Return the command for the host that removes it, for an operator."""
    return ["rm", "-r", "--", directory]
