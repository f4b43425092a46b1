"""Sockets against real peers on loopback and ipc: good ones, broken ones, and those without the key."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq
import zmq.utils.z85
from clusters import assigns_of, fingerprint_of, register_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from waiting import within

from tpdist.control import channel
from tpdist.control.channel import (
    AsyncDealer,
    AsyncRouter,
    ClusterKeys,
    Dealer,
    PeerGoneError,
    Router,
    close_blocking_sockets,
    tcp_address,
    wait_any,
)
from tpdist.control.codec import Codec, MalformedFrameError, OtherClusterError, OtherVersionError
from tpdist.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Abort,
    ClusterState,
    Generate,
    Heartbeat,
    Message,
    RankHello,
    Wait,
)
from tpdist.errors import JoinError, LostError, SettingsError, TpdistError
from tpdist.sampling_params import SamplingParams

DEADLINE_S = 20.0
NOTHING_S = 0.3
KEYS = ClusterKeys.from_seed(bytes(range(32)))
OTHER_KEYS = ClusterKeys.from_seed(bytes(32))
GOOD = Abort(request_id="good")
Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(within(DEADLINE_S, work))


async def soon(work: Coroutine[Any, Any, Result]) -> Result:
    return await within(DEADLINE_S / 2, work)


async def nothing(work: Coroutine[Any, Any, Any]) -> None:
    """`work` must not end within a moment."""
    with pytest.raises(TimeoutError):
        await within(NOTHING_S, work)


@contextlib.contextmanager
def router(address: str = "tcp://127.0.0.1:*", **options: Any) -> Iterator[tuple[AsyncRouter, str]]:
    made = AsyncRouter(name="test", codec=options.pop("codec", None) or Codec(), **options)
    try:
        yield made, made.bind(address)
    finally:
        made.close()


@contextlib.contextmanager
def dealer(address: str, *, identity: bytes = b"node", **options: Any) -> Iterator[AsyncDealer]:
    made = AsyncDealer(address=address, identity=identity, codec=options.pop("codec", None) or Codec(), **options)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def stranger(address: str, kind: int = zmq.DEALER) -> Iterator[zmq.Socket[bytes]]:
    """A peer that sends whatever it likes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = context.socket(kind)
    made.linger = 0
    made.rcvtimeo = int(DEADLINE_S * 1000)
    made.connect(address)
    try:
        yield made
    finally:
        context.destroy(0)


# -- bytes that are no message ----------------------------------------------------------------------------------------


def frame_of(*parts: Any) -> bytes:
    return msgspec.msgpack.encode(parts)


def body_of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


