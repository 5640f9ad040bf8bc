"""Whom the wire trusts: who has a certificate of this federation, as the node that it names, until it is revoked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ecogen.errors import AuthenticationError, NodeLostError, ProtocolError, TransportError
from ecogen.transport.authority import Authority, create_authority, issue, revoke
from ecogen.transport.base import Message, Peer
from ecogen.transport.credentials import load_credentials
from ecogen.transport.wire import GrpcTransport
from tests.transport.echo import Echo
from tests.transport.wires import closing, end_node, transport

pytestmark = pytest.mark.asyncio


async def test_another_authority_is_not_trusted_either_way(nodes: Path, tmp_path: Path) -> None:
    issue(create_authority(tmp_path / "authority", "lab"), "edge-1", "edge", tmp_path / "edge-1")
    stranger, ours, end = transport(tmp_path / "edge-1", "edge"), Echo(), transport(nodes / "end-1", "end")
    async with closing(stranger, end):
        stranger.learn("end-1", await end.serve(ours))
        for attempt in (stranger.call("end-1", Message("echo")), stranger.open("end-1")):
            with pytest.raises(AuthenticationError, match=r"'end-1' at 127\.0\.0\.1:\d+"):
                await attempt
        assert ours.peers == []


async def test_a_caller_without_the_trusted_authority_is_refused(nodes: Path, tmp_path: Path) -> None:
    """Its certificate is another authority's, but it trusts ours: only the server can refuse it."""
    issue(create_authority(tmp_path / "authority", "lab"), "edge-1", "edge", tmp_path / "edge-1")
    credentials = load_credentials(tmp_path / "edge-1")
    ours = load_credentials(nodes / "end-1").authority_pem
    forged = type(credentials)(
        credentials.identity, credentials.not_after, credentials.certificate_pem, ours, credentials.key_pem
    )
    stranger, end, service = GrpcTransport(Peer("edge-1", "edge"), credentials=forged), *end_node(nodes)
    async with closing(stranger, end):
        stranger.learn("end-1", await end.serve(service))
        with pytest.raises((AuthenticationError, NodeLostError)):
            await stranger.call("end-1", Message("echo"))
        assert service.peers == []


async def test_a_node_at_anothers_address_is_not_taken_for_it(nodes: Path) -> None:
    edge, other, service = transport(nodes / "edge-1", "edge"), transport(nodes / "end-2", "end"), Echo()
    async with closing(edge, other):
        edge.learn("end-1", await other.serve(service))
        with pytest.raises(AuthenticationError, match="'end-1'"):
            await edge.call("end-1", Message("echo"))
        assert service.peers == []


async def test_no_certificate_and_others_certificates(nodes: Path) -> None:
    with pytest.raises(AuthenticationError, match=r"'end-1' has no certificate; issue one with `ecogen certs issue`"):
        GrpcTransport(Peer("end-1", "end"))
    with pytest.raises(AuthenticationError, match="of end node 'end-1', not of edge node 'end-1'"):
        transport(nodes / "end-1", "edge")
    plain, end, service = GrpcTransport(Peer("edge-1", "edge"), insecure=True), *end_node(nodes)
    async with closing(plain, end):
        plain.learn("end-1", await end.serve(service))
        with pytest.raises(TransportError):
            await plain.call("end-1", Message("echo"), timeout_s=5)
        assert service.peers == []


async def test_certificates_of_another_federation_or_tier_are_refused(authority: Authority, tmp_path: Path) -> None:
    """Signed by our authority, as by a mistake or a break-in, but not of ours."""
    from ecogen.transport import authority as issuing

    service, end = Echo(), transport(authority.directory.parent / "end-1", "end")
    names = issuing._alternative_names
    async with closing(end):
        address = await end.serve(service)
        for federation, tier, says in (("field", "edge", "of federation 'field', not 'lab'"), ("lab", "fog", "tier")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(issuing, "_alternative_names", lambda *_, f=federation, t=tier: names(f, t, "edge-1"))
                issue(authority, "edge-1", "edge", tmp_path / "edge-1")
            stranger = transport(tmp_path / "edge-1", tier)
            async with closing(stranger):
                stranger.learn("end-1", address)
                with pytest.raises(AuthenticationError, match=says):
                    await stranger.call("end-1", Message("echo"))
                with pytest.raises(AuthenticationError, match=says):
                    await stranger.open("end-1")
        assert service.peers == []


async def test_a_sender_cannot_claim_to_be_another(nodes: Path) -> None:
    edge, end, service = transport(nodes / "edge-1", "edge"), *end_node(nodes)
    async with closing(edge, end):
        edge.learn("end-1", await end.serve(service))
        stream = await edge.open("end-1")
        edge.peer = Peer("end-2", "end")
        with pytest.raises(ProtocolError, match=r"from node 'edge-1' says it comes from 'end-2'; it was refused"):
            await edge.call("end-1", Message("echo"))
        await stream.send(Message("echo"))
        with pytest.raises(ProtocolError, match=r"from node 'edge-1' says it comes from 'end-2'"):
            await stream.receive()
        assert service.peers == [Peer("edge-1", "edge")]  # the stream's


async def test_revoking_refuses_calls_and_closes_open_streams(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "authority", "lab")
    for node_id, tier in (("edge-1", "edge"), ("end-1", "end")):
        issue(authority, node_id, tier, tmp_path / node_id)
    revoked = authority.directory / "revoked.pem"
    edge, end, service = transport(tmp_path / "edge-1", "edge"), None, Echo()
    end = transport(tmp_path / "end-1", "end", revoked=revoked)
    async with closing(edge, end):
        edge.learn("end-1", await end.serve(service))
        stream = await edge.open("end-1")
        receiving = asyncio.create_task(stream.receive())
        await edge.call("end-1", Message("echo"))
        revoke(authority, "edge-1")
        with pytest.raises(AuthenticationError, match=r"of node 'edge-1' is revoked; issue a new one"):
            await edge.call("end-1", Message("echo"))
        with pytest.raises(AuthenticationError, match="certificate was revoked"):
            await asyncio.wait_for(receiving, 3)
        await asyncio.wait_for(service.lost.wait(), 3)
        issue(authority, "edge-1", "edge", tmp_path / "edge-1")
        renewed = transport(tmp_path / "edge-1", "edge")
        async with closing(renewed):
            renewed.learn("end-1", edge._links["end-1"].address)
            assert await renewed.call("end-1", Message("echo"))


async def test_a_revoked_node_is_not_called_any_more(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "authority", "lab")
    for node_id, tier in (("edge-1", "edge"), ("end-1", "end")):
        issue(authority, node_id, tier, tmp_path / node_id)
    edge = transport(tmp_path / "edge-1", "edge", revoked=authority.directory / "revoked.pem")
    end = transport(tmp_path / "end-1", "end")
    async with closing(edge, end):
        edge.learn("end-1", await end.serve(Echo()))
        stream = await edge.open("end-1")
        receiving = asyncio.create_task(stream.receive())
        revoke(authority, "end-1")
        with pytest.raises(AuthenticationError, match="'end-1' is revoked"):
            await edge.call("end-1", Message("echo"))
        with pytest.raises(NodeLostError, match="revoked"):
            await asyncio.wait_for(receiving, 3)


async def test_a_revocation_list_that_is_missing_stops_a_node_from_starting(nodes: Path) -> None:
    with pytest.raises(AuthenticationError, match=r"nowhere\.pem is missing"):
        transport(nodes / "end-1", "end", revoked=nodes / "nowhere.pem")
