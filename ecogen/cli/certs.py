"""The verbs for certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ecogen.cli.application import app, plain

certs_app = typer.Typer(no_args_is_help=True, help="The federation's certificates: who may be which node.")
app.add_typer(certs_app, name="certs")

AuthorityFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]


@certs_app.command("init")
def certs_init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the authority will be; keep it safe.")],
    federation: Annotated[str, typer.Option(metavar="NAME", help="Its federation's name.")] = "ecogen",
) -> None:
    """Make a federation's authority, which issues certificates."""
    from ecogen.transport.authority import create_authority

    create_authority(directory, federation)
    print(f"made the authority of {federation!r} in {directory}")


@certs_app.command("issue")
def certs_issue(
    directory: AuthorityFolder,
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID", help="Whose certificate it is, say edge-0.")],
    tier: Annotated[str, typer.Argument(metavar="TIER", help="cloud, edge, end or operator.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the node's key and certificates go.")],
    valid_days: Annotated[int, typer.Option(metavar="DAYS", min=1, max=36_500, help="How long it is valid.")] = 365,
) -> None:
    """Issue a certificate that names a node and its tier."""
    from ecogen.transport.authority import issue, load_authority

    identity = issue(load_authority(directory), node_id, tier, out, valid_days=valid_days)
    print(f"issued {identity.uri} to {out}; move that folder to the node, and nothing else")


@certs_app.command("revoke")
def certs_revoke(
    directory: AuthorityFolder,
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID", help="Who shall not come in any more.")],
) -> None:
    """Revoke every certificate of a node."""
    from ecogen.transport.authority import load_authority, revoke
    from ecogen.transport.credentials import REVOKED

    revoked = revoke(load_authority(directory), node_id)
    print(f"revoked {len(revoked)} of {node_id!r}; give the other nodes {directory / REVOKED}")


@certs_app.command("show")
def certs_show(directory: AuthorityFolder) -> None:
    """List the certificates that an authority has issued."""
    from ecogen.transport.authority import issued, load_authority

    for entry in issued(load_authority(directory)):
        print(json.dumps(plain(entry)))