GENERATE = Generate(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=3))
ENVELOPE = bytes([0x94, PROTOCOL_VERSION]) + msgspec.msgpack.encode("") + msgspec.msgpack.encode(0)
MALFORMED = {
    "empty": b"",
    "one byte": b"\xc1",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "no array": msgspec.msgpack.encode({"version": 1}),
    "empty array": frame_of(),
    "version alone": frame_of(PROTOCOL_VERSION),
    "too many parts": frame_of(PROTOCOL_VERSION, "", 0, body_of("Abort", request_id="x"), 4),
    "version is text": frame_of("1", "", 0, body_of("Abort", request_id="x")),
    "version is a float": frame_of(float(PROTOCOL_VERSION), "", 0, body_of("Abort", request_id="x")),
    "no tag": frame_of(PROTOCOL_VERSION, "", 0, {"request_id": "x"}),
    "unknown tag": frame_of(PROTOCOL_VERSION, "", 0, body_of("Eval", code="1")),
    "unknown field": frame_of(PROTOCOL_VERSION, "", 0, body_of("Abort", request_id="x", force=True)),
    "missing field": frame_of(PROTOCOL_VERSION, "", 0, body_of("Abort")),
    "wrong type": frame_of(PROTOCOL_VERSION, "", 0, body_of("Abort", request_id=7)),
    "no body": frame_of(PROTOCOL_VERSION, "", 0, None),
    "cluster is no text": frame_of(PROTOCOL_VERSION, 5, 0, body_of("Abort", request_id="x")),
    "epoch is no number": frame_of(PROTOCOL_VERSION, "", "0", body_of("Abort", request_id="x")),
    "value out of range": frame_of(
        PROTOCOL_VERSION, "", 0, body_of("Generate", request_id="r", prompt_token_ids=[1], sampling={"top_p": 7.0})
    ),
    "not UTF-8 in the cluster": bytes([0x94, PROTOCOL_VERSION, 0xA1, 0xFF, 0]) + msgspec.msgpack.encode(GOOD),
    "not UTF-8 in the body": Codec().encode(GOOD).replace(b"good", b"\xff\xfe\xfd\xfc"),
    "nested too deep": ENVELOPE + b"\x91" * 2_000_000,
    "only nesting": b"\x91" * 2_000_000,
    "nested too deep in a free field": ENVELOPE
    + msgspec.msgpack.encode(body_of("Fingerprint", instance="", model={}, explicit={"x": 0})).replace(
        b"\xa1x\x00", b"\xa1x" + b"\x81\xa1x" * 500_000
    ),
    "array longer than the frame": ENVELOPE
    + msgspec.msgpack.encode(body_of("Generate", request_id="x", prompt_token_ids=0)).replace(
        b"ids\x00", b"ids\xdd\xff\xff\xff\xff"
    ),
    "map longer than the frame": ENVELOPE + b"\xdf\xff\xff\xff\xff",
    "text longer than the frame": bytes([0x94, PROTOCOL_VERSION]) + b"\xdb\xff\xff\xff\xff",
    "parts without end": b"\xdd\xff\xff\xff\xff\x01",
    "bytes after the end": Codec().encode(GOOD) + b"\x00",
    "cut short": Codec().encode(GOOD)[:-1],
    "a time out of range": ENVELOPE
    + msgspec.msgpack.encode(body_of("Abort", request_id=msgspec.msgpack.Ext(-1, b"\x7f" * 12))),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_are_counted_and_dropped_and_the_next_message_arrives(name: str) -> None:
    async def main() -> None:
        with router() as (head, address), stranger(address) as peer:
            peer.send(MALFORMED[name])
            peer.send(Codec().encode(GOOD))
            _, envelope = await soon(head.receive())
            assert envelope.body == GOOD
            assert head.num_dropped == 1

    run(main())


@pytest.mark.parametrize("frames", [[b""], [b"", Codec().encode(GOOD)], [Codec().encode(GOOD)] * 2, [b"x"] * 50])
def test_a_message_of_several_frames_is_dropped(frames: list[bytes]) -> None:
    async def main() -> None:
        with router() as (head, address), stranger(address) as peer:
            peer.send_multipart(frames)
            peer.send(Codec().encode(GOOD))
            assert (await soon(head.receive()))[1].body == GOOD
            assert head.num_dropped == 1

    run(main())


def test_a_node_drops_what_its_head_never_meant(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        head = context.socket(zmq.ROUTER)
        port = head.bind_to_random_port("tcp://127.0.0.1")
        with dealer(f"tcp://127.0.0.1:{port}") as node:
            await node.send(GOOD)
            await asyncio.to_thread(head.poll, 5000)
            identity, _ = head.recv_multipart()
            for frames in ([b"junk"], [b"", b""], [Codec().encode(GOOD)]):
                head.send_multipart([identity, *frames])
            assert (await soon(node.receive())).body == GOOD
        context.destroy(0)

    with caplog.at_level(logging.WARNING, logger="tpdist"):
        run(main())
    assert [record.message for record in caplog.records if "dropped" in record.message] != []


MESSAGES: list[Message] = [
    register_of(0),
    fingerprint_of("x", explicit={"a": [1, {"b": None}]}),
    assigns_of([1, 2])[1],
    GENERATE,
    Heartbeat(instance="x"),
    ClusterState(state="ready", reason="", epoch=1, phase="ready", nodes=(), plan={"x": {"y": 1.5}}),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid frame with some of its bytes replaced, removed or doubled."""
    frame = bytearray(Codec().encode(draw(st.sampled_from(MESSAGES))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        frame[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(frame)


@settings(max_examples=1000, deadline=None)
@given(frame=st.one_of(st.binary(max_size=200), mutated(), mutated()))
@example(frame=MALFORMED["nested too deep"])
def test_bytes_decode_to_an_envelope_or_one_of_three_errors(frame: bytes) -> None:
    codec = Codec()
    try:
        envelope = codec.decode(frame)
    except (MalformedFrameError, OtherVersionError, OtherClusterError):
        return
    again = codec.decode(codec.encode(envelope.body))
    assert type(again.body) is type(envelope.body)


@settings(max_examples=50, deadline=None)
@given(frames=st.lists(st.lists(st.one_of(st.binary(max_size=50), mutated()), min_size=1, max_size=3), max_size=8))
def test_no_sequence_of_frames_stops_a_router(frames: list[list[bytes]]) -> None:
    async def main() -> None:
        with router() as (head, address), stranger(address) as peer:
            for parts in frames:
                peer.send_multipart(parts)
            peer.send(Codec().encode(GOOD))
            while (await soon(head.receive()))[1].body != GOOD:
                pass

    run(main())


def test_a_frame_over_the_limit_costs_its_sender_the_connection_and_nobody_else() -> None:
    async def main() -> None:
        with router() as (head, address), stranger(address) as peer, dealer(address) as node:
            await node.send(GOOD)
            assert (await soon(head.receive()))[0] == b"node"
            peer.send(bytes(MAX_MESSAGE_BYTES + 1))
            await nothing(head.receive())
            await node.send(GOOD)
            assert (await soon(head.receive()))[0] == b"node"

    run(main())


def test_a_message_that_peers_would_not_accept_is_not_sent() -> None:
    with pytest.raises(TpdistError, match=r"a Abort of 33554\d\d\d bytes is more than the 33554432"):
        Codec().encode(Abort(request_id="x" * MAX_MESSAGE_BYTES))


def test_complaints_are_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with router() as (head, address), stranger(address) as peer:
            for _ in range(100):
                peer.send(b"junk")
            peer.send(Codec().encode(GOOD))
            await soon(head.receive())
            assert head.num_dropped == 100

    with caplog.at_level(logging.WARNING, logger="tpdist"):
        run(main())
    assert 1 <= len([record for record in caplog.records if "dropped" in record.message]) <= 3


# -- other releases, other clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(PROTOCOL_VERSION + 1, "", 0, {"type": "New"}),
        frame_of(0),
        frame_of(7, "a", "b", "c", "d", "e"),
        frame_of(10**18, None),
    ],
)
def test_another_release_gets_an_answer_in_our_own_version(frame: bytes) -> None:
    async def main() -> None:
        with router() as (head, address), stranger(address) as peer:
            peer.send(frame)
            await nothing(head.receive())
            assert head.num_dropped == 1
            answer = Codec().decode(await asyncio.to_thread(peer.recv))
            assert isinstance(answer.body, Wait)
            assert f"this process {PROTOCOL_VERSION}" in answer.body.reason

    run(main())


def test_a_node_ends_when_its_head_speaks_another_version() -> None:
    async def main() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        head = context.socket(zmq.ROUTER)
        port = head.bind_to_random_port("tcp://127.0.0.1")
        with dealer(f"tcp://127.0.0.1:{port}") as node:
            await node.send(GOOD)
            await asyncio.to_thread(head.poll, 5000)
            head.send_multipart([head.recv_multipart()[0], frame_of(PROTOCOL_VERSION + 1, "future")])
            with pytest.raises(
                JoinError, match=rf"protocol {PROTOCOL_VERSION + 1}, this process {PROTOCOL_VERSION}; install the same"
            ):
                await soon(node.receive())
        context.destroy(0)

    run(main())


def test_a_node_of_an_earlier_cluster_is_not_listened_to_and_learns_that_its_head_has_gone() -> None:
    async def main() -> None:
        with (
            router(codec=Codec(cluster_id="new")) as (head, address),
            dealer(address, codec=Codec(cluster_id="old")) as node,
        ):
            await node.send(GOOD)
            await nothing(head.receive())
            assert head.num_dropped == 1
            with pytest.raises(LostError, match=r"cluster 'new', not old; the head was started again"):
                await soon(node.receive())

    run(main())


def test_a_node_that_has_not_joined_yet_talks_to_any_cluster() -> None:
    async def main() -> None:
        with router(codec=Codec(cluster_id="new", epoch=3)) as (head, address), dealer(address) as node:
            await node.send(GOOD)
            identity, envelope = await soon(head.receive())
            assert (identity, envelope.cluster_id, envelope.epoch) == (b"node", "", 0)
            await head.send(identity, GOOD)
            answer = await soon(node.receive())
            assert (answer.cluster_id, answer.epoch) == ("new", 3)

    run(main())


# -- keys -------------------------------------------------------------------------------------------------------------


def test_nodes_with_the_key_talk_both_ways() -> None:
    async def main() -> None:
        with router(keys=KEYS) as (head, address), dealer(address, keys=KEYS) as node:
            await node.send(GOOD)
            identity, envelope = await soon(head.receive())
            assert envelope.body == GOOD
            await head.send(identity, Heartbeat(instance="x"))
            assert (await soon(node.receive())).body == Heartbeat(instance="x")

    run(main())


@pytest.mark.parametrize("keys", [None, OTHER_KEYS], ids=["no key", "another key"])
def test_without_the_key_nothing_passes_in_either_direction(keys: ClusterKeys | None) -> None:
    async def main() -> None:
        with router(keys=KEYS) as (head, address), dealer(address, keys=keys) as node:
            await node.send(GOOD)
            await nothing(head.receive())
            await head.send(b"node", GOOD)
            await nothing(node.receive())
            assert head.num_dropped == 0

    run(main())


def test_a_head_without_a_key_is_no_head_for_a_node_with_one() -> None:
    async def main() -> None:
        with router() as (head, address), dealer(address, keys=KEYS) as node:
            await node.send(GOOD)
            await nothing(head.receive())

    run(main())


def test_knowing_the_heads_public_key_is_not_enough() -> None:
    """The allow-list, and not only the handshake, keeps strangers out."""
    public, secret = zmq.curve_keypair()
    thief = ClusterKeys(KEYS.head_public, b"", public, secret)

    async def main() -> None:
        with router(keys=KEYS) as (head, address), dealer(address, keys=thief) as node:
            await node.send(GOOD)
            await nothing(head.receive())

    run(main())


def test_keys_are_the_same_wherever_they_are_derived_and_differ_by_role_and_seed() -> None:
    assert ClusterKeys.from_seed(bytes(range(32))) == KEYS
    values = [getattr(keys, name) for keys in (KEYS, OTHER_KEYS) for name in KEYS.__dataclass_fields__]
    assert len(set(values)) == 8
    assert KEYS.head_public == b"G5hY%]ZV0:CUBGA[)KW{2{@JaAaUf6+**N)mPem{"
    assert "secret" not in repr(KEYS)


def test_a_key_file_is_read_unless_others_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(bytes(range(32)).hex() + "\n")
    for mode in (0o600, 0o400):
        file.chmod(mode)
        assert ClusterKeys.read(file) == KEYS
    for mode in (0o644, 0o640, 0o604, 0o602, 0o610):
        file.chmod(mode)
        with pytest.raises(SettingsError, match=f"has mode {mode:04o}.*chmod 600"):
            ClusterKeys.read(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds 0 bytes"),
        (b"00" * 31, "holds 31 bytes, a cluster key has 32"),
        (b"00" * 33, "holds 33 bytes"),
        (b"zz" * 32, "cannot read the cluster key"),
        (b"\xff\xfe", "cannot read the cluster key"),
        (None, "No such file"),
    ],
)
def test_what_is_no_key_file_is_a_settings_error_that_keeps_the_secret(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.touch(mode=0o600)
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=said) as caught:
        ClusterKeys.read(file)
    assert "key" in str(caught.value)
    assert "zzzz" not in str(caught.value)


# -- addresses --------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_a_settings_error_that_names_it() -> None:
    async def main() -> None:
        with (
            router() as (_, address),
            pytest.raises(SettingsError, match=re.escape(f"{address} is taken")),
            router(address),
        ):
            pass

    run(main())


@pytest.mark.parametrize("address", ["tcp://203.0.113.7:5000", "tcp://no.such.host.invalid:1", "ipc:///no/such/dir/s"])
def test_an_address_that_is_not_ours_cannot_be_listened_on(address: str) -> None:
    async def main() -> None:
        with pytest.raises(SettingsError, match="cannot listen on"), router(address):
            pass

    run(main())


def test_an_address_that_is_none_cannot_be_connected_to() -> None:
    async def main() -> None:
        with pytest.raises(SettingsError, match="cannot connect to"), dealer("tcp://nowhere"):
            pass

    run(main())


def test_ipv6_loopback_works(tmp_path: Path) -> None:
    async def main() -> None:
        address = tcp_address("::1", "*")
        with router(address) as (head, bound), dealer(bound) as node:
            assert bound.startswith("tcp://[::1]:")
            await node.send(GOOD)
            assert (await soon(head.receive()))[1].body == GOOD

    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    run(main())


def test_a_head_on_all_interfaces_is_reached_over_both_families() -> None:
    async def main() -> None:
        with router(tcp_address("*", "*")) as (head, bound):
            port = bound.rpartition(":")[2]
            for host in ("127.0.0.1", "::1"):
                with dealer(tcp_address(host, port), identity=host.encode()) as node:
                    await node.send(GOOD)
                    assert (await soon(head.receive()))[0] == host.encode()

    run(main())


@pytest.mark.parametrize(
    ("address", "families", "ipv6"),
    [
        ("ipc:///tmp/x", (), False),
        ("tcp://10.0.0.1:5", (socket.AF_INET,), False),
        ("tcp://[fe80::1]:5", (), True),
        ("tcp://both:5", (socket.AF_INET, socket.AF_INET6), False),
        ("tcp://six:5", (socket.AF_INET6,), True),
        ("tcp://not-yet:5", (), False),
    ],
)
def test_a_name_is_reached_over_ipv4_unless_it_has_only_ipv6(
    address: str, families: tuple[int, ...], ipv6: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, port: object, family: int) -> list[object]:
        if family not in families:
            raise socket.gaierror("unknown")
        return [object()]

    monkeypatch.setattr(channel.socket, "getaddrinfo", resolve)
    assert channel.needs_ipv6(address) is ipv6


def test_a_node_may_connect_before_its_head_listens(tmp_path: Path) -> None:
    async def main() -> None:
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with dealer(tcp_address("127.0.0.1", port)) as node:
            await node.send(GOOD)
            await asyncio.sleep(0.2)
            with router(tcp_address("127.0.0.1", port)) as (head, _):
                assert (await soon(head.receive()))[1].body == GOOD

    run(main())


def test_a_message_for_somebody_who_is_not_there_is_dropped() -> None:
    async def main() -> None:
        with router() as (head, address), dealer(address) as node:
            await head.send(b"nobody", GOOD)
            await node.send(GOOD)
            await soon(head.receive())
            await head.send_all([b"nobody", b"node", b"\xff"], GOOD)
            assert (await soon(node.receive())).body == GOOD

    run(main())


# -- ranks: blocking sockets ------------------------------------------------------------------------------------------


@pytest.fixture
def plans(tmp_path: Path) -> Iterator[Router]:
    made = Router(host="127.0.0.1", ipc_address=f"ipc://{tmp_path}/p", codec=Codec(cluster_id="c", epoch=2), keys=None)
    yield made
    close_blocking_sockets()
    made.close()


def rank_link(plans: Router, rank: int, **codec: Any) -> Dealer:
    link = Dealer(
        address=tcp_address("127.0.0.1", plans.port),
        identity=f"rank-{rank}".encode(),
        codec=Codec(**{"cluster_id": "c", "epoch": 2, **codec}),
    )
    link.send(RankHello(local_rank=rank, pid=1))
    return link


def test_rank_0_waits_for_all_ranks_and_sends_to_each(plans: Router) -> None:
    links = [rank_link(plans, rank) for rank in (1, 2)]
    plans.wait_for({b"rank-1", b"rank-2"}, timeout_s=5)
    plans.send([b"rank-1", b"rank-2"], GOOD)
    for link in links:
        assert wait_any([link], timeout_s=5)
        envelope = link.receive()
        assert envelope is not None
        assert (envelope.body, envelope.epoch) == (GOOD, 2)
        assert link.receive() is None


def test_ranks_that_do_not_come_are_named(plans: Router) -> None:
    rank_link(plans, 1)
    with pytest.raises(JoinError, match=r"rank-2, rank-3 did not connect to rank 0's port \d+ within 0.3 s"):
        plans.wait_for({b"rank-1", b"rank-2", b"rank-3"}, timeout_s=0.3)


@pytest.mark.parametrize("codec", [{"epoch": 1}, {"cluster_id": "other"}])
def test_a_rank_of_an_earlier_life_is_not_taken_for_one_of_this(plans: Router, codec: dict[str, Any]) -> None:
    rank_link(plans, 1, **codec)
    with pytest.raises(JoinError, match="rank-1 did not connect"):
        plans.wait_for({b"rank-1"}, timeout_s=0.3)


def test_a_plan_for_a_rank_that_has_gone_is_an_error_that_names_it(plans: Router) -> None:
    with pytest.raises(PeerGoneError, match="rank-1 is not connected to rank 0") as caught:
        plans.send([b"rank-1"], GOOD)
    assert caught.value.exit_code == 6


def test_waiting_ends_at_its_deadline(plans: Router) -> None:
    assert not wait_any([rank_link(plans, 1)], timeout_s=0.05)


def test_plans_to_other_machines_need_the_key(tmp_path: Path) -> None:
    head = Router(host="127.0.0.1", ipc_address=f"ipc://{tmp_path}/p", codec=Codec(), keys=KEYS)
    address = tcp_address("127.0.0.1", head.port)
    for rank, keys in ((1, KEYS), (2, OTHER_KEYS), (3, None)):
        link = Dealer(address=address, identity=f"rank-{rank}".encode(), codec=Codec(), keys=keys)
        link.send(RankHello(local_rank=rank, pid=1))
    with pytest.raises(JoinError, match=r"^rank-2, rank-3 did not connect"):
        head.wait_for({b"rank-1", b"rank-2", b"rank-3"}, timeout_s=1)
    close_blocking_sockets()
    head.close()


def test_a_descriptor_that_is_used_again_ends_the_connection_before_and_not_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event of the connection before may be read after the first message of the next."""

    async def main() -> None:
        with router() as (head, address), dealer(address, identity=b"old") as old:
            hangups: asyncio.Queue[int] = asyncio.Queue()
            monkeypatch.setattr(head._hangups, "next", hangups.get)
            await old.send(GOOD)
            await soon(head.receive())
            ((descriptor, _),) = head._connections.items()
            hangups.put_nowait(descriptor)
            await nothing(head.next_hangup())
            head._connections[descriptor] = (b"older", 0)
            await old.send(GOOD)
            await soon(head.receive())
            hangups.put_nowait(descriptor)
            assert await soon(head.next_hangup()) == b"older"
            await nothing(head.next_hangup())
            old.close()
            while head._connections[descriptor][1] == channel._socket_at(descriptor):
                await asyncio.sleep(0.01)
            hangups.put_nowait(descriptor)
            assert await soon(head.next_hangup()) == b"old"

    run(main())
