"""Everything that travels between the processes of a cluster, as typed, size-capped, pickle-free messages.

One Envelope is one ZeroMQ frame of MessagePack. It names the protocol version, the cluster and the epoch, so that a
message from another release, another cluster or an earlier life of the process group is recognised before it is acted
on. Unknown fields and tags do not decode: a malformed message is counted and dropped by the channel that received it.

Who sends what:

    node  -> head    Register, Fingerprint, Heartbeat, Listening, RankUpdate, RankGone, EpochEnded, Generate, Abort,
                     DrainRequest, Goodbye
    head  -> node    Welcome, Wait, Rejoin, Heartbeat, Assign, Connect, EndEpoch, ClusterState, ClusterNews, Tokens,
                     RequestFailed, Shutdown
    rank  -> agent   RankHello, Listening (rank 0), RankUpdate, RankGone
    agent -> rank    RankStart, Connect, RankStop
    head  -> rank 0  Generate, Abort, Heartbeat
    rank 0 -> head   Heartbeat (once, when it connects), StepOutputs, RequestFailed
    rank 0 -> ranks  StepPlan
    ranks -> rank 0  RankHello (once, when they connect); StepResult (the one that samples, with several stages)
    doctor <-> head's doctor  Preflight
"""

from typing import Any

import msgspec

from tpdist.log import LogFormat
from tpdist.sampling_params import SamplingParams

PROTOCOL_VERSION = 4
# What sockets are called on the wire: rank 0's towards the head, and the second one of each node.
ENGINE_IDENTITY = b"engine"
HEARTBEAT_SUFFIX = b"/heartbeat"
MAX_MESSAGE_BYTES = 32 * 1024 * 1024


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


