"""The header of a safetensors file: what safetensors writes is read, anything else is a CheckpointError."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tpdist.checkpoint.header import read_header
from tpdist.errors import CheckpointError


def write_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header (bytes, or an object for JSON) and tensor bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, stop: int, *, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_entries_come_in_the_order_of_their_bytes_and_point_at_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.arange(4, dtype=torch.float32),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(7.0),
        "ids": torch.arange(3),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "m.safetensors").read_bytes()
    entries = read_header(tmp_path / "m.safetensors")
    assert {entry.name: entry.shape for entry in entries} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert [entry.start for entry in entries] == sorted(entry.start for entry in entries)
    for entry in entries:
        expected = tensors[entry.name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.start : entry.stop] == expected
        assert entry.num_bytes == len(expected)


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert read_header(write_file(tmp_path / "m", {"__metadata__": {"a": "b"}})) == ()


def test_a_type_that_is_newer_than_this_program_may_stand_in_a_file(tmp_path: Path) -> None:
    file = write_file(tmp_path / "m", {"a": tensor(0, 2, dtype="F4", shape=[4]), "b": tensor(2, 6)}, bytes(6))
    assert [entry.dtype for entry in read_header(file)] == ["F4", "F32"]


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    file = write_file(tmp_path / "m.safetensors", {"a": tensor(0, 400)}, bytes(300))
    size = file.stat().st_size
    with pytest.raises(CheckpointError, match=rf"m\.safetensors is truncated: it has {size} bytes.* {size + 100}$"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": tensor(0, 8)}, 12, "longer than its header says"),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "'a' ends at byte .*'b' starts"),
        ({"a": tensor(0, 8), "b": tensor(12, 16)}, 16, "'a' ends at byte .*'b' starts"),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, 8, "'a' ends at byte .*'b' starts"),
        ({"a": tensor(4, 8)}, 8, "no tensor owns its first 4 bytes"),
        ({"a": tensor(0, 8, shape=[3])}, 8, "needs 12 bytes"),
        ({"a": tensor(8, 0)}, 8, "'a'"),
        ({"a": tensor(0, 8, shape=[-2])}, 8, "'a' has dtype"),
        ({"a": tensor(0, 8, shape=[2.0])}, 8, "'a' has dtype"),
        ({"a": tensor(0, 8, shape=[True, 2])}, 8, "'a' has dtype"),
        ({"a": {**tensor(0, 8), "dtype": 4}}, 8, "'a' has dtype"),
        ({"a": {**tensor(0, 8), "data_offsets": [0]}}, 8, "'a' has dtype"),
        ({"a": {**tensor(0, 8), "data_offsets": {"0": 8}}}, 8, "'a' has dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs exactly dtype"),
        ({"a": {**tensor(0, 8), "extra": 1}}, 8, "needs exactly dtype"),
        ({"a": 5}, 8, "needs exactly dtype"),
        ({"a\ud800": tensor(0, 8)}, 8, "unprintable"),
        ([], 0, "not a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe{}", 0, "not valid JSON"),
        (b"[" * 200_000, 0, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "not valid JSON"),
        (b'{"__metadata__": {}, "__metadata__": {}}', 0, "stands in it twice"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write_file(tmp_path / "m", header, bytes(data)))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, b"\xff" * 100, b"\1" + b"\0" * 7])
def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"the file {len(content)} bytes"):
        read_header(tmp_path / "m")


def test_a_header_of_more_than_a_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    length = 100_000_001
    with (tmp_path / "m").open("wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(8 + length)
    with pytest.raises(CheckpointError, match=str(length)):
        read_header(tmp_path / "m")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "missing")


VALID = {"__metadata__": {"format": "pt"}, "a": tensor(0, 8), "b": tensor(8, 24, shape=[2, 2])}
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)


@QUICK
@given(content=st.binary(max_size=200))
def test_no_bytes_lead_to_another_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_header(tmp_path / "m")


@QUICK
@given(header=st.binary(max_size=100), data=st.binary(max_size=20))
def test_no_header_of_the_right_length_leads_to_another_error(tmp_path: Path, header: bytes, data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        read_header(write_file(tmp_path / "m", header, data))


@QUICK
@given(position=st.integers(0, 300), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_a_valid_file_with_a_changed_byte_or_a_cut_end_is_read_or_refused(
    tmp_path: Path, position: int, value: int, cut: int
) -> None:
    content = bytearray(write_file(tmp_path / "m", VALID, bytes(24)).read_bytes())
    content[position % len(content)] = value
    (tmp_path / "m").write_bytes(content[: max(0, len(content) - cut)] if cut < 100 else content)
    with contextlib.suppress(CheckpointError):
        read_header(tmp_path / "m")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@QUICK
@given(
    name=st.sampled_from(["a", "b", "__metadata__"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", "other"]),
    value=json_values,
)
def test_any_value_of_any_key_is_read_or_refused_on_purpose(tmp_path: Path, name: str, key: str, value: Any) -> None:
    header = {**VALID, name: {**VALID[name], key: value}}
    with contextlib.suppress(CheckpointError):
        read_header(write_file(tmp_path / "m", header, bytes(24)))
