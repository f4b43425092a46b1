"""Envelopes as bytes and back, and what makes a frame unacceptable. Knows no sockets."""

import msgspec

from tpdist.control.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Envelope, Message
from tpdist.errors import TpdistError


class MalformedFrameError(TpdistError):
    """Bytes that are no Envelope."""


class OtherVersionError(TpdistError):
    """An Envelope of another release's protocol. `version` is what the peer speaks."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the peer speaks protocol {version}, this process {PROTOCOL_VERSION}")
        self.version = version


class OtherClusterError(TpdistError):
    """An Envelope of another cluster: one of the two has been started again."""


class Codec:
    """Bytes to Envelope and back, with the cluster id and epoch that this process stamps on what it sends.

    A cluster id is empty until a process knows its cluster; two that differ do not talk.
    """

    def __init__(self, *, cluster_id: str = "", epoch: int = 0) -> None:
        self.cluster_id = cluster_id
        self.epoch = epoch
        self._encoder = msgspec.msgpack.Encoder()
        self._parts = msgspec.msgpack.Decoder(list[msgspec.Raw])
        self._version = msgspec.msgpack.Decoder(int)
        self._envelope = msgspec.msgpack.Decoder(Envelope)

    def encode(self, body: Message) -> bytes:
        frame = self._encoder.encode((PROTOCOL_VERSION, self.cluster_id, self.epoch, body))
        if len(frame) > MAX_MESSAGE_BYTES:
            kind = type(body).__name__
            raise TpdistError(f"a {kind} of {len(frame)} bytes is more than the {MAX_MESSAGE_BYTES} that peers accept")
        return frame

    def decode(self, frame: bytes) -> Envelope:
        """Raises MalformedFrameError, OtherVersionError or OtherClusterError.

        The version is read first and alone: everything behind it may have changed in another release.
        """
        try:
            parts = self._parts.decode(frame)
            version = self._version.decode(parts[0]) if parts else 0
            if version == PROTOCOL_VERSION:
                return self._of_this_cluster(self._envelope.decode(frame))
        except OtherClusterError:
            raise
        # Text that is no UTF-8 is a ValueError, a value that a message's own checks refuse a TpdistError.
        except (msgspec.DecodeError, ValueError, TpdistError, RecursionError) as error:
            raise MalformedFrameError(str(error)) from error
        raise OtherVersionError(version)

    def _of_this_cluster(self, envelope: Envelope) -> Envelope:
        if self.cluster_id and envelope.cluster_id and envelope.cluster_id != self.cluster_id:
            raise OtherClusterError(f"the peer belongs to cluster {envelope.cluster_id[:64]!a}, not {self.cluster_id}")
        return envelope