# -- what a node is ---------------------------------------------------------------------------------------------------


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or the CPU of a node without one. Bytes are of device memory (for a CPU: the cgroup's)."""

    kind: str
    index: int
    name: str
    total_bytes: int
    free_bytes: int


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `tpdist probe` reads on one machine. Versions that do not exist there are None."""

    hostname: str
    host_id: str
    num_cpus: int
    memory_bytes: int
    available_bytes: int
    python: str
    tpdist: str
    torch: str | None
    cuda: str | None
    nccl: str | None
    driver: str | None
    devices: tuple[DeviceInfo, ...]


# -- joining ----------------------------------------------------------------------------------------------------------


class Register(Message, frozen=True):
    """First word of a node. `worker_id` is None for the head's own node and for a standby, which takes the place of a
    node that is lost. `address` is the node's own IP on its route to the head, `head_address` the head's IP as this
    node reached it."""

    instance: str
    worker_id: int | None
    hostname: str
    pid: int
    address: str
    head_address: str
    interface: str | None
    global_world_size: int | None
    local_world_size: int | None
    standby: bool = False


class Fingerprint(Message, frozen=True):
    """What must agree before a process group exists. `model` maps a part (config.json, tokenizer, a weights file) to
    its digest; `explicit` holds the plan and engine settings that somebody set on this node, as JSON values."""

    instance: str
    probe: ProbeReport
    model: dict[str, str]
    explicit: dict[str, Any]


class Welcome(Message, frozen=True):
    """The head knows this instance; from now on its messages carry `cluster_id`."""

    cluster_id: str


class Wait(Message, frozen=True):
    """Not now, for this reason; the node goes on registering."""

    reason: str


class Rejoin(Message, frozen=True):
    """The head does not, or no longer, know this instance: its ranks end, and it registers anew."""

    reason: str


class StageAssign(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pipeline stage: its layers, start <= i < stop, and the weights of its tensor-parallel ranks."""

    start: int
    stop: int
    shares: tuple[int, ...]


class Assign(Message, frozen=True):
    """The ranks of one node in one epoch of one cluster; the node starts them at once. `head_host` is the head as this
    node reaches it, `bind_host` the address that rank 0 listens on. `interface` is the network
    interface for collectives. `settings` are the head's plan and engine settings, which hold on all nodes, with
    nothing left "auto". Rank r is number r % tp_size of stage r // tp_size. `item_devices`, where one process has all
    layers: the devices of the embedding, each layer, and the output, in this order. `most_blocks`: what the cache may
    have by the plan; `own_reserves`: it leaves other reserves than a rank does that measures what is free."""

    cluster_id: str
    epoch: int
    node_index: int
    first_rank: int
    local_world_size: int
    world_size: int
    tp_size: int
    stages: tuple[StageAssign, ...]
    item_devices: tuple[str, ...]
    most_blocks: int
    backend: str
    threads: int
    interface: str | None
    head_host: str
    bind_host: str
    load_timeout_s: float
    collective_timeout_s: float
    store_port: int
    max_model_len: int
    settings: dict[str, Any]
    own_reserves: bool = False


class Listening(Message, frozen=True):
    """Rank 0 listens: the store that process groups meet at, and the socket that step plans leave from."""

    store_port: int
    plan_port: int


class Connect(Message, frozen=True):
    """Rank 0 listens on these ports of the node's `head_host`: every rank may connect."""

    store_port: int
    plan_port: int


# -- while it runs ----------------------------------------------------------------------------------------------------


class RankProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """How far a rank's main thread is, as its agent reads it; no thread of the rank says it in its stead.

    `step` is the last that it has begun, and `in_step` whether it is still in that. `num_waits` counts the collectives
    and receives that it has entered, `wait` names the last; `waiting` is True until it has left that, and also while it
    has nothing to do. `process` is the state of its process in /proc: R, S, D, T (stopped), Z.
    """

    rank: int
    step: int
    num_waits: int
    wait: str
    waiting: bool
    process: str
    in_step: bool = False


class Heartbeat(Message, frozen=True):
    """A sign of life, on a connection of its own so that no other traffic delays it. Both ways: a node's brings the
    progress of its ranks, the head's what the engine does."""

    instance: str
    ranks: tuple[RankProgress, ...] = ()
    stats: "EngineStats | None" = None


class HeldBytes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank has on one of its devices, by torch's own count. `disk` is a device too: what stays in files."""

    device: str
    weight_bytes: int
    kv_cache_bytes: int


class RankUpdate(Message, frozen=True):
    """In which phase a rank is: start, connect, load, warmup or ready. `done`/`total` are bytes of the checkpoint,
    `load_s` how long they took. `weight_bytes`, `kv_blocks` and `held` are known once ready."""

    rank: int
    pid: int
    device: str
    phase: str
    done: int = 0
    total: int = 0
    load_s: float = 0.0
    weight_bytes: int = 0
    kv_blocks: int = 0
    held: tuple[HeldBytes, ...] = ()


class RankGone(Message, frozen=True):
    """A rank ended, or reports why it is about to. `secondary` is True when the rank only noticed that a peer had
    gone (a collective failed): another RankGone or a silent node is then the first cause. `last_lines` is the end of
    its log."""

    rank: int
    exit_code: int
    cause: str
    secondary: bool = False
    last_lines: tuple[str, ...] = ()


class EndEpoch(Message, frozen=True):
    """The epoch that the envelope names is over: the node kills its ranks and answers with EpochEnded."""

    cause: str


class EpochEnded(Message, frozen=True):
    """No rank of the epoch that the envelope names is left on this node."""

    instance: str


class RankView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`step_age_s`: since the head saw the rank advance. `load_bytes` and `load_s`: what it read, and how long."""

    rank: int
    local_rank: int
    pid: int
    device: str
    state: str
    step: int
    weight_bytes: int
    kv_blocks: int
    held: tuple[HeldBytes, ...] = ()
    step_age_s: float = 0.0
    load_bytes: int = 0
    load_s: float = 0.0


class NodeView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    node_id: str
    role: str
    host: str
    pid: int
    state: str
    last_seen_s: float
    ranks: tuple[RankView, ...]


class RestartView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One epoch that was ended, why, and how long ago. `reason` is the kind of cause: rank_lost, rank_failed, node_lost
    or hang."""

    epoch: int
    cause: str
    reason: str
    age_s: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the engine does now, and counts since its start. `prefix_cache_queries` and `prefix_cache_hits` count prompt
    tokens that were looked up in the prefix cache, and those that were found."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that every node checks requests against, known once all ranks are ready."""

    max_model_len: int
    num_kv_blocks: int
    block_size: int

    @property
    def max_tokens(self) -> int:
        """Most tokens (prompt and completion) that one sequence can hold."""
        return min(self.max_model_len, self.num_kv_blocks * self.block_size)


class ClusterState(Message, frozen=True):
    """The cluster as the head sees it, sent to every node on each change, and now and then for what changes all the
    time. `state` is starting, ready, draining, recovering or failed. `standbys` hold no place. `restarts` are the last
    few, `aborts` counts all by their reasons. `startup_s`: how long the phases of this epoch took. `retried`: requests
    that went on in a later epoch, of all epochs together."""

    state: str
    reason: str
    epoch: int
    phase: str
    nodes: tuple[NodeView, ...]
    plan: dict[str, Any]
    standbys: tuple[NodeView, ...] = ()
    restarts: tuple[RestartView, ...] = ()
    aborts: dict[str, int] = {}
    startup_s: dict[str, float] = {}
    retried: int = 0
    engine: EngineInfo | None = None
    stats: EngineStats = EngineStats()


class ClusterNews(Message, frozen=True):
    """A ClusterState without what grows with the cluster, its nodes, standbys and plan: where that is too large to be
    sent to all nodes at once, this comes first."""

    state: str
    reason: str
    epoch: int
    phase: str
    restarts: tuple[RestartView, ...] = ()
    aborts: dict[str, int] = {}
    startup_s: dict[str, float] = {}
    retried: int = 0
    engine: EngineInfo | None = None
    stats: EngineStats = EngineStats()


class DrainRequest(Message, frozen=True):
    """Finish what runs, then end the cluster with code 0. `immediate` ends it now, with `exit_code`."""

    reason: str
    immediate: bool = False
    exit_code: int = 0


class Shutdown(Message, frozen=True):
    """The cluster ends: kill the ranks, exit with `exit_code`, and show `cause` if it is not 0."""

    exit_code: int
    cause: str


class Goodbye(Message, frozen=True):
    """Last word of a node that ends."""

    instance: str
    exit_code: int
    cause: str


# -- requests ---------------------------------------------------------------------------------------------------------


class Generate(Message, frozen=True):
    """One sequence to generate. The agent that received it has tokenized it; ids are unique in the cluster.
    `eos_token_ids` come from that agent's generation_config.json. A lower `priority` is served first. `handed_over_s`:
    when the head gave it to rank 0, on the monotonic clock of their machine."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    handed_over_s: float | None = None


class Abort(Message, frozen=True):
    request_id: str


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Log-probabilities at one position, of the model's distribution before penalties, masks and temperature.

    `token_ids[0]` is the token that stands there (chosen, or of the prompt) and `rank` its rank, 1 for the most
    probable; the rest are the most probable ones, best first, which may hold that token again. `logprobs` goes along.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


class TokenOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, omit_defaults=True):
    """New tokens of one request. `finish_reason` is None until the last: stop or length. A stop token is
    included in `token_ids`.

    `logprobs` has one entry for each of `token_ids` if they were asked for. `prompt_logprobs` are those of the next
    positions of the prompt, the first of all being position 1; they come before or with the first token.
    With the first token alone: `num_cached_tokens`, how much of the prompt was found in the prefix cache, and
    `queue_s`, from the request's arrival at the engine until it was scheduled for the first time.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    queue_s: float | None = None


class StepOutputs(Message, frozen=True):
    """What one step made, from rank 0 to the head's agent."""

    step: int
    outputs: tuple[TokenOutput, ...]
    stats: EngineStats


class Tokens(Message, frozen=True):
    """The part of a step's outputs that belongs to one node's requests."""

    outputs: tuple[TokenOutput, ...]


class RequestFailed(Message, frozen=True):
    """A request ends without (all of) its answer. `status` is the HTTP status: 400 or 503."""

    request_id: str
    status: int
    message: str
    param: str | None = None


# -- inside a node ----------------------------------------------------------------------------------------------------


class RankHello(Message, frozen=True):
    """First word of a rank to its agent, which answers with RankStart."""

    local_rank: int
    pid: int


class RankStart(Message, frozen=True):
    """All that one rank needs to begin, from its agent over a private ipc socket. `engine_address` is the head's
    socket for requests and outputs (used by rank 0 only); `plan_address` the ipc socket for plans inside the head's
    node. `progress_file` is where the rank notes its progress. `trace_folder`: where the times of every step go."""

    rank: int
    local_rank: int
    model: str
    log_level: str
    log_format: LogFormat
    assign: Assign
    key_file: str | None
    engine_address: str
    plan_address: str
    progress_file: str
    trace_folder: str | None


class RankStop(Message, frozen=True):
    """End with code 0 now."""


# -- inside an epoch --------------------------------------------------------------------------------------------------


class SequenceStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A sequence takes a slot on every rank. `token_ids` is its prompt (and, after a preemption, what it had already
    generated: `num_prompt_tokens` tells them apart) as little-endian int32. `seed` is always set."""

    slot: int
    token_ids: bytes
    num_prompt_tokens: int
    seed: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]


class SlotBlocks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Blocks appended to the block table of a slot."""

    slot: int
    blocks: tuple[int, ...]


class SlotWork(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Run the next `num_tokens` tokens of a slot (one for a decode, a chunk for a prefill), the first at position
    `start`; sample one token after them if `sample`. A decode's input is the slot's last token, which ranks hold."""

    slot: int
    start: int
    num_tokens: int
    sample: bool


class StepPlan(Message, frozen=True):
    """One step, the same for every rank; only changes travel. Applied in this order: `sampled`, `free`, `start`,
    `blocks`, then `work`. `step` counts from 1 without gaps in an epoch; a gap ends the epoch.

    `sampled`, with several stages: (slot, token) of the sequences that go on, sampled since the plan before. The last
    stage knows them already.
    """

    epoch: int
    step: int
    sampled: tuple[tuple[int, int], ...] = ()
    free: tuple[int, ...] = ()
    start: tuple[SequenceStart, ...] = ()
    blocks: tuple[SlotBlocks, ...] = ()
    work: tuple[SlotWork, ...] = ()


class StepResult(Message, frozen=True, kw_only=False):
    """`token_ids`: (slot, token) for each SlotWork of the step that asked for a sample, in any order. By slot, where
    asked for: the log-probabilities of its sampled token, and those of the prompt's tokens that this step predicted
    (a chunk of n tokens from `start` predicts positions start + 1 ... start + n as far as the prompt goes)."""

    step: int
    token_ids: tuple[tuple[int, int], ...]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}


# -- before it runs ---------------------------------------------------------------------------------------------------


class Preflight(Message, frozen=True):
    """One of the words of preflight/words.py, between a `tpdist doctor` and the head's; they are decoded there."""

    word: bytes


Body = (
    Register
    | Fingerprint
    | Welcome
    | Wait
    | Rejoin
    | Assign
    | Listening
    | Connect
    | Heartbeat
    | RankUpdate
    | RankGone
    | EndEpoch
    | EpochEnded
    | ClusterState
    | ClusterNews
    | DrainRequest
    | Shutdown
    | Goodbye
    | Generate
    | Abort
    | StepOutputs
    | Tokens
    | RequestFailed
    | RankHello
    | RankStart
    | RankStop
    | StepPlan
    | StepResult
    | Preflight
)


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    version: int
    cluster_id: str
    epoch: int
    body: Body
