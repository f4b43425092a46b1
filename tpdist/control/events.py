"""What the head's decisions are made from, and what they are made of: events in, actions out."""

from collections.abc import Iterable
from dataclasses import dataclass

from tpdist.control.messages import DrainRequest, Message
from tpdist.control.state import State


@dataclass(frozen=True)
class Heard:
    """A message came from a node: a sign of life, and perhaps more. `epoch` is the sender's, from its
    envelope."""

    instance: str
    body: Message
    epoch: int


@dataclass(frozen=True)
class Beats:
    """Heartbeats that came within a moment. Most of what a head hears is these, so they are one change of the state."""

    beats: tuple[Heard, ...]


@dataclass(frozen=True)
class HungUp:
    """A connection of a node has closed. What came over it before may still be read."""

    instance: str


@dataclass(frozen=True)
class Interrupt:
    """Somebody wants the cluster to end."""

    request: DrainRequest


@dataclass(frozen=True)
class Tick:
    """Time passed; `in_flight` requests are at the engine, which has had something to answer for `stalled_s` without a
    word. `stood_still`: the head itself has not run for a while."""

    in_flight: int
    stalled_s: float = 0.0
    stood_still: bool = False


Event = Heard | Beats | HungUp | Interrupt | Tick


@dataclass(frozen=True)
class Send:
    """Send a message to one instance."""

    instance: str
    body: Message


@dataclass(frozen=True)
class Publish:
    """Send the new view of the cluster to all nodes."""


@dataclass(frozen=True)
class Finish:
    """Everybody knows; the head's work is over."""

    exit_code: int
    cause: str


Action = Send | Publish | Finish
Answer = tuple[State, tuple[Action, ...]]


def after(actions: Iterable[Action], answer: Answer) -> Answer:
    """An answer with `actions` before its own."""
    state, more = answer
    return state, (*actions, *more)
