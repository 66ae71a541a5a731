"""Certificates on a host: a directory that only their user can enter, as QEMU and nbdserve look for them.

A group can where the migration's images are made for one, too.

    ca-cert.pem                        of the authority
    server-cert.pem, server-key.pem    of this host, as a server
    client-cert.pem, client-key.pem    and as a client: names of the same files

They travel on the standard input of a shell there, so that no command line and no log has them.
"""

from __future__ import annotations

from recipes.certificates.authority import Identity
from recipes.hosts import places
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

NAMES = ("ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem")
"""All that there is in the directory."""

_PLACE = f"""
{places.making(NAMES)}
out=; while IFS= read -r line; do
case "$line" in
*.pem) out=$line;;
*) printf "%s\\n" "$line" >> "$out" || exit;;
esac;
done;
ln -s server-cert.pem client-cert.pem && ln -s server-key.pem client-key.pem || exit;
if test -n "$3"; then chmod g+rX -- ca-cert.pem server-cert.pem server-key.pem . || exit; fi;
if test -n "$2"; then chown -- "$2" ca-cert.pem server-cert.pem server-key.pem . || exit; fi
"""
"""Makes the directory $1 for the user $2, or for whoever runs this.

With $3, whatever it says, the group may read them, too. A line with a file's name begins it. The directory is
given away last: from then on its user may put links in the place of its files.
"""


async def place(
    host: Host,
    directory: str,
    authority: str,
    identity: Identity,
    owner: str,
    limit: float,
    *,
    for_group: bool = False,
) -> None:
    """Write an identity to a host, in place of what an earlier attempt has left in this directory.

    ``owner`` (USER, USER:GROUP or :GROUP) is whose it is, and who reads it besides root; with ``for_group``
    the group does, too. Empty: who runs commands there. Raises MigrationError as Host.run() does.
    """
    files = zip(NAMES, (authority, identity.certificate, identity.key), strict=False)
    given = "".join(f"{name}\n{content}" for name, content in files)
    script = on_one_line(_PLACE)
    await host.run("sh", "-c", script, "sh", directory, owner, "group" * for_group, limit=limit, given=given)


async def remove(host: Host, directory: str, limit: float) -> None:
    """Remove the directory with what place() has written; it may not be there. Raises as Host.run() does."""
    await host.run("sh", "-c", places.removing(NAMES), "sh", directory, limit=limit)


def removing(directory: str) -> list[str]:
    """Return the command for the host that removes it, for an operator."""
    return ["rm", "-r", "--", directory]
